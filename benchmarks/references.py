"""How alike are the backgrounds of photo sets, and what does `check_references` say of them?

    python benchmarks/references.py path/to/dreambooth      # a folder of folders of photos → references.md

The first column was written down by eye, before a score was computed: how many pictures of the set share a background.
"""
import argparse
from pathlib import Path

import numpy as np

from parallel_rescale.subject.backgrounds import ALIKE, similar_images, border_likeness
from parallel_rescale.subject.references import as_references
from parallel_rescale.world.pictures import reference_set
from parallel_rescale.world.scenes import PLACES, SUBJECTS

BY_EYE = dict(berry_bowl="all: white cloth", cat="all: dark wood", red_cartoon="all: white", dog6="4 of 5: orange wall", clock="3 of 6: white bed", dog5="one room, four views",
              pink_sunglasses="pale sheets, pink or grey", backpack="3 of 6: wood; 3 of 6: sky", dog="2 and 2", can="2 and 2")


def majority(images):
    "The likeness that more than half of the pictures have with one of them."
    likeness = np.sort(border_likeness(images), axis=1)
    return likeness[:, -(len(images) // 2 + 1)].max()


def row(folder):
    images = [r.image for r in as_references(folder)]
    return folder.name, len(images), majority(images), len(similar_images(images)), BY_EYE.get(folder.name, "varied")


def tinyworld():
    "Sets of TinyWorld: how many of 12 subjects hit, for each place shared, and for four places."
    def hits(**options): return sum(bool(similar_images([r.image for r in as_references(reference_set(n, "{subject}", **options))])) for n in SUBJECTS)
    places = ", ".join(f"{b} {hits(regime='same place', place=b)}" for b in PLACES)
    return f"TinyWorld, 12 subjects in one place, hits: {places}. In four places: {hits()}; in one outfit: {hits(regime='same outfit')}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    a = parser.parse_args()
    rows = sorted(map(row, sorted(p for p in a.folder.iterdir() if p.is_dir())), key=lambda r: -r[2])
    lines = [f"| {name} | {eye} | {n} | {likeness:.2f} | {f'{group} of {n}' if group else '–'} |" for name, n, likeness, group, eye in rows]
    a.output.write_text("\n".join(["# Photo sets: what is shared behind the subject?", "", f"DreamBooth's photos (CC BY 4.0). Likeness: what more than half of the pictures have with one of them; the line is at {ALIKE}.", "",
                                   "| set | by eye | pictures | likeness | found |", "| --- | --- | --- | --- | --- |", *lines, "", tinyworld(), ""]), encoding="utf-8")
    print(a.output.read_text(encoding="utf-8"))


if __name__ == "__main__": main()
