"""Personalisation on TinyWorld: held-out subjects learned by DCO and by DreamBooth, under every rule, beside true renders.

    python benchmarks/personalization.py            # → benchmarks/personalization.csv

The sweep over fine-tuning settings is the experiment `overfit` of evidence.py. Rows already in the table are not made again, so an interrupted run goes on where it stopped.
"""
import argparse
import csv
import itertools
import json
import tempfile
import time
from pathlib import Path

from parallel_rescale import (CFG, ConsistencyGuidance, ParallelRescale, PersonalizationGuidance, StyleContrast, TINY_SDXL,
                              evaluate, every, finetune)
from parallel_rescale.subject.defaults import recommended
from parallel_rescale.evidence.questions import prompt_set
from parallel_rescale.evidence.recorded import edition
from parallel_rescale.world.captions import PLACE_PHRASES, STYLE_TEMPLATES
from parallel_rescale.world.pictures import reference_set
from parallel_rescale.world.scenes import STYLES, SUBJECTS

HERE = Path(__file__).parent
PLACES = ("city", "night", "snow")   # none of the references was taken there
SETTINGS = ("loss", "beta", "rank", "learning_rate", "max_train_steps", "train_batch_size")
CELLS = [("photo", p) for p in PLACES] + [(s, p) for s in STYLES[1:] for p in PLACES[:2]]
PROMPTS = prompt_set([f"{STYLE_TEMPLATES[s][0].format(a='a {subject}')} {PLACE_PHRASES[p][0]}" for s, p in CELLS])
EDITION = "-".join(digest[:8] for digest in edition().values())   # of model, judge and world
SEEDS = {"photo": 3, "stylised": 1}  # pictures for each prompt


def measure(folder, name, rules, seed):
    "For each rule's label the mean scores under photo and under stylised prompts, with the identity of fresh renders beside the picture's own."
    found = {}
    for kind, n in SEEDS.items():
        with tempfile.TemporaryDirectory() as tmp:
            table = evaluate({name: (folder, name)}, [p for p in PROMPTS if p.kind == kind], ["truth", *rules], range(seed * n, seed * n + n), output=f"{tmp}/grid",
                             steps=25, batch_size=12, progress=False)
        means = table.groupby("rule", sort=False)[["style", "class", "place", "identity"]].mean()
        top = means.loc[table[table.family == "truth"].rule.iloc[0], "identity"]
        for rule, row in means.iterrows():
            found.setdefault(rule, {}).update({f"{kind}_{k}": round(v, 4) for k, v in row.items()} | {f"{kind}_identity_of_truth": round(row["identity"] / top, 4)})
    return found


def run(file, jobs, rules):
    "Measure each (subject, seed, settings) under `rules`; a row a rule."
    old = list(csv.DictReader(file.open())) if file.exists() else []
    done = {row["key"] for row in old}
    if old and old[0].get("edition") != EDITION: raise ValueError(f"{file} is a table of another model, judge or world; move it away")
    for name, seed, settings in jobs:
        key = json.dumps([name, seed, settings], sort_keys=True)
        if key in done: continue
        with tempfile.TemporaryDirectory() as tmp:
            start = time.perf_counter()
            subject = finetune(reference_set(name, "{subject}"), class_noun=SUBJECTS[name].cls, token=f"<{name.split('_')[0]}>", output=f"{tmp}/{name}", seed=seed, **settings)
            seconds, full = time.perf_counter() - start, recommended(TINY_SDXL) | settings
            about = dict(subject=name, seed=seed, **{k: "" if k == "beta" and full["loss"] != "dco" else full[k] for k in SETTINGS})
            rows = [about | dict(rule=rule, seconds=round(seconds, 1), **scores, edition=EDITION, key=key) for rule, scores in measure(subject.folder, name, rules, seed).items()]
        fresh = not file.exists()
        with file.open("a", newline="") as out:
            writer = csv.DictWriter(out, rows[0])
            if fresh: writer.writeheader()
            writer.writerows(rows)
        for row in rows: print({k: v for k, v in row.items() if k != "key"}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", default=None, help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: a file beside this script")
    args = parser.parse_args()
    rules = [CFG(5.0, adapter=0.0), CFG(5.0), PersonalizationGuidance(5.0, 0.0), ConsistencyGuidance(5.0, 2.0), ParallelRescale(5.0, 2.0),
             StyleContrast(5.0, 2.0), every(ParallelRescale(5.0, 2.0), 2)]
    names = args.subjects.split(",") if args.subjects else list(SUBJECTS)[::2]
    file = args.output or HERE / "personalization.csv"
    for job in itertools.product(names, range(args.seeds)):
        run(file, [(*job, dict(loss="dco"))], rules)
        run(file, [(*job, dict(loss="dreambooth"))], [CFG(5.0)])


if __name__ == "__main__": main()
