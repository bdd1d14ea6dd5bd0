"""The evidence: every claim on TinyWorld's held-out subjects, with paired noise and intervals over subjects.

    python benchmarks/evidence.py regimes captions             # teach the subjects, draw, score; see EXPERIMENTS

With two processes, first both teach, each half of the subjects, and then they share the pictures:

    python benchmarks/evidence.py all --teach 0/2 & python benchmarks/evidence.py all --teach 1/2; wait
    torchrun --nproc_per_node 2 benchmarks/evidence.py all

Pictures' scores stay in --work; what the chapters read, a mean for each subject, rule and kind of prompt, goes to
parallel_rescale/data/evidence/<experiment>.csv. A run that was stopped goes on where it ended.
"""
import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from parallel_rescale import (AutoGuidance, Branch, CFG, ConsistencyGuidance, Focus, FocusedContrast, Guidance,
                              NegativeStyle, OrthogonalOnly, OwnWords, ParallelRescale, PersonalizationGuidance,
                              StyleContrast, TextFloor, TINY_SDXL, evaluate, every, finetune, interval)
from parallel_rescale.evidence.reports import subject_means
from parallel_rescale.method.consistency import consistency_guidance
from parallel_rescale.evidence.evaluation import load_pipeline
from parallel_rescale.tools.util import quietly
from parallel_rescale.evidence.questions import noise_seed, prompt_set, Steered
from parallel_rescale.evidence.store import load_scores, image_name, throughput
from parallel_rescale.method.registry import label
from parallel_rescale.machine.record import diagnostics
from parallel_rescale.tools.plot import image_grid
from parallel_rescale.method.rivals import APG, AutoLoRA, CFGZero, FrequencyGuidance, PerpNeg, TangentialCFG
from parallel_rescale.method.rivals import WeakLoRA
from parallel_rescale.machine.prompts import base_prompt, subject_prompt
from parallel_rescale.world.tinyworld import SUBJECTS, reference_set

ROOT = Path(__file__).parents[1]
DATA = ROOT / "parallel_rescale" / "data" / "evidence"
SCORERS = "judge", "oracle", "leak", "shared"
TEXT = 3.0   # ω_text
DTYPE = "bfloat16"   # half again as fast as float32 where the CPU knows it; 38 means over two subjects differed by .004 at most

# a way of training is one of these, and after a semicolon the references it was trained on ("dco; same place")
LONG = dict(loss="dreambooth", max_train_steps=400)
LOSSES = {"dco": {}, "dreambooth": dict(loss="dreambooth"), "dreambooth 400": LONG, "dreambooth 400, prior": LONG | dict(prior_loss_weight=1.0)}
LENGTHS = {f"{name}steps={n}": more | dict(max_train_steps=n) for name, more in (("", {}), ("dreambooth, ", dict(loss="dreambooth"))) for n in (100, 400)}
SETTINGS = {f"{k}={v:g}": {name: v} for k, name, values in (("beta", "beta", (30., 300., 1000.)), ("rank", "rank", (4, 16)), ("lr", "learning_rate", (5e-4, 2e-3))) for v in values}
WAYS = LOSSES | LENGTHS | SETTINGS
SETS = {"varied": {}, "same place": dict(regime="same place", named=False), "same place, named": dict(regime="same place"),
        "same outfit": dict(regime="same outfit", named=False), "same outfit, named": dict(regime="same outfit")}
ALL = list(SUBJECTS)
EIGHT, FOUR = [n for i, n in enumerate(ALL) if i % 3], ALL[1::3]
HATLESS = [n for n in ALL if SUBJECTS[n].accessory != "hat" and n != "inky_the_octopus"]   # on whom the judge sees a borrowed hat
BOTH = [f"{loss}; {references}" for references in ("same place", "varied") for loss in ("dco", "dreambooth 400")]


def curve(make, *weights): return [make(TEXT, w) for w in weights]


def between(start, stop, value):
    "A scale that is `value` in one part of the steps and 0 in the rest."
    return lambda progress: value if start <= progress < stop else 0.


def regimes():
    "The family: a curve for each rule over its scales, on references in four places and in one."
    rules = [CFG(s) for s in (1.5, 3.0, 5.0)] + [PersonalizationGuidance(TEXT, w) for w in (0.75, 0.5, 0.0)]
    rules += curve(ConsistencyGuidance, 1.0, 1.5, 2.0, 4.0) + curve(ParallelRescale, 1.0, 1.5, 2.0, 4.0)
    for make in (OrthogonalOnly, StyleContrast, NegativeStyle, Focus, FocusedContrast): rules += curve(make, 1.0, 2.0, 4.0)
    return {label(r): r for r in rules} | {"true renders": "truth"}


def parts():
    "What each part of parallel rescaling does, the plain rivals in time, and designs that did not do well before."
    weights, name = (1.0, 2.0, 4.0), "parallel rescaling"
    rules = {f"{name} {TEXT:g}/{w:g}, {part}": ParallelRescale(TEXT, w, **options) for part, options in
             (("centre", dict(ratio="center")), ("whole", dict(whole=True)), ("size", dict(ratio="scale"))) for w in weights}
    rules |= {f"consistency {TEXT:g}/{w:g}, late push": ConsistencyGuidance(TEXT, between(1 / 3, 1.1, w)) for w in weights}
    rules |= {f"consistency {TEXT:g}/{w:g}, interval": interval(ConsistencyGuidance(TEXT, w), .2, .8) for w in (1.0, 2.0)}
    rules["negative style 3/2, a quarter"] = NegativeStyle(TEXT, 2.0, .25)
    return rules | {label(r): r for r in (TextFloor(TEXT, 4.0), OwnWords(TEXT, 2.0), AutoGuidance(2.1))}


def rivals():
    "The rules of other people. Superclass mixing and switching are left out: where no word is trained they are CFG to the digit."
    rules = [make(w) for make in (APG, CFGZero, TangentialCFG) for w in (1.5, 3.0)] + [FrequencyGuidance(w, 2 * w) for w in (1.5, 3.0)]
    rules += [PerpNeg(w, 0.5) for w in (1.5, 3.0)] + [AutoLoRA(TEXT, TEXT, g) for g in (0.7, 1.3)]
    return {label(r): r for r in rules} | {f"{label(r)}, across": r for r in (WeakLoRA(w, 0.5, part="across") for w in (1.5, 3.0))}


def captions():
    "What naming the place, or prior preservation, does to the rules."
    rules = [CFG(3.0), PersonalizationGuidance(TEXT, 0.0), *curve(ConsistencyGuidance, 1.0, 2.0, 4.0), *curve(ParallelRescale, 2.0, 4.0)]
    return [*rules, *(make(TEXT, 2.0) for make in (StyleContrast, NegativeStyle, FocusedContrast))]


def outfit():
    "A borrowed hat in every picture: who puts it on again?"
    return [CFG(3.0), *curve(ConsistencyGuidance, 2.0, 4.0), *curve(ParallelRescale, 2.0, 4.0), OrthogonalOnly(TEXT, 2.0), FocusedContrast(TEXT, 2.0)]


def scales():
    "ω_text × ω_cons: the paper's grid, and a weaker text."
    grid = [*product((2.0,), (1.0, 2.0, 3.0)), *product((5.0, 7.5, 10.0), (1.5, 3.0, 4.5))]
    return [make(t, w) for t, w in grid for make in (ConsistencyGuidance, ParallelRescale)]


def when():
    "The subject's push, and guidance as a whole, in a part of the steps only."
    makes = {"consistency": ConsistencyGuidance, "parallel rescaling": ParallelRescale}
    parts = {"first third": (0, 1 / 3), "middle third": (1 / 3, 2 / 3), "last third": (2 / 3, 1.1), "first 60 %": (0, .6), "first two thirds": (0, 2 / 3)}
    rules = {f"{name} 3/3": make(TEXT, 3.0) for name, make in makes.items()}
    rules |= {f"{name} 3/3, push in the {part}": make(TEXT, between(*span, 3.0)) for part, span in parts.items() for name, make in makes.items()}
    return rules | {f"{name} 3/3, guidance in the {part}": interval(make(TEXT, 3.0), parts[part][0], min(parts[part][1], 1)) for part in list(parts)[:3] for name, make in makes.items()}


def steered():
    "Universal guidance by the judge around rules: how far it can be talked into style and place, and what of the subject is left. Its own scores of these are no evidence."
    rules = {label(r): r for r in (CFG(3.0), ConsistencyGuidance(TEXT, 2.0), ParallelRescale(TEXT, 2.0))}
    return rules | {f"{name}, judge {how}": Steered(r, **options) for name, r in rules.items()
                    for how, options in (("forward", dict(forward=10.)), ("backward", dict(backward=3, rate=5.)))}


def reuse():
    "How far the directions can be reused."
    return [ParallelRescale(TEXT, 2.0)] + [every(ParallelRescale(TEXT, 2.0), k) for k in (2, 3, 4, 6, 10)]


def overfit():
    "How the rules part as the fine-tune over-fits."
    return [CFG(5.0), ConsistencyGuidance(TEXT, 2.0), ParallelRescale(TEXT, 2.0)]


@dataclass(frozen=True)
class Experiment:
    "Which subjects, trained how, are drawn by which rules."
    ways: list
    names: list
    rules: Callable
    prompts: str = "places"
    steps: int = 20
    images: str | None = None   # "webp" keeps the pictures


EXPERIMENTS = {
    "regimes": Experiment(BOTH, ALL, regimes, images="webp"),
    "rivals": Experiment(BOTH, ALL, rivals),
    "captions": Experiment(["dco; same place, named", "dreambooth 400; same place, named", "dreambooth 400, prior; same place"], ALL, captions),
    "parts": Experiment(BOTH, ALL, parts),
    "outfit": Experiment(["dco; same outfit"], HATLESS, outfit), "steered": Experiment(["dco; same place"], FOUR, steered),
    "reuse": Experiment(["dco"], ALL, reuse, "tinyworld20", 30), "scales": Experiment(["dco"], EIGHT, scales, "tinyworld20"),
    "when": Experiment(["dco"], EIGHT, when, "tinyworld20"), "overfit": Experiment(["dco", "dreambooth", *LENGTHS], FOUR, overfit, "tinyworld20"),
    "settings": Experiment([*SETTINGS], FOUR, overfit, "tinyworld20")}


def split(way):
    "(how a subject is trained, on which references) of a name such as 'dco; same place'."
    loss, _, references = way.partition("; ")
    return loss, references or "varied"


def references_of(name, way): return reference_set(name, "{subject}", **SETS[split(way)[1]])


def teach(work, ways, names, share=(0, 1)):
    "Fine-tune the subjects in these ways, or every n-th of them; those that are there stay."
    if int(os.environ.get("WORLD_SIZE", 1)) > 1: return                 # several processes would teach one subject together
    for way, name in [*product(ways, names)][share[0]::share[1]]:
        folder = work / "subjects" / way / name
        if not (folder / "subject.json").exists():
            finetune(references_of(name, way), class_noun=SUBJECTS[name].cls, token=f"<{name.split('_')[0]}>", output=folder, overwrite=True, **WAYS[split(way)[0]])


@dataclass(frozen=True, repr=False)
class _Watch(Guidance):
    "Consistency guidance that notes what g_cons is made of, beside a direction that holds no subject: an adapter that learned a thing of another class, asked for the class."
    name, title, anchor = "watch", "consistency, watched", 1
    text: float = TEXT
    consistency: float = 2.0
    seen: list = field(default_factory=list)

    @property
    def branches(self): return Branch("null"), Branch("base"), Branch("subject", "subject"), Branch("base", "other")

    def combine(self, null, base, subject, other):
        self.seen.extend([("subject", diagnostics(null, base, subject)), ("another class", diagnostics(null, base, other))])
        return consistency_guidance(null, base, subject, self.text, self.consistency)


def watched(pipe, case, prompts):
    "A row for each step, direction and kind of prompt: means over pictures of p, its spread, the cosine and the sizes."
    name, token, noun = case, pipe.subjects["subject"].token, pipe.subjects["subject"].class_noun
    rule = _Watch()
    pipe([subject_prompt(p.text, token) for p in prompts], base_prompt=[base_prompt(p.text, noun) for p in prompts], guidance=rule, num_inference_steps=20,
         generator=[torch.Generator().manual_seed(noise_seed(0, name, p.text)) for p in prompts], output_type="latent")
    rows = [dict(step=i // 2, direction=direction, kind=p.kind, p_mean=d["p"]["mean"][b], p_std=d["p"]["std"][b],
                 cosine=d["cosine"][b], norm_text=d["norm_text"][b], norm_cons=d["norm_cons"][b],
                 parallel_share=(d["norm_parallel"][b] / d["norm_cons"][b]) ** 2,                # of the squared length
                 p_whole=d["cosine"][b] * d["norm_cons"][b] / d["norm_text"][b])                 # one p for the whole latent
            for i, (direction, d) in enumerate(rule.seen) for b, p in enumerate(prompts)]
    groups = pd.DataFrame(rows).groupby(["kind", "direction", "step"], sort=False)
    return groups.mean().round(3).assign(pictures=groups.size()).reset_index()


def other_class(name):
    "The next subject in the list that is of another class."
    return next(n for n in ALL[ALL.index(name):] + ALL if SUBJECTS[n].cls != SUBJECTS[name].cls)


def ratio(work):
    "Consistency_p at every step of consistency guidance 3/2, and of a direction that holds no subject: what chance gives."
    teach(work, BOTH, ALL)
    if int(os.environ.get("RANK", 0)): return
    torch.set_num_threads(1)
    frames = []
    for way, name in product(BOTH, ALL):
        with quietly():
            pipe = load_pipeline(TINY_SDXL, "cpu", "float32").load_subject(work / "subjects" / way / other_class(name), name="other")
            pipe.load_subject(work / "subjects" / way / name)
        frames.append(watched(pipe, name, prompt_set("places")).assign(trained=split(way)[0], regime=split(way)[1], subject=name))
    pd.concat(frames).to_csv(DATA / "ratio.csv", index=False)


def variants(table):
    "The table with what follows a comma in a rule's name as part of its family: 'consistency 3/2, late push' is a family of its own."
    return table.assign(family=table.family + table.rule.str.partition(", ")[2].map(lambda v: f", {v}" if v else ""))


def run(work, experiment):
    "Draw and score an experiment; write its means."
    e = EXPERIMENTS[experiment]
    teach(work, e.ways, e.names)
    rows, made = [], e.rules()
    for way in e.ways:
        subjects = {name: (str(work / "subjects" / way / name), references_of(name, way)) for name in e.names}
        table = evaluate(subjects, e.prompts, made, 1, SCORERS, output=work / experiment / way, batch_size=20, steps=e.steps, dtype=DTYPE, threads=1, images=e.images)
        rows.append(subject_means(variants(table)).assign(trained=split(way)[0], regime=split(way)[1]))
    if int(os.environ.get("RANK", 0)) == 0:
        pd.concat(rows).to_csv(DATA / f"{experiment}.csv", index=False)
        print(experiment, throughput(work / experiment / e.ways[-1]))


def failures(work):
    "The worst cells by each score, as the mean over the rules at 3/2: nbs/images/failures.png, and their scores."
    if int(os.environ.get("RANK", 0)): return
    rows, key, rules = [], ["subject", "text", "seed"], ["true renders", "CFG 3", "consistency 3/2", "parallel rescaling 3/2", "style contrast 3/2", "focused contrast 3/2"]
    for way in BOTH[:2]:
        table = load_scores(work / "regimes" / way).query("rule in @rules")
        drawn = table[table.family != "truth"].groupby(key)
        for metric in ("background", "style", "identity"):
            low = drawn[metric].mean().sort_values().reset_index().head(1)
            rows.append(table.merge(low.drop(columns=metric), on=key).assign(worst=metric, trained=split(way)[0], folder=str(work / "regimes" / way)))
    def picture(row): return Image.open(Path(row.folder) / image_name(row.subject, row.rule, row.prompt, row.seed, "webp")).convert("RGB")
    grid = [[picture(row) for rule in rules for row in cell[cell.rule == rule].itertuples()] for cell in rows]
    labels = [f"least {c.worst.iloc[0].replace('background', 'place')} ({c.trained.iloc[0]}): {c.text.iloc[0].replace('a {subject}', c.subject.iloc[0].split('_')[0].title())}" for c in rows]
    image_grid(grid, labels, rules, title="Where every rule fails: the same noise in each row", scale=2, smooth=True).quantize(256).save(ROOT / "nbs" / "images" / "failures.png")
    pd.concat(rows)[["worst", *key, "trained", "rule", "family", "kind", "style", "background", "class", "identity"]].round(3).to_csv(DATA / "failures.csv", index=False)


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
        for e in (EXPERIMENTS[what] for what in chosen if what in EXPERIMENTS): teach(a.work, e.ways, e.names, tuple(map(int, a.teach.split("/"))))
        return
    for what in chosen: FURTHER[what](a.work) if what in FURTHER else run(a.work, what)


if __name__ == "__main__": main()
