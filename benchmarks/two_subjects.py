"""Two subjects of one class, asked for in one picture of a world that shows one object: how much of each arrives.

    python benchmarks/evidence.py subjects        # fine-tune them, once
    python benchmarks/two_subjects.py             # draw and score: six minutes on one core

Scores of single pictures stay in --work; what the chapter on several subjects reads, a mean for each pair, rule and kind of prompt, goes to
parallel_rescale/data/evidence/two_subjects.csv. A run that was stopped goes on where it ended.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from parallel_rescale import SeveralSubjects, TINY_SDXL
from parallel_rescale.evidence.evaluation import load_pipeline
from parallel_rescale.tools.util import quietly
from parallel_rescale.evidence.questions import noise_seed, prompt_set, Truth
from parallel_rescale.tools.util import write_atomically
from parallel_rescale.evidence.scorers import References, score
from parallel_rescale.evidence.world_scorers import JudgeScorer
from parallel_rescale.world.tinyworld import BACKGROUNDS, STYLES, SUBJECTS

DATA = Path(__file__).parents[1] / "parallel_rescale" / "data" / "evidence"
PAIRS = [("pixel_the_cat", "midnight_the_cat"), ("bubbles_the_fish", "marlin_the_fish"), ("bolt_the_robot", "fern_the_robot"), ("herbie_the_car", "taxi_the_car")]
PROMPTS, TEXT, WEIGHTS, STEPS = prompt_set("tinyworld20"), 3.0, (1.0, 1.5, 2.0), 20
DTYPE = "bfloat16"   # see evidence.py
IDENTITIES = ["identity_a", "identity_b"]


def rules(a, b):
    "Name → rule, for the adapters of the first and the second subject; ω_cons is the number in the name."
    def make(w, **options): return SeveralSubjects(TEXT, w, (a, b), **options)
    ways = {"sum": dict(ratio="raw"), "rescaled": {}, "each other": dict(against="each other")}
    alone = {f"{name} alone 2": SeveralSubjects(TEXT, 2.0, (one,), ratio="raw") for name, one in (("first", a), ("second", b))}
    shares = {f"sum 2, {s:g} : {t:g}": make(2.0, ratio="raw", shares=(s, t)) for s, t in ((1, .5), (.5, 1))}
    return alone | {f"{name} {w:g}": make(w, **options) for w in WEIGHTS for name, options in ways.items()} | shares


def draw(pipe, rule, seeds):
    "A picture for each prompt; every subject is asked with its own word."
    own = {name: [p.text.replace("{subject}", pipe.subjects[name].token) for p in PROMPTS] for name in rule.subjects}
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(own[rule.subjects[0]], guidance=rule, prompts=own, num_inference_steps=STEPS, generator=generators).images


def scored(images, pair):
    "A row for each picture: style, class, and the identity of both."
    first, second = (score(JudgeScorer(), images, PROMPTS, References(name, SUBJECTS[name].cls)) for name in pair)
    return pd.DataFrame(dict(text=[p.text for p in PROMPTS], kind=[p.kind for p in PROMPTS], style=first["style"], identity_a=first["identity"], identity_b=second["identity"]) | {"class": first["class"]})


def bound(pair):
    "A row for each prompt (in `pictures` these count too): no picture can be closer to both than half way, √((1 + cos)/2) of the angle between the judge's two means."
    def cosine(p):
        asked = np.array([[STYLES.index(p.style), BACKGROUNDS.index(p.background)]] * 64)
        a, b = (JudgeScorer().identities(torch.eye(64), asked, References(name, SUBJECTS[name].cls))["identity"] for name in pair)
        return a @ b
    half_way = [np.sqrt((1 + cosine(p)) / 2) for p in PROMPTS]
    return pd.DataFrame(dict(text=[p.text for p in PROMPTS], kind=[p.kind for p in PROMPTS], identity_a=half_way, identity_b=half_way))


def tables(pair, work):
    "(name, table of single pictures) of everything that is measured for a pair; what is not in `work` yet is drawn."
    a, b = (name.split("_")[0] for name in pair)
    seeds, pipe = [noise_seed(0, f"{a}+{b}", p.text) for p in PROMPTS], None
    yield "half way", bound(pair)
    for which, name in zip(("first", "second"), pair): yield f"{which}, true renders", scored(Truth().generate(name, PROMPTS, seeds), pair)
    for name, rule in rules(a, b).items():
        file = work / f"{a}+{b}" / f"{name.replace(' : ', '-').replace(', ', ' ').replace(' ', '_')}.csv"
        if not file.exists():
            if pipe is None:
                pipe = load_pipeline(TINY_SDXL, "cpu", DTYPE)
                with quietly():
                    for adapter, subject in ((a, pair[0]), (b, pair[1])): pipe.load_subject(work.parent / "subjects" / "dco" / subject, adapter)
            started = time.process_time()
            write_atomically(file, scored(draw(pipe, rule, seeds), pair).to_csv(index=False).encode())
            print(f"{a}+{b}: {name}, {time.process_time() - started:.1f} s", flush=True)
        yield name, pd.read_csv(file)


def means(table):
    "A row for each kind of prompt; `smaller` is the mean over pictures of the smaller of the two identities."
    table = table.assign(smaller=table[IDENTITIES].min(axis=1))
    groups, columns = table.groupby("kind", sort=False), [c for c in ("style", "class", *IDENTITIES, "smaller") if c in table]
    return pd.concat([groups[columns].mean().round(4), groups.size().rename("pictures")], axis=1).reset_index()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    work = parser.parse_args().work / "two_subjects"
    torch.set_num_threads(1)
    rows = [means(table).assign(pair="+".join(pair), rule=name) for pair in PAIRS for name, table in tables(pair, work)]
    DATA.mkdir(parents=True, exist_ok=True)
    columns = ["pair", "rule", "kind", "style", "class", *IDENTITIES, "smaller", "pictures"]
    pd.concat(rows)[columns].to_csv(DATA / "two_subjects.csv", index=False)


if __name__ == "__main__": main()
