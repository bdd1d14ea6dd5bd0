"""The evidence: every claim on TinyWorld's held-out subjects, with paired noise and intervals over subjects.

    python benchmarks/evidence.py regimes captions             # teach the subjects, draw, score; see EXPERIMENTS
    python benchmarks/evidence.py all --count                  # only count: trainings, pictures, predictions
    python benchmarks/evidence.py all --teach                  # only teach the subjects

The work is cut into cells: one subject, taught in one way, in one experiment. The same command may run several times at once, on one machine or,
with the folders of finished cells brought together, on several: each process takes the next cell that nobody has; with --reverse from the other end.
A run that was stopped goes on where it ended.

Subjects, scores and pictures stay in --work, apart for each model and judge; what the chapters read, a mean for each subject, rule and kind of prompt, goes to
parallel_rescale/data/evidence/<experiment>.csv as soon as a subject's cells are complete, and beside it a .json says with which world, model and judge it was made.
"""
import argparse
import fcntl
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from parallel_rescale.tools.util import computes_bf16, default_device, quietly, write_atomically
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
DATA = RECORDED
SCORERS = "judge", "oracle", "leak", "shared"
TEXT = 5.0   # ω_text: the least of the paper's, and CFG's own on this model
DTYPE = "bfloat16" if computes_bf16(default_device()) else "float32"   # twice as fast where the machine knows it, else many times slower
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


SECOND = ROOT / "runs" / "second judge"


def asked_of_the_second(prompts): return judge_misses(prompts, SECOND / "judge.safetensors")


def train_second_judge(samples=256_000):
    "A judge that learned from other pictures, from nothing: about twelve minutes on one core."
    with locked(SECOND.with_name("second judge.lock"), wait=True):      # one process trains it, the others wait for it
        if (SECOND / "judge.safetensors").exists(): return
        part = SECOND.with_name("second judge, in training")            # where a run that was stopped goes on
        part.mkdir(parents=True, exist_ok=True)
        recipe = RECIPES["cpu"] | dict(instances=8000, judge_samples=samples)
        judge_stage(part, recipe, *render_stage(part, recipe, seed=4711)[:2], seed=4711)
        SECOND.mkdir(exist_ok=True)
        (part / "judge.safetensors").rename(SECOND / "judge.safetensors")


def reuse():
    "How far the directions can be reused."
    return [ParallelRescale(TEXT, 2.0)] + [every(ParallelRescale(TEXT, 2.0), k) for k in (2, 3, 4, 6, 10)]


def overfit():
    "How the rules part as the fine-tune over-fits."
    return [CFG(5.0), ConsistencyGuidance(TEXT, 2.0), ParallelRescale(TEXT, 2.0)]


def split(way):
    "(how a subject is trained, on which references) of a name such as 'dco; same place'."
    loss, _, references = way.partition("; ")
    return loss, references or "varied"


def home(work, way, name):
    "Where a subject lies that was taught in a way; 'dco' and 'dco; varied' are one."
    return work / "subjects" / "; ".join(split(way)) / name


def cell(work, experiment, way, name):
    "Where the scores of one subject, taught in one way, lie in an experiment; another judge has folders of its own."
    return work / edition()["judge"][:8] / experiment / way / name


def references_of(name, way): return reference_set(name, "{subject}", **SETS[split(way)[1]])


@contextmanager
def locked(file, wait=False):
    "True where no other process holds `file`, or, with `wait`, as soon as none does; else False."
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lock:
        try: fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError: yield False; return
        yield True


def teach(work, way, name, wait=True):
    "Fine-tune a subject in this way, if it is not there; another process that is about it is waited for, or left alone."
    folder = home(work, way, name)
    with locked(folder.with_name(f"{name}.lock"), wait) as mine:
        if mine and not (folder / "subject.json").exists():
            finetune(references_of(name, way), class_noun=SUBJECTS[name].cls, token=f"<{name.split('_')[0]}>", output=folder, overwrite=True, **WAYS[split(way)[0]])
    return folder


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


def ratio_rows(work, experiment, way, name):
    "p at every step of consistency guidance 5/2, and of a direction that holds no subject: what chance gives."
    folders = {"other": teach(work, way, other_class(name)), "subject": teach(work, way, name)}
    with quietly():
        pipe = load_pipeline(TINY_SDXL, default_device(), "float32").load_subject(folders["other"], name="other")
        pipe.load_subject(folders["subject"])
    return watched(pipe, name, ASKS).assign(subject=name)


def variants(table):
    "The table with what follows a comma in a rule's name as part of its family: 'consistency 5/2, late push' is a family of its own."
    return table.assign(family=table.family + table.rule.str.partition(", ")[2].map(lambda v: f", {v}" if v else ""))


def mean_rows(work, experiment, way, name):
    "Pictures of one subject by all rules on all prompts: their mean scores by rule and kind of prompt."
    e = EXPERIMENTS[experiment]
    case = str(teach(work, way, name)), references_of(name, way)
    if experiment == "steered": train_second_judge()
    table = evaluate({name: case}, e.prompts, e.rules(), 1, SCORERS, output=cell(work, experiment, way, name), batch_size=20, steps=e.steps, dtype=DTYPE, threads=1, images=e.images)
    return subject_means(variants(table))


@dataclass(frozen=True)
class Experiment:
    "Which subjects, trained how, are drawn by which rules, and what is noted of a cell."
    ways: list
    names: list
    rules: Callable
    prompts: list = field(default_factory=lambda: ASKS)
    steps: int = 20
    images: str | None = None   # "webp" keeps the pictures
    rows: Callable = mean_rows


EXPERIMENTS = {
    "regimes": Experiment(BOTH, ALL, regimes, images="webp"), "parts": Experiment(BOTH, ALL, parts),
    "ratio": Experiment(BOTH, ALL, lambda: [_Watch()], rows=ratio_rows),
    "reuse": Experiment(["dco"], ALL, reuse, steps=30), "scales": Experiment(["dco"], EIGHT, scales), "when": Experiment(["dco"], EIGHT, when),
    "captions": Experiment(["dco; same place, named", "dreambooth 400; same place, named"], EIGHT, captions),
    "prior": Experiment(["dreambooth 400, prior; same place"], FOUR, captions),
    "outfit": Experiment(["dco; same outfit", "dco; same outfit, named"], SCARVED, outfit),
    "steered": Experiment(["dco; same place"], FOUR, steered),
    "overfit": Experiment(["dco", "dreambooth", "dreambooth 400", *LENGTHS], FOUR, overfit), "settings": Experiment([*SETTINGS], FOUR, overfit)}


def cells(chosen):
    "(experiment, way, subject) of all that the experiments ask for; cells that need the same taught subject follow each other."
    asked = [(what, way, name) for what in chosen for way in EXPERIMENTS[what].ways for name in EXPERIMENTS[what].names]
    taught = list(dict.fromkeys((split(way), name) for _, way, name in asked))
    return sorted(asked, key=lambda c: taught.index((split(c[1]), c[2])))


ROWS = "means.csv"     # of a finished cell


def fill(work, experiment, way, name):
    "Do a cell, unless it is done or another process is about it."
    folder = cell(work, experiment, way, name)
    with locked(folder.with_name(f"{name}.lock")) as mine:
        if not mine or (folder / ROWS).exists(): return
        rows = EXPERIMENTS[experiment].rows(work, experiment, way, name).assign(trained=split(way)[0], regime=split(way)[1])
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ROWS, rows.to_csv(index=False).encode())


def command(what): return f"python benchmarks/evidence.py {what}"


def cost(folders):
    "On which devices, and in which precision, the pictures of these cells were made, and what sampling and scoring one took there; a truth costs nothing."
    by_device = {}
    for folder in folders:
        told = json.loads((folder / "manifest.json").read_text())
        by_device.setdefault(f"{told['device']}, {told['dtype']}", []).append(throughput(folder))
    return {device: dict(cells=len(found), seconds_a_picture=round(sum(s["sampling"] + s["scoring"] for s in found) / sum(s["pictures"] for s in found), 3))
            for device, found in by_device.items()}


def kept(experiment, others):
    "Rows of the recorded table, and how they were made, of subjects that are not among `others`; none where the table is of another edition."
    told = made(experiment, DATA)
    if not told or of_another(experiment, DATA): return pd.DataFrame(), {}
    table = pd.read_csv(DATA / f"{experiment}.csv").query("subject not in @others")
    return table, dict(kept={k: told[k] for k in ("commit", "date", "dtype", "made_on", "kept") if k in told} | dict(subjects=table.subject.nunique())) if len(table) else {}


def tabulate(work, experiment):
    "Record the means of all subjects whose cells are complete; other subjects that the recorded table has stay in it."
    e = EXPERIMENTS[experiment]
    complete = [name for name in e.names if all((cell(work, experiment, way, name) / ROWS).exists() for way in e.ways)]
    print(f"{experiment}: {len(complete)} of {len(e.names)} subjects")
    if not complete: return
    folders = [cell(work, experiment, way, name) for way in e.ways for name in complete]
    before, told = kept(experiment, complete)
    table = pd.concat([before, *(pd.read_csv(folder / ROWS) for folder in folders)])
    told |= dict(pictures=int(table.pictures.sum()), made_on=cost(folders)) if e.rows is mean_rows else dict(dtype="float32")
    record(table, experiment, DATA, command=command(experiment), prompts=[p.text for p in e.prompts], subjects=table.subject.nunique(), seeds=1, steps=e.steps, **told)


def counted(experiment):
    "What an experiment asks for: subjects, ways to teach each, pictures, and predictions of the UNet in all steps, in thousands."
    e = EXPERIMENTS[experiment]
    rules = [r for r in named_rules(e.rules()).values() if r.name not in TRUTHS]
    cells = len(e.ways) * len(e.names) * len(e.prompts)
    return dict(experiment=experiment, subjects=len(e.names), ways=len(e.ways), rules=len(rules), pictures=cells * len(rules),
                predictions=f"{cells * e.steps * sum(len(r.branches) for r in rules) / 1000:.0f} k")


def scores_of(work, experiment, way):
    "All pictures' scores of an experiment's finished cells, and in which `folder` a picture is."
    folders = [cell(work, experiment, way, name) for name in EXPERIMENTS[experiment].names]
    return pd.concat([load_scores(folder).assign(folder=str(folder)) for folder in folders if (folder / ROWS).exists()], ignore_index=True)


WORST = "place", "accessory", "colour", "doing", "companion", "identity"


def failures(work):
    "The worst cells by each of WORST, as the mean over the rules at 5/2: nbs/images/failures.png, and their scores. A red frame: the judge gives it less than one half."
    rows, key, rules = [], ["trained", "subject", "text", "seed"], ["true renders", "CFG 5", "consistency 5/2", "parallel rescaling 5/2", "style contrast 5/2", "focused contrast 5/2"]
    table = pd.concat([scores_of(work, "regimes", way).assign(trained=split(way)[0]) for way in BOTH[:2]]).query("rule in @rules")
    for metric in WORST:
        low = table[table.family != "truth"].groupby(key)[metric].mean().dropna().sort_values().reset_index().head(1)
        rows.append(table.merge(low.drop(columns=metric), on=key).assign(worst=metric).set_index("rule").loc[rules].reset_index())
    def picture(row): return Image.open(Path(row.folder) / image_name(row.subject, row.rule, row.prompt, row.seed, "webp")).convert("RGB")
    grid, frames = ([[of(row) for row in cell.itertuples()] for cell in rows] for of in (picture, lambda row: "red" if getattr(row, row.worst) < .5 else None))
    labels = [f"{c.worst[0]} ({c.trained[0]}): {c.text[0].replace('{subject}', c.subject[0].split('_')[0].title())}" for c in rows]
    image_grid(grid, labels, rules, title="The worst picture by each score: the same noise in each row", scale=2, frames=frames).quantize(256).save(FIGURE)
    columns = ["worst", *key, "rule", "family", "kind", *(m for m in metrics_of(table) if m in table and "photo" not in m)]
    record(pd.concat(rows)[columns].round(3), "failures", DATA, command=command("failures"), rules=rules)


def typical(work):
    "One subject, all prompts, some rules on the same noise: of all subjects the one for whom rescaling changes most nearly what it changes on average. A red frame: something that was asked for the judge gives less than one half."
    way, rules = BOTH[1], ["true renders", "CFG 5", "consistency 5/2", "parallel rescaling 5/2", "style contrast 5/2"]
    table = scores_of(work, "regimes", way)
    means = table.groupby(["subject", "rule"]).alignment.mean().unstack()
    gaps = means["parallel rescaling 5/2"] - means["consistency 5/2"]
    name = (gaps - gaps.mean()).abs().idxmin()
    photos, grid, frames, labels = references_of(name, way), [], [], []
    for number, text in enumerate(p.text for p in ASKS):
        rows = table[(table.subject == name) & (table.prompt == number)].set_index("rule").loc[rules].reset_index()
        missed = [[a for a in asked_of(text) if getattr(r, a) < .5] for r in rows.itertuples()]
        pictures = [Image.open(Path(r.folder) / image_name(name, r.rule, r.prompt, r.seed, "webp")).convert("RGB") for r in rows.itertuples()]
        grid.append([Image.fromarray(np.asarray(photos[number % 4][0])), *pictures]); frames.append([None, *("#E00000" if m else None for m in missed)])
        labels.append(text.replace("{subject}", f"<{name.split('_')[0]}>"))
    page = image_grid(grid, labels, ["it was shown", "the truth", *rules[1:]], scale=2, smooth=True, text=15, frames=frames,
                      title="One wall, four photographs: in a red frame something asked for is missing").convert("RGB")
    page.resize((820, round(820 * page.height / page.width)), Image.LANCZOS).save(TYPICAL, quality=64, optimize=True)
    print(name, gaps.round(3).to_dict())


FIGURE, TYPICAL = (ROOT / "nbs" / "images" / name for name in ("failures.png", "one_subject.jpg"))
FURTHER = {"failures": failures, "typical": typical}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["all", *EXPERIMENTS, *FURTHER])
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--teach", action="store_true", help="only teach the experiments' subjects")
    parser.add_argument("--count", action="store_true", help="only count what the experiments ask for")
    parser.add_argument("--reverse", action="store_true", help="begin with the last cell")
    a = parser.parse_args()
    work = a.work / edition()["model"][:8]          # a subject belongs to the model that it was taught on
    chosen = [*EXPERIMENTS, *FURTHER] if "all" in a.what else a.what
    todo = cells([what for what in chosen if what in EXPERIMENTS])
    if a.reverse: todo.reverse()
    if a.count: print(markdown_table([counted(what) for what in chosen if what in EXPERIMENTS]) + f"\n\n{len({home(work, *c[1:]) for c in todo})} subjects to teach, each in one way")
    elif a.teach:
        for _, way, name in todo: teach(work, way, name, wait=False)
    else:
        torch.set_num_threads(1)
        for c in todo: fill(work, *c)
        for what in chosen: FURTHER[what](work) if what in FURTHER else tabulate(work, what)


if __name__ == "__main__": main()
