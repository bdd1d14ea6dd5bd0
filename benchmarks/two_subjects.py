"""Two subjects of one class, side by side in one picture: who is seen at which place?

    python benchmarks/evidence.py reuse --teach    # teach the subjects, once
    python benchmarks/two_subjects.py             # draw and score: a quarter of an hour on one core

Scores of single pictures stay in --work; what the chapter on several subjects reads, a mean for each pair, rule and kind of prompt, goes to
parallel_rescale/data/evidence/two_subjects.csv. A run that was stopped goes on where it ended.
"""
import argparse
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from parallel_rescale import SeveralSubjects, TINY_SDXL
from parallel_rescale.evidence.evaluation import load_pipeline
from parallel_rescale.evidence.questions import noise_seed
from parallel_rescale.evidence.recorded import edition, record, RECORDED
from parallel_rescale.tools.util import quietly, write_atomically
from parallel_rescale.world.captions import asked
from parallel_rescale.world.judge import judge_images, load_judge
from parallel_rescale.world.painting import render
from parallel_rescale.world.scenes import random_pose, Scene, SIDES, STYLES, SUBJECTS

DATA = RECORDED
PAIRS = [("pixel_the_cat", "midnight_the_cat"), ("bubbles_the_fish", "marlin_the_fish"), ("bolt_the_robot", "fern_the_robot"), ("herbie_the_car", "taxi_the_car")]
LOOKS = [("a photo of {}", "on the beach"), ("a photo of {}", "in the snow"), ("a photo of {}", "on the grass"), ("a photo of {}", "at night"),
         ("a watercolor painting of {}", "on the beach"), ("a watercolor painting of {}", "in the city"), ("a pencil sketch of {}", "on the grass"),
         ("a pencil sketch of {}", "in the snow"), ("a neon sign of {}", "in the city"), ("a neon sign of {}", "at night"),
         ("a crayon drawing of {}", "on the grass"), ("a stained glass of {}", "in the snow")]
TEXTS = [f"{look.format('a {a} with a {b}')} on the {SIDES[i % 2]} {place}" for i, (look, place) in enumerate(LOOKS)]
TEXT, WEIGHTS, STEPS = 5.0, (1.0, 1.5, 2.0), 20
DTYPE = "bfloat16"   # see evidence.py
IDENTITIES = ["identity_a", "identity_b"]
BOXES = dict(left=(0, 18, 36, 54), right=(28, 18, 64, 54))    # pixels around the places where two subjects stand


def side(text):
    "Where the second subject of a text stands; the first has the other side."
    return asked(words(text, "cat", "cat"))["side"]


def words(text, first, second): return text.format(a=first, b=second)


def rules(a, b, second):
    "Name → rule, for the adapters of the first and the second subject, who stands at the side `second`; ω_cons is the number in the name."
    def make(w, **options): return SeveralSubjects(TEXT, w, (a, b), **options)
    ways = {"sum": dict(ratio="raw"), "rescaled": {}, "each other": dict(against="each other")}
    alone = {f"{name} alone 2": SeveralSubjects(TEXT, 2.0, (one,), ratio="raw") for name, one in (("first", a), ("second", b))}
    shares = {f"sum 2, {s:g} : {t:g}": make(2.0, ratio="raw", shares=(s, t)) for s, t in ((1, .5), (.5, 1))}
    first = SIDES[1 - SIDES.index(second)]
    placed = {"regions 2": make(2.0, regions=(first, second))}
    return alone | {f"{name} {w:g}": make(w, **options) for w in WEIGHTS for name, options in ways.items()} | shares | placed


def draw(pipe, name, a, b, seeds):
    "A picture for each text under the rule `name`; every subject's adapter is asked with its own word and the other's noun."
    images, noun = [None] * len(TEXTS), pipe.subjects[a].class_noun
    said = {a: lambda t: words(t, pipe.subjects[a].token, noun), b: lambda t: words(t, noun, pipe.subjects[b].token)}
    for second in SIDES:
        which, rule = [i for i, t in enumerate(TEXTS) if side(t) == second], rules(a, b, second)[name]
        own = {n: [said[n](TEXTS[i]) for i in which] for n in rule.subjects}
        made = pipe(own[rule.subjects[0]], guidance=rule, prompts=own, num_inference_steps=STEPS,
                    generator=[torch.Generator().manual_seed(seeds[i]) for i in which]).images
        for i, image in zip(which, made): images[i] = image
    return images


def true_images(pair, text, n=8, seed=0):
    "n pictures of the two subjects as a text asks for them."
    rng, wants = np.random.default_rng([seed, TEXTS.index(text)]), asked(words(text, "cat", "cat"))
    return [Image.fromarray(render(Scene(SUBJECTS[pair[0]], wants["style"], wants["place"], other=SUBJECTS[pair[1]], side=wants["side"], pose=random_pose(rng),
                                         seed=int(rng.integers(2**31))))) for _ in range(n)]


@torch.no_grad()
def looks(images, place):
    "What the judge sees of who stands at a place, enlarged to a picture: unit vectors [N, D]."
    return judge_images(load_judge(), [im.crop(BOXES[place]).resize((64, 64), Image.Resampling.LANCZOS) for im in images])["identity"]


@lru_cache(maxsize=None)
def way(pair, text, place):
    "The unit vector of who truly stands at a place, for a pair in this order."
    return torch.nn.functional.normalize(looks(true_images(pair, text), place).mean(0), dim=0)


def scored(images, pair):
    "A row for each picture: its style, and how near each subject's place is to that subject."
    seen, wants = judge_images(load_judge(), images), [asked(words(t, "cat", "cat")) for t in TEXTS]
    rows = []
    for i, (text, image, want) in enumerate(zip(TEXTS, images, wants)):
        second = want["side"]
        places = dict(zip(IDENTITIES, (SIDES[1 - SIDES.index(second)], second)))
        p = seen["style"][i].softmax(0)[STYLES.index(want["style"])].item()
        rows.append(dict(text=text, kind="photo" if want["style"] == "photo" else "stylised", style=p) |
                    {k: (looks([image], place)[0] @ way(pair, text, place)).item() for k, place in places.items()})
    return pd.DataFrame(rows)


def blend(pair):
    "A row for each text: one look half way between the two at both places is at √((1 + cos)/2) from each, cos between the two true looks at a place."
    rows = []
    for text in TEXTS:
        cosine = np.mean([(way(pair, text, place) @ way(pair[::-1], text, place)).item() for place in SIDES])
        half_way = np.sqrt((1 + cosine) / 2)
        rows.append(dict(text=text, kind="photo" if asked(words(text, "cat", "cat"))["style"] == "photo" else "stylised", identity_a=half_way, identity_b=half_way))
    return pd.DataFrame(rows)


def tables(pair, work):
    "(name, table of single pictures) of everything that is measured for a pair; what is not in `work` yet is drawn."
    a, b = (name.split("_")[0] for name in pair)
    seeds, pipe = [noise_seed(0, f"{a}+{b}", t) for t in TEXTS], None
    yield "half way", blend(pair)
    yield "true renders", scored([true_images(pair, t, 1, seed=1)[0] for t in TEXTS], pair)
    for name in rules(a, b, "right"):
        file = work / f"{a}+{b}" / f"{name.replace(' : ', '-').replace(', ', ' ').replace(' ', '_')}.csv"
        if not file.exists():
            if pipe is None:
                pipe = load_pipeline(TINY_SDXL, "cpu", DTYPE)
                with quietly():
                    for adapter, subject in ((a, pair[0]), (b, pair[1])): pipe.load_subject(work.parent / "subjects" / "dco; varied" / subject, adapter)
            started = time.process_time()
            write_atomically(file, scored(draw(pipe, name, a, b, seeds), pair).to_csv(index=False).encode())
            print(f"{a}+{b}: {name}, {time.process_time() - started:.1f} s", flush=True)
        yield name, pd.read_csv(file)


def means(table):
    "A row for each kind of prompt; `smaller` is the mean over pictures of the smaller of the two identities."
    table = table.assign(smaller=table[IDENTITIES].min(axis=1))
    groups, columns = table.groupby("kind", sort=False), [c for c in ("style", *IDENTITIES, "smaller") if c in table]
    return pd.concat([groups[columns].mean().round(4), groups.size().rename("pictures")], axis=1).reset_index()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    work = parser.parse_args().work / edition()["model"][:8] / "two_subjects"      # see evidence.py
    torch.set_num_threads(1)
    rows = [means(table).assign(pair="+".join(pair), rule=name) for pair in PAIRS for name, table in tables(pair, work)]
    columns = ["pair", "rule", "kind", "style", *IDENTITIES, "smaller", "pictures"]
    record(pd.concat(rows)[columns], "two_subjects", DATA, command="python benchmarks/two_subjects.py", prompts=TEXTS, pairs=len(PAIRS), seeds=1, steps=STEPS, dtype=DTYPE)


if __name__ == "__main__": main()
