"""The evidence: every claim on TinyWorld's held-out subjects, with paired noise and intervals over subjects.

    python benchmarks/evidence.py regimes captions             # teach the subjects, draw, score; see EXPERIMENTS
    python benchmarks/evidence.py all --count                  # only count: trainings, pictures, predictions

With two processes, first both teach, each half of the subjects, and then they share the pictures:

    python benchmarks/evidence.py all --teach 0/2 & python benchmarks/evidence.py all --teach 1/2; wait
    torchrun --nproc_per_node 2 benchmarks/evidence.py all

The programme can be done in parts: `--subjects 0:8` and later, on any machine, `--subjects 8:12` add their rows to the same tables.

Subjects and pictures' scores stay in --work, apart for each model and judge; what the chapters read, a mean for each subject, rule and kind of prompt, goes to
parallel_rescale/data/evidence/<experiment>.csv, and beside it a .json says with which world, model and judge it was made. A run that was
stopped goes on where it ended.
"""
import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from parallel_rescale import (Branch, CFG, ConsistencyGuidance, Focus, FocusedContrast, Guidance, NegativeStyle,
                              OrthogonalOnly, ParallelRescale, PersonalizationGuidance, StyleContrast, TINY_SDXL,
                              evaluate, every, finetune, interval)
from parallel_rescale.evidence.recorded import edition, made, of_another, record, RECORDED
from parallel_rescale.evidence.reports import markdown_table, subject_means
from parallel_rescale.method.consistency import consistency_guidance
from parallel_rescale.evidence.evaluation import load_pipeline
from parallel_rescale.tools.util import quietly
from parallel_rescale.evidence.questions import judge_misses, named_rules, noise_seed, prompt_set, Steered, TRUTHS
from parallel_rescale.evidence.statistics import metrics_of
from parallel_rescale.evidence.scorers import asked_of
from parallel_rescale.evidence.store import image_name, load_scores, throughput
from parallel_rescale.method.registry import label
from parallel_rescale.machine.record import diagnostics
from parallel_rescale.tools.plot import image_grid
from parallel_rescale.method.rivals import APG, AutoLoRA, CFGZero, FrequencyGuidance, PerpNeg, TangentialCFG
from parallel_rescale.method.rivals import WeakLoRA
from parallel_rescale.machine.prompts import base_prompt, subject_prompt
from parallel_rescale.world.judge import judge_stage
from parallel_rescale.world.painter import RECIPES, render_stage
from parallel_rescale.world.pictures import reference_set
from parallel_rescale.world.scenes import SUBJECTS

ROOT = Path(__file__).parents[1]
PART = []    # of the subjects, in the folders' names
DATA = RECORDED
SCORERS = "judge", "oracle", "leak", "shared"
TEXT = 5.0   # ω_text: the least of the paper's, and CFG's own on this model
DTYPE = "bfloat16"   # twice as fast as float32 where the CPU knows it
# Eight of the set `hard`, four photos and four styles, are what every experiment asks: a prompt that names one thing can be failed in one way only. Half of them name
# a place that is no brick wall, so the same eight serve references in one place and in four, and two cells of a table differ in their references alone.
ASKS = [prompt_set("hard")[i] for i in (0, 2, 7, 10, 13, 14, 16, 23)]

# a way of training is one of these, and after a semicolon the references it was trained on ("dco; same place")
LONG = dict(loss="dreambooth", max_train_steps=400)
LOSSES = {"dco": {}, "dreambooth": dict(loss="dreambooth"), "dreambooth 400": LONG, "dreambooth 400, prior": LONG | dict(prior_loss_weight=1.0)}
LENGTHS = {"steps=100": dict(max_train_steps=100), "steps=400": dict(max_train_steps=400), "dreambooth, steps=100": dict(loss="dreambooth", max_train_steps=100)}
SETTINGS = {f"{k}={v:g}": {name: v} for k, name, values in (("beta", "beta", (30., 300., 1000.)), ("rank", "rank", (4, 16)), ("lr", "learning_rate", (5e-4, 2e-3))) for v in values}
WAYS = LOSSES | LENGTHS | SETTINGS
SETS = {"varied": {}, "same place": dict(regime="same place", named=False), "same place, named": dict(regime="same place"),
        "same outfit": dict(regime="same outfit", named=False), "same outfit, named": dict(regime="same outfit")}
ALL = sorted(SUBJECTS, key=lambda n: [m for m in SUBJECTS if SUBJECTS[m].cls == SUBJECTS[n].cls].index(n))     # one of each class, then the second ones
EIGHT, FOUR = ALL[:8], ALL[1:8:2]
SCARVED = [n for n in ALL if n not in ("sunny_the_bird", "inky_the_octopus")][:8]   # on whom the judge sees a borrowed scarf in all four pictures
BOTH = [f"{loss}; {references}" for references in ("same place", "varied") for loss in ("dco", "dreambooth 400")]


def curve(make, *weights): return [make(TEXT, w) for w in weights]


def between(start, stop, value):
    "A scale that is `value` in one part of the steps and 0 in the rest."
    return lambda progress: value if start <= progress < stop else 0.


def regimes():
    "The family and its rivals: a curve of three scales for each rule, of four for the two that the paper compares. Superclass mixing and switching are left out: where no word is trained they are CFG to the digit."
    rules = [CFG(s) for s in (3.0, 5.0, 7.5)] + [PersonalizationGuidance(TEXT, w) for w in (0.75, 0.5, 0.0)]
    rules += curve(ConsistencyGuidance, 1.0, 1.5, 2.0, 4.0) + curve(ParallelRescale, 1.0, 1.5, 2.0, 4.0)
    for make in (OrthogonalOnly, StyleContrast, NegativeStyle, Focus, FocusedContrast): rules += curve(make, 1.0, 2.0, 4.0)
    return {label(r): r for r in rules} | rivals() | {"true renders": "truth"}


def rivals():
    "The rules of other people."
    rules = [make(w) for make in (APG, CFGZero, TangentialCFG) for w in (3.0, 5.0, 7.5)] + [FrequencyGuidance(w, 2 * w) for w in (3.0, 5.0, 7.5)]
    rules += [PerpNeg(w, 0.5) for w in (3.0, 5.0, 7.5)] + [AutoLoRA(TEXT, TEXT, g) for g in (0.4, 0.7, 1.3)]
    return {label(r): r for r in rules} | {f"{label(r)}, across": r for r in (WeakLoRA(w, 0.5, part="across") for w in (3.0, 5.0, 7.5))}


def parts():
    "What each part of parallel rescaling does, and the plain rivals in time."
    weights, name = (1.0, 2.0, 4.0), "parallel rescaling"
    rules = {f"{name} {TEXT:g}/{w:g}, {part}": ParallelRescale(TEXT, w, **options) for part, options in
             (("centre", dict(ratio="center")), ("whole", dict(whole=True)), ("size", dict(ratio="scale"))) for w in weights}
    rules |= {f"consistency {TEXT:g}/{w:g}, late push": ConsistencyGuidance(TEXT, between(1 / 3, 1.1, w)) for w in weights[1:]}
    return rules | {f"consistency {TEXT:g}/{w:g}, interval": interval(ConsistencyGuidance(TEXT, w), .2, .8) for w in weights[:2]}


def captions():
    "What naming the place, or prior preservation, does to the rules."
    rules = [CFG(TEXT), PersonalizationGuidance(TEXT, 0.0), *curve(ConsistencyGuidance, 2.0, 4.0), *curve(ParallelRescale, 2.0, 4.0)]
    return [*rules, *(make(TEXT, 2.0) for make in (StyleContrast, NegativeStyle, FocusedContrast))]


def outfit():
    "A borrowed scarf in every picture: who puts it on again?"
    return [CFG(TEXT), *curve(ConsistencyGuidance, 2.0, 4.0), *curve(ParallelRescale, 2.0, 4.0), OrthogonalOnly(TEXT, 2.0), FocusedContrast(TEXT, 2.0)]


def scales():
    "The paper's grid of ω_text × ω_cons."
    return [make(t, w) for t, w in product((5.0, 7.5, 10.0), (1.5, 3.0, 4.5)) for make in (ConsistencyGuidance, ParallelRescale)]


def when():
    "The subject's push in a part of the steps only."
    parts = {"first third": (0, 1 / 3), "middle third": (1 / 3, 2 / 3), "last third": (2 / 3, 1.1), "first 60 %": (0, .6), "first two thirds": (0, 2 / 3)}
    whole = f"parallel rescaling {TEXT:g}/3"
    return {whole: ParallelRescale(TEXT, 3.0)} | {f"{whole}, push in the {part}": ParallelRescale(TEXT, between(*span, 3.0)) for part, span in parts.items()}


def steered():
    "Universal guidance around rules, by a judge of its own: the one that scores has not been asked."
    rules = {label(r): r for r in (CFG(TEXT), ConsistencyGuidance(TEXT, 2.0), ParallelRescale(TEXT, 2.0), FocusedContrast(TEXT, 2.0))}
    return rules | {f"{name}, second judge {how}": Steered(r, asked_of_the_second, **options) for name, r in rules.items()
                    for how, options in (("forward", dict(forward=10.)), ("backward", dict(backward=3, rate=5.)))}


SECOND = Path("runs/evidence/second judge")     # where it is; main sets it


def asked_of_the_second(prompts): return judge_misses(prompts, SECOND / "judge.safetensors")


def train_second_judge(samples=256_000):
    "A judge that learned from other pictures, from nothing: about twelve minutes on one core."
    if (SECOND / "judge.safetensors").exists(): return
    SECOND.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES["cpu"] | dict(instances=8000, judge_samples=samples)
    judge_stage(SECOND, recipe, *render_stage(SECOND, recipe, seed=4711)[:2], seed=4711)


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
    prompts: list = field(default_factory=lambda: ASKS)
    steps: int = 20
    images: str | None = None   # "webp" keeps the pictures


EXPERIMENTS = {
    "regimes": Experiment(BOTH, ALL, regimes, images="webp"), "parts": Experiment(BOTH, ALL, parts),
    "captions": Experiment(["dco; same place, named", "dreambooth 400; same place, named"], EIGHT, captions),
    "prior": Experiment(["dreambooth 400, prior; same place"], FOUR, captions),
    "outfit": Experiment(["dco; same outfit", "dco; same outfit, named"], SCARVED, outfit),
    "reuse": Experiment(["dco"], ALL, reuse, steps=30), "scales": Experiment(["dco"], EIGHT, scales), "steered": Experiment(["dco; same place"], FOUR, steered), "when": Experiment(["dco"], EIGHT, when),
    "overfit": Experiment(["dco", "dreambooth", "dreambooth 400", *LENGTHS], FOUR, overfit), "settings": Experiment([*SETTINGS], FOUR, overfit)}


def split(way):
    "(how a subject is trained, on which references) of a name such as 'dco; same place'."
    loss, _, references = way.partition("; ")
    return loss, references or "varied"


def home(work, way, name):
    "Where a subject lies that was taught in a way; 'dco' and 'dco; varied' are one."
    return work / "subjects" / "; ".join(split(way)) / name


def results(work, experiment, way):
    "Where the pictures' scores of an experiment lie: another judge, and another part of the subjects, have folders of their own."
    return work / edition()["judge"][:8] / "".join([experiment, *PART]) / way


def references_of(name, way): return reference_set(name, "{subject}", **SETS[split(way)[1]])


def teach(work, ways, names, share=(0, 1)):
    "Fine-tune the subjects in these ways, or every n-th of them; those that are there stay."
    if int(os.environ.get("WORLD_SIZE", 1)) > 1: return                 # several processes would teach one subject together
    for way, name in [*product(ways, names)][share[0]::share[1]]:
        folder = home(work, way, name)
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
    names = list(SUBJECTS)
    return next(n for n in names[names.index(name):] + names if SUBJECTS[n].cls != SUBJECTS[name].cls)


def ratio(work):
    "p at every step of consistency guidance 5/2, and of a direction that holds no subject: what chance gives."
    teach(work, BOTH, list(dict.fromkeys([*ALL, *map(other_class, ALL)])))
    if int(os.environ.get("RANK", 0)): return
    torch.set_num_threads(1)
    frames = []
    for way, name in product(BOTH, ALL):
        with quietly():
            pipe = load_pipeline(TINY_SDXL, "cpu", "float32").load_subject(home(work, way, other_class(name)), name="other")
            pipe.load_subject(home(work, way, name))
        frames.append(watched(pipe, name, ASKS).assign(trained=split(way)[0], regime=split(way)[1], subject=name))
    record(pd.concat(frames), "ratio", DATA, command=command("ratio"), prompts=[p.text for p in ASKS], subjects=len(ALL), seeds=1, steps=20, dtype="float32")


def variants(table):
    "The table with what follows a comma in a rule's name as part of its family: 'consistency 5/2, late push' is a family of its own."
    return table.assign(family=table.family + table.rule.str.partition(", ")[2].map(lambda v: f", {v}" if v else ""))


def command(what): return f"python benchmarks/evidence.py {what}"


def seconds_a_picture(folders):
    "What sampling and scoring took for each picture, summed over workers; a truth costs nothing."
    speeds = list(map(throughput, folders))
    return round(sum(s["sampling"] + s["scoring"] for s in speeds) / sum(s["pictures"] for s in speeds), 3)


def with_those_before(table, experiment, prompts, steps):
    "The table with the rows that other subjects left in the recorded one; ValueError where that was measured otherwise."
    told = made(experiment, DATA)
    if not told or of_another(experiment, DATA): return table
    before = pd.read_csv(DATA / f"{experiment}.csv")
    before = before[~before.subject.isin(table.subject)]
    if len(before) and (told["prompts"] != prompts or told["steps"] != steps): raise ValueError(f"{experiment}: the recorded table asks for other prompts or steps")
    return pd.concat([before, table], ignore_index=True)


def run(work, experiment):
    "Draw and score an experiment; write its means."
    e = EXPERIMENTS[experiment]
    if not e.names: return
    teach(work, e.ways, e.names)
    if experiment == "steered" and int(os.environ.get("WORLD_SIZE", 1)) == 1: train_second_judge()
    rows, folders, rules = [], [results(work, experiment, way) for way in e.ways], e.rules()
    for way, folder in zip(e.ways, folders):
        subjects = {name: (str(home(work, way, name)), references_of(name, way)) for name in e.names}
        table = evaluate(subjects, e.prompts, rules, 1, SCORERS, output=folder, batch_size=20, steps=e.steps, dtype=DTYPE, threads=1, images=e.images)
        rows.append(subject_means(variants(table)).assign(trained=split(way)[0], regime=split(way)[1]))
    if int(os.environ.get("RANK", 0)): return
    table = with_those_before(pd.concat(rows), experiment, [p.text for p in e.prompts], e.steps)
    record(table, experiment, DATA, command=command(experiment), prompts=[p.text for p in e.prompts], subjects=table.subject.nunique(), seeds=1, steps=e.steps, dtype=DTYPE,
           pictures=int(table.pictures.sum()), seconds_a_picture=seconds_a_picture(folders))
    print(experiment, f"{seconds_a_picture(folders)} s a picture")


def counted(experiment):
    "What an experiment asks for: subjects, ways to teach each, pictures, and predictions of the UNet in all steps, in thousands."
    e = EXPERIMENTS[experiment]
    rules = [r for r in named_rules(e.rules()).values() if r.name not in TRUTHS]
    cells = len(e.ways) * len(e.names) * len(e.prompts)
    return dict(experiment=experiment, subjects=len(e.names), ways=len(e.ways), rules=len(rules), pictures=cells * len(rules),
                predictions=f"{cells * e.steps * sum(len(r.branches) for r in rules) / 1000:.0f} k")


WORST = "place", "accessory", "colour", "doing", "companion", "identity"


def failures(work):
    "The worst cells by each of WORST, as the mean over the rules at 5/2: nbs/images/failures.png, and their scores. A red frame: the judge gives it less than one half."
    if int(os.environ.get("RANK", 0)): return
    rows, key, rules = [], ["trained", "subject", "text", "seed"], ["true renders", "CFG 5", "consistency 5/2", "parallel rescaling 5/2", "style contrast 5/2", "focused contrast 5/2"]
    table = pd.concat([load_scores(results(work, "regimes", way)).assign(trained=split(way)[0], folder=str(results(work, "regimes", way))) for way in BOTH[:2]]).query("rule in @rules")
    for metric in WORST:
        low = table[table.family != "truth"].groupby(key)[metric].mean().dropna().sort_values().reset_index().head(1)
        rows.append(table.merge(low.drop(columns=metric), on=key).assign(worst=metric).set_index("rule").loc[rules].reset_index())
    def picture(row): return Image.open(Path(row.folder) / image_name(row.subject, row.rule, row.prompt, row.seed, "webp")).convert("RGB")
    grid, frames = ([[of(row) for row in cell.itertuples()] for cell in rows] for of in (picture, lambda row: "red" if getattr(row, row.worst) < .5 else None))
    labels = [f"{c.worst[0]} ({c.trained[0]}): {c.text[0].replace('{subject}', c.subject[0].split('_')[0].title())}" for c in rows]
    image_grid(grid, labels, rules, title="Where every rule fails: the same noise in each row", scale=2, frames=frames).quantize(256).save(FIGURE)
    columns = ["worst", *key, "rule", "family", "kind", *(m for m in metrics_of(table) if m in table and "photo" not in m)]
    record(pd.concat(rows)[columns].round(3), "failures", DATA, command=command("failures"), rules=rules)


def typical(work):
    "One subject, all prompts, some rules on the same noise: of all subjects the one for whom rescaling changes most nearly what it changes on average. A red frame: something that was asked for the judge gives less than one half."
    if int(os.environ.get("RANK", 0)): return
    way, rules = BOTH[1], ["true renders", "CFG 5", "consistency 5/2", "parallel rescaling 5/2", "style contrast 5/2"]
    folder, table = results(work, "regimes", way), load_scores(results(work, "regimes", way))
    means = table.groupby(["subject", "rule"]).alignment.mean().unstack()
    gaps = means["parallel rescaling 5/2"] - means["consistency 5/2"]
    name = (gaps - gaps.mean()).abs().idxmin()
    photos, grid, frames, labels = references_of(name, way), [], [], []
    for number, text in enumerate(p.text for p in ASKS):
        rows = table[(table.subject == name) & (table.prompt == number)].set_index("rule").loc[rules].reset_index()
        missed = [[a for a in asked_of(text) if getattr(r, a) < .5] for r in rows.itertuples()]
        pictures = [Image.open(folder / image_name(name, r.rule, r.prompt, r.seed, "webp")).convert("RGB") for r in rows.itertuples()]
        grid.append([Image.fromarray(np.asarray(photos[number % 4][0])), *pictures]); frames.append([None, *("#E00000" if m else None for m in missed)])
        labels.append(text.replace("{subject}", f"<{name.split('_')[0]}>"))
    page = image_grid(grid, labels, ["it was shown", "the truth", *rules[1:]], scale=2, smooth=True, text=15, frames=frames,
                      title="One wall, four photographs: in a red frame something asked for is missing").convert("RGB")
    page.resize((820, round(820 * page.height / page.width)), Image.LANCZOS).save(TYPICAL, quality=64, optimize=True)
    print(name, gaps.round(3).to_dict())


FIGURE, TYPICAL = (ROOT / "nbs" / "images" / name for name in ("failures.png", "one_subject.jpg"))
FURTHER = {"ratio": ratio, "failures": failures, "typical": typical}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["all", *EXPERIMENTS, *FURTHER])
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--teach", metavar="K/N", help="only teach the experiments' subjects, and of them every N-th from the K-th on, K from 0")
    parser.add_argument("--count", action="store_true", help="only count what the experiments ask for")
    parser.add_argument("--subjects", metavar="A:B", help="only these of the subjects, counted from 0: a part, which adds its rows to the tables")
    a = parser.parse_args()
    DATA.mkdir(exist_ok=True)
    global SECOND
    SECOND = a.work / "second judge"
    work = a.work / edition()["model"][:8]          # a subject belongs to the model that it was taught on
    chosen = [*EXPERIMENTS, *FURTHER] if "all" in a.what else a.what
    if a.subjects and not re.fullmatch(r"\d+:\d+", a.subjects): parser.error(f"--subjects: expected A:B, such as 0:8, got {a.subjects!r}")
    if a.subjects: only(*map(int, a.subjects.split(":")))
    if a.teach and not re.fullmatch(r"\d+/\d+", a.teach) or a.teach and int(a.teach.split("/")[0]) >= int(a.teach.split("/")[1]):
        parser.error(f"--teach: expected K/N with K from 0 to N − 1, got {a.teach!r}")
    if a.count:
        asked = [what for what in chosen if what in EXPERIMENTS]
        taught = {home(work, way, name) for what in asked for way in EXPERIMENTS[what].ways for name in EXPERIMENTS[what].names}
        print(markdown_table(list(map(counted, asked))) + f"\n\n{len(taught)} subjects to teach, each in one way")
        return
    if a.teach:
        if "steered" in chosen and a.teach.startswith("0/"): train_second_judge()
        for e in (EXPERIMENTS[what] for what in chosen if what in EXPERIMENTS): teach(work, e.ways, e.names, tuple(map(int, a.teach.split("/"))))
        return
    for what in chosen: FURTHER[what](work) if what in FURTHER else run(work, what)


def only(first, last):
    "Cut all experiments down to a part of the subjects."
    chosen = ALL[first:last]
    ALL[:] = chosen; PART[:] = [f" {first} to {last}"]
    EXPERIMENTS.update({name: replace(e, names=[n for n in e.names if n in chosen]) for name, e in EXPERIMENTS.items()})


if __name__ == "__main__": main()
