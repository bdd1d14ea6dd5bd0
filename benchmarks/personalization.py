"""Personalisation on TinyWorld: a sweep over the fine-tuning settings, and the held-out subjects under every rule.

    python benchmarks/personalization.py sweep      # → benchmarks/personalization_sweep.csv
    python benchmarks/personalization.py subjects   # → benchmarks/personalization.csv

Rows already in the table are not made again, so an interrupted run goes on where it stopped.
"""
import argparse
import csv
import itertools
import json
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from parallel_rescale import (CFG, ConsistencyGuidance, OrthogonalOnly, ParallelRescale, PersonalizationGuidance, SubjectPipeline, TINY_SDXL,
                              finetune)
from parallel_rescale.dco import recommended
from parallel_rescale.judge import judge_images, load_judge
from parallel_rescale.world import CLASSES, STYLES, SUBJECTS, caption, random_pose, reference_set, render

HERE = Path(__file__).parent
PLACES = ("city", "night", "snow")   # none of the references was taken there
SETTINGS = ("loss", "beta", "rank", "learning_rate", "max_train_steps", "train_batch_size")


@lru_cache(maxsize=None)
def truth(name, style, place, n=12):
    "Identity embeddings of `n` fresh renders of a subject [n, 64]."
    rng = np.random.default_rng([7, list(SUBJECTS).index(name), STYLES.index(style)])
    pictures = [render(SUBJECTS[name], style, place, random_pose(rng), seed=int(rng.integers(1 << 30))) for _ in range(n)]
    return judge_images(load_judge(), pictures)["identity"]


def identity(name, style, place, embeddings):
    "Cosine of each embedding with the mean one of fresh renders."
    return embeddings @ F.normalize(truth(name, style, place).mean(0), dim=0)


def ceiling(name, style, place):
    "What a fresh render scores against the mean of the others."
    own = truth(name, style, place)
    others = F.normalize((own.sum(0) - own), dim=1)
    return (own * others).sum(1).mean().item()


def scores(name, labels, pictures):
    "Means over the pictures of one prompt kind: style probability, shares of right class, identity, and identity over its ceiling."
    answers = judge_images(load_judge(), pictures)
    style = answers["style"].softmax(1)[range(len(labels)), [STYLES.index(s) for s, _ in labels]]
    right = (answers["cls"].argmax(1) == CLASSES.index(SUBJECTS[name].cls)).float()
    own = torch.cat([identity(name, s, p, e[None]) for (s, p), e in zip(labels, answers["identity"])])
    top = np.mean([ceiling(name, s, p) for s, p in labels])
    return dict(style=style.mean().item(), cls=right.mean().item(), identity=own.mean().item(), identity_of_ceiling=own.mean().item() / float(top))


def paint(pipe, prompts, rule, seed, steps=25):
    latents = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))   # the same noise for every rule
    return pipe(prompts, guidance=rule, latents=latents, num_inference_steps=steps, output_type="pt").images * 2 - 1


def measure(pipe, name, rule, seed=0, per_style=2):
    "Scores under photo prompts and under stylised prompts."
    token = pipe.subject.token
    kinds = dict(photo=[("photo", p) for p in PLACES for _ in range(4)], stylised=[(s, p) for s in STYLES[1:] for p in PLACES[:per_style]])
    out = {}
    for kind, labels in kinds.items():
        pictures = paint(pipe, [caption(token, s, p) for s, p in labels], rule, seed)
        out |= {f"{kind}_{k}": round(v, 4) for k, v in scores(name, labels, pictures).items()}
    return out


def personalise(name, folder, seed, settings):
    "Fine-tune on the subject's four references; (subject, seconds)."
    token = f"<{name.split('_')[0]}>"
    start = time.perf_counter()
    subject = finetune(reference_set(name, "{subject}"), class_noun=SUBJECTS[name].cls, token=token, output=folder, seed=seed, **settings)
    return subject, time.perf_counter() - start


def rows_of(file):
    return list(csv.DictReader(file.open())) if file.exists() else []


def append(file, row):
    fresh = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, row.keys())
        if fresh: writer.writeheader()
        writer.writerow(row)


def run(file, jobs, rules):
    "Measure each (subject, seed, settings) under `rules`; a row a rule."
    done = {row["key"] for row in rows_of(file)}
    for name, seed, settings in jobs:
        key = json.dumps([name, seed, settings], sort_keys=True)
        if key in done: continue
        with tempfile.TemporaryDirectory() as tmp:
            subject, seconds = personalise(name, f"{tmp}/{name}", seed, settings)
            pipe = SubjectPipeline.from_pretrained(TINY_SDXL, torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            pipe.load_subject(subject.folder)
            full = recommended(TINY_SDXL) | settings
            for rule in rules:
                row = dict(subject=name, seed=seed, **{k: full.get(k, "") for k in SETTINGS}, rule=rule.label, seconds=round(seconds, 1),
                           **measure(pipe, name, rule, seed), key=key)
                append(file, row)
                print({k: v for k, v in row.items() if k != "key"}, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "subjects"])
    parser.add_argument("--subjects", default=None, help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    names = args.subjects.split(",") if args.subjects else list(SUBJECTS)
    if args.what == "sweep":
        middle = dict(rank=8, learning_rate=1e-3, max_train_steps=200)
        grid = [dict(middle, loss="dco", beta=b, max_train_steps=n) for b, n in itertools.product((100.0, 300.0), (100, 200, 400))]
        grid += [dict(middle, loss="dreambooth", max_train_steps=n) for n in (100, 200, 400)]
        grid += [dict(middle, loss="dco", beta=100.0, **change) for change in (dict(rank=4), dict(rank=16), dict(learning_rate=5e-4), dict(learning_rate=2e-3))]
        grid += [dict(middle, loss="dco", beta=1000.0)]
        names = names if args.subjects else ["inky_the_octopus", "bolt_the_robot"]
        run(HERE / "personalization_sweep.csv", [(n, s, g) for g in grid for n in names for s in range(args.seeds)], [CFG(5.0)])
    else:
        rules = [CFG(5.0, adapter=0.0), CFG(5.0), PersonalizationGuidance(5.0, 0.0), ConsistencyGuidance(5.0, 2.0), ParallelRescale(5.0, 2.0),
                 OrthogonalOnly(5.0, 2.0)]
        names = names if args.subjects else list(SUBJECTS)[::2]
        jobs = [(n, s) for n in names for s in range(args.seeds)]
        for job in jobs:
            run(HERE / "personalization.csv", [(*job, dict(loss="dco"))], rules)
            run(HERE / "personalization.csv", [(*job, dict(loss="dreambooth"))], [CFG(5.0)])


if __name__ == "__main__":
    main()
