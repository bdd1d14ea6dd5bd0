"""The evidence: every claim on TinyWorld's held-out subjects, with paired noise and intervals over subjects.

    python benchmarks/evidence.py family ablation              # teach the subjects, draw, score; see EXPERIMENTS

With two processes, first both teach, each half of the subjects, and then they share the pictures:

    python benchmarks/evidence.py all --teach 0/2 & python benchmarks/evidence.py all --teach 1/2; wait
    torchrun --nproc_per_node 2 benchmarks/evidence.py all

Pictures' scores stay in --work; what the chapters read, a mean for each subject, rule and kind of prompt, goes to
parallel_rescale/data/evidence/<experiment>.csv. A run that was stopped goes on where it ended.
"""
import argparse
import os
import re
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from parallel_rescale import (AutoGuidance, CFG, ConsistencyGuidance, Focus, FocusedContrast, NegativeStyle, OrthogonalOnly, OwnWords, ParallelRescale, PersonalizationGuidance, Record, StyleContrast, TextFloor, TINY_SDXL,
                              evaluate, every, finetune, interval)
from parallel_rescale.analysis import subject_means
from parallel_rescale.evaluate import load_pipeline, quietly
from parallel_rescale.grid import load_scores, noise_seed, picture_name, prompt_set, throughput
from parallel_rescale.guidance import label
from parallel_rescale.plot import image_grid
from parallel_rescale.subject_folder import base_prompt, subject_prompt
from parallel_rescale.world import SUBJECTS, reference_set

ROOT = Path(__file__).parents[1]
DATA = ROOT / "parallel_rescale" / "data" / "evidence"
SCORERS = "judge", "oracle", "leak"
TEXT, WEIGHTS = 3.0, (0.5, 1.0, 1.5, 2.0, 3.0)
DTYPE = "bfloat16"   # half again as fast as float32 where the CPU knows it; 38 means over two subjects differed by .004 at most
THREE = {"dco": {}, "dreambooth": dict(loss="dreambooth"), "dreambooth_ti": dict(loss="dreambooth", train_text_encoder_ti=True)}
LENGTHS = {f"{name}steps={n}": more | dict(max_train_steps=n) for name, more in (("", {}), ("dreambooth, ", dict(loss="dreambooth"))) for n in (100, 400)}
SETTINGS = {f"{k}={v:g}": {name: v} for k, name, values in (("beta", "beta", (30., 300., 1000.)), ("rank", "rank", (4, 16)), ("lr", "learning_rate", (5e-4, 2e-3))) for v in values}
WAYS = THREE | LENGTHS | SETTINGS
DEVELOPED_ON = "inky_the_octopus", "bubbles_the_fish", "pixel_the_cat"   # the judgement of `designs` leaves them out
ALL, EIGHT, FOUR = list(SUBJECTS), [n for i, n in enumerate(SUBJECTS) if i % 3], list(SUBJECTS)[1::3]


def family():
    "One curve for each rule over its scales, five settings each."
    rules = [CFG(s) for s in (1.5, 2.0, 3.0, 5.0, 7.5)] + [AutoGuidance(s) for s in (1.5, 2.1, 3.0, 5.0, 7.5)]
    rules += [PersonalizationGuidance(TEXT, w) for w in (0.75, 0.5, 0.25, 0.0)] + [PersonalizationGuidance(5.0, 0.0)]
    curves = ConsistencyGuidance, ParallelRescale, OrthogonalOnly, StyleContrast, NegativeStyle, TextFloor, OwnWords
    return rules + [make(TEXT, w) for make in curves for w in WEIGHTS]


def small_family():
    "Three settings each, for the subjects that were not trained by DCO."
    rules = [CFG(s) for s in (1.5, 3.0, 5.0)] + [PersonalizationGuidance(TEXT, w) for w in (0.75, 0.5, 0.25)]
    return rules + [make(TEXT, w) for make in (ConsistencyGuidance, ParallelRescale, StyleContrast, Focus, FocusedContrast) for w in (1.0, 1.5, 3.0)]


def designs():
    "The rules of this project that came after a look at the subjects DEVELOPED_ON."
    rules = [make(TEXT, w) for make in (Focus, FocusedContrast, partial(NegativeStyle, amount=.25)) for w in WEIGHTS]
    return {label(r): r for r in rules} | {f"style contrast {TEXT:g}/{w:g}, per location": StyleContrast(TEXT, w, whole=False) for w in WEIGHTS}


def ablation():
    "Each half of parallel rescaling alone, and over the whole latent; the other parts are rules of `family`."
    return [ParallelRescale(TEXT, w, ratio=r) for r in ("center", "scale") for w in WEIGHTS] + [ParallelRescale(TEXT, w, whole=True) for w in WEIGHTS]


def parts():
    "The same with the three weights of `small_family`."
    return [rule for rule in ablation() if rule.consistency in (1.0, 1.5, 3.0)] + [OrthogonalOnly(TEXT, w) for w in (1.0, 1.5, 3.0)]


def scales():
    "ω_text × ω_cons: the paper's grid, and a weaker text; ω_text = 3 is in `family`."
    grid = [*product((2.0,), (1.0, 2.0, 3.0)), *product((5.0, 7.5, 10.0), (1.5, 3.0, 4.5))]
    return [make(t, w) for t, w in grid for make in (ConsistencyGuidance, ParallelRescale)]


def between(start, stop, value):
    "A scale that is `value` in one part of the steps and 0 in the rest."
    return lambda progress: value if start <= progress < stop else 0.


def when():
    "The subject's push, and guidance as a whole, in a part of the steps only."
    makes = {"consistency": ConsistencyGuidance, "parallel rescaling": ParallelRescale}
    parts = {"first third": (0, 1 / 3), "middle third": (1 / 3, 2 / 3), "last third": (2 / 3, 1.1), "first 60 %": (0, .6), "first two thirds": (0, 2 / 3)}
    rules = {f"{name} 3/3": make(TEXT, 3.0) for name, make in makes.items()}
    rules |= {f"{name} 3/3, push in the {part}": make(TEXT, between(*span, 3.0)) for part, span in parts.items() for name, make in makes.items()}
    return rules | {f"{name} 3/3, guidance in the {part}": interval(make(TEXT, 3.0), parts[part][0], min(parts[part][1], 1)) for part in list(parts)[:3] for name, make in makes.items()}


def reuse():
    "How far the directions can be reused."
    return [ParallelRescale(TEXT, 2.0)] + [every(ParallelRescale(TEXT, 2.0), k) for k in (2, 3, 4, 6, 10)]


def overfit():
    "How the rules part as the fine-tune over-fits."
    return [CFG(5.0), ConsistencyGuidance(TEXT, 2.0), ParallelRescale(TEXT, 2.0)]


def benchmark():
    "Six rules at one setting each: TinyWorld's benchmark."
    return [CFG(5.0), PersonalizationGuidance(TEXT, 0.5), ConsistencyGuidance(TEXT, 2.0), ParallelRescale(TEXT, 2.0), Focus(TEXT, 2.0), FocusedContrast(TEXT, 2.0)]


# name → (ways of training, subjects, rules, seeds, steps)
EXPERIMENTS = {"family": (["dco"], ALL, family, 1, 20), "designs": (["dco"], ALL, designs, 1, 20), "ablation": (["dco"], ALL, ablation, 1, 20), "reuse": (["dco"], ALL, reuse, 1, 30),
               "trained": (["dreambooth", "dreambooth_ti"], EIGHT, small_family, 1, 20), "parts": (["dreambooth"], EIGHT, parts, 1, 20), "scales": (["dco"], EIGHT, scales, 1, 20),
               "when": (["dco"], EIGHT, when, 1, 20), "overfit": (["dco", "dreambooth", *LENGTHS], FOUR, overfit, 1, 20),
               "settings": ([*SETTINGS], FOUR, overfit, 1, 20),
               "benchmark": (["dco"], ALL, benchmark, 4, 30)}


def teach(work, ways, names, share=(0, 1)):
    "Fine-tune the subjects in these ways, or every n-th of them; those that are there stay."
    if int(os.environ.get("WORLD_SIZE", 1)) > 1: return                 # several processes would teach one subject together
    for way, name in [*product(ways, names)][share[0]::share[1]]:
        folder = work / "subjects" / way / name
        if not (folder / "subject.json").exists():
            finetune(reference_set(name, "{subject}"), class_noun=SUBJECTS[name].cls, token=f"<{name.split('_')[0]}>", output=folder, overwrite=True, **WAYS[way])


def ratio(work):
    "Consistency_p, and the sizes of the directions, at every step of consistency guidance 3/2; a row for each way of training, subject, kind of prompt and step."
    teach(work, THREE, EIGHT)
    if int(os.environ.get("RANK", 0)): return
    torch.set_num_threads(1)
    prompts, frames = prompt_set("tinyworld20"), []
    for way, name in product(THREE, EIGHT):
        with quietly(): pipe = load_pipeline(TINY_SDXL, "cpu", "float32").load_subject(work / "subjects" / way / name)
        record, (token, noun) = Record(), (pipe.subject.token, pipe.subject.class_noun)
        pipe([subject_prompt(p.text, token) for p in prompts], base_prompt=[base_prompt(p.text, noun) for p in prompts], guidance=ConsistencyGuidance(TEXT, 2.0), num_inference_steps=20,
             generator=[torch.Generator().manual_seed(noise_seed(0, name, p.text)) for p in prompts], output_type="latent", record=record)
        rows = pd.DataFrame(record.rows())
        rows["kind"] = [prompts[i].kind for i in rows["sample"]]
        rows["parallel_share"] = (rows.norm_parallel / rows.norm_cons) ** 2                      # of the squared length of g_cons
        groups = rows.drop(columns="sample").groupby(["kind", "step"], sort=False)
        frames.append(groups.mean().round(4).assign(pictures=groups.size()).reset_index().assign(trained=way, subject=name))
    pd.concat(frames).to_csv(DATA / "ratio.csv", index=False)


def run(work, experiment):
    "Draw and score an experiment; write its means."
    ways, names, rules, seeds, steps = EXPERIMENTS[experiment]
    teach(work, ways, names)
    rows = []
    for way in ways:
        subjects = {name: (str(work / "subjects" / way / name), name) for name in names}
        rules_ = rules() if isinstance(rules(), dict) else ["truth", *rules()]
        keep = "webp" if experiment == "benchmark" else None
        rows.append(subject_means(evaluate(subjects, "tinyworld20", rules_, seeds, SCORERS, output=work / experiment / way, batch_size=20, steps=steps, dtype=DTYPE, threads=1, images=keep)).assign(trained=way))
    if int(os.environ.get("RANK", 0)) == 0:
        pd.concat(rows).to_csv(DATA / f"{experiment}.csv", index=False)
        print(experiment, throughput(work / experiment / ways[-1]))


def failures(work):
    "The benchmark's worst cells by each score, as the mean over its rules: nbs/images/failures.png, and their scores."
    if int(os.environ.get("RANK", 0)): return
    folder = work / "benchmark" / "dco"
    table = load_scores(folder).query("kind == 'stylised'")
    key, rules, rows = ["subject", "text", "seed"], list(table.rule.unique()), []
    drawn = table[table.family != "truth"].groupby(key)
    for metric in ("style", "class", "identity"):
        low = drawn[metric].mean().sort_values().reset_index().drop_duplicates("subject").head(2)      # two subjects for each score
        rows += [cell.assign(worst=metric) for _, cell in low.drop(columns=metric).iterrows() for cell in [table.merge(cell.to_frame().T, on=key)]]
    def picture(row): return Image.open(folder / picture_name(row.subject, row.rule, row.prompt, row.seed, "webp")).convert("RGB")
    grid = [[picture(row) for rule in rules for row in cell[cell.rule == rule].itertuples()] for cell in rows]
    labels = [f"least {cell.worst.iloc[0]}: {cell.text.iloc[0].replace('a {subject}', cell.subject.iloc[0].split('_')[0].title())}" for cell in rows]
    image_grid(grid, labels, rules, title="Where every rule fails: the same noise in each row", scale=2).quantize(128).save(ROOT / "nbs" / "images" / "failures.png")
    pd.concat(rows)[["worst", *key, "rule", "family", "kind", "style", "class", "identity"]].round(3).to_csv(DATA / "failures.csv", index=False)


FURTHER = {"ratio": ratio, "failures": failures}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["all", *EXPERIMENTS, *FURTHER])
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--teach", metavar="K/N", help="only teach the experiments' subjects, and of them every N-th from the K-th on, K from 0")
    a = parser.parse_args()
    DATA.mkdir(exist_ok=True)
    chosen = [*EXPERIMENTS, *FURTHER] if "all" in a.what else a.what
    if a.teach and not re.fullmatch(r"\d+/\d+", a.teach) or a.teach and int(a.teach.split("/")[0]) >= int(a.teach.split("/")[1]):
        parser.error(f"--teach: expected K/N with K from 0 to N − 1, got {a.teach!r}")
    if a.teach:
        for ways, names, *_ in (EXPERIMENTS[what] for what in chosen if what in EXPERIMENTS): teach(a.work, ways, names, tuple(map(int, a.teach.split("/"))))
        return
    for what in chosen: FURTHER[what](a.work) if what in FURTHER else run(a.work, what)


if __name__ == "__main__": main()
