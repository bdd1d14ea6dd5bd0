"""The evidence: every claim on TinyWorld's twelve held-out subjects, with paired noise and intervals over subjects.

    python benchmarks/evidence.py subjects                  # fine-tune them: DCO, DreamBooth, DreamBooth with a learned token
    python benchmarks/evidence.py ablation family every     # draw and score; see EXPERIMENTS
    torchrun --nproc_per_node 2 benchmarks/evidence.py all     # two processes share the work

Pictures' scores stay in --work; what the chapters read, a mean for each subject, rule and kind of prompt, goes to
benchmarks/evidence/<experiment>.csv. A run that was stopped goes on where it ended.
"""
import argparse
import os
from pathlib import Path

from parallel_rescale import (AutoGuidance, CFG, ConsistencyGuidance, NegativeStyle, OrthogonalOnly, ParallelRescale, PersonalizationGuidance, StyleContrast,
                              evaluate, every, finetune, interval)
from parallel_rescale.analysis import metrics_of
from parallel_rescale.world import SUBJECTS, reference_set

HERE = Path(__file__).parent
TRAINED = {"dco": dict(loss="dco"), "dreambooth": dict(loss="dreambooth"), "dreambooth_ti": dict(loss="dreambooth", train_text_encoder_ti=True)}


def ablation():
    "What each part of parallel rescaling does, on a curve over ω_cons; the paper's grid of scales; early, middle and late steps."
    text, weights = 3.0, (1.0, 2.0, 3.0, 4.5)
    rules = [ParallelRescale(text, w, ratio=r) for r in ("raw", "center", "scale", "normalize", "none") for w in weights]
    rules += [ParallelRescale(text, w, whole=True) for w in weights]
    rules += [make(t, w) for t in (5.0, 7.5, 10.0) for w in (1.5, 3.0, 4.5) for make in (ConsistencyGuidance, ParallelRescale)]
    return rules + [interval(make(text, 3.0), a / 3, (a + 1) / 3) for a in range(3) for make in (ConsistencyGuidance, ParallelRescale)]


def family():
    "One curve for each rule, over its scales."
    rules = [CFG(s) for s in (1.5, 3.0, 5.0, 7.5)]
    rules += [AutoGuidance(s) for s in (1.5, 2.1, 3.0, 5.0)]
    rules += [PersonalizationGuidance(5.0, w) for w in (0.0, 0.25, 0.5, 0.75)] + [PersonalizationGuidance(s, 0.0) for s in (2.0, 3.0)]
    return rules + [make(5.0, w) for make in (ConsistencyGuidance, ParallelRescale, OrthogonalOnly, StyleContrast, NegativeStyle) for w in (0.5, 1.0, 2.0, 3.0, 4.5)]


def small_family():
    "The same with three settings each, for the subjects that were not trained by DCO."
    rules = [CFG(s) for s in (1.5, 3.0, 5.0)] + [PersonalizationGuidance(5.0, w) for w in (0.0, 0.5)]
    return rules + [make(5.0, w) for make in (ConsistencyGuidance, ParallelRescale, StyleContrast, NegativeStyle) for w in (1.0, 2.0, 3.0)]


def reuse():
    "How far the directions can be reused."
    return [ParallelRescale(5.0, 2.0)] + [every(ParallelRescale(5.0, 2.0), k) for k in (2, 3, 4, 6, 10)]


EXPERIMENTS = {"every": ("dco", reuse), "family": ("dco", family), "ablation": ("dco", ablation),
               "family_dreambooth": ("dreambooth", small_family), "family_dreambooth_ti": ("dreambooth_ti", small_family)}


def train(work, names):
    "Fine-tune every subject in every way; those that are there stay."
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for way, name in [(w, n) for w in TRAINED for n in names][rank::processes]:
        folder = work / "subjects" / way / name
        if (folder / "subject.json").exists(): continue
        finetune(reference_set(name, "{subject}"), class_noun=SUBJECTS[name].cls, token=f"<{name.split('_')[0]}>", output=folder, overwrite=True, **TRAINED[way])


def run(work, names, experiment, seeds):
    "Draw and score an experiment; write its means."
    way, rules = EXPERIMENTS[experiment]
    subjects = {name: (str(work / "subjects" / way / name), name) for name in names}
    table = evaluate(subjects, "tinyworld20", ["truth", *rules()], seeds, ("judge", "oracle", "leak"), output=work / experiment, batch_size=20)
    means = table.groupby(["subject", "rule", "family", "kind"], sort=False)[metrics_of(table)].mean().round(5)
    means["pictures"] = table.groupby(["subject", "rule", "family", "kind"], sort=False).size()
    if int(os.environ.get("RANK", 0)) == 0: means.to_csv(HERE / "evidence" / f"{experiment}.csv")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["all", "subjects", *EXPERIMENTS])
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="names, separated by commas")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    a = parser.parse_args()
    names = a.subjects.split(",")
    (HERE / "evidence").mkdir(exist_ok=True)
    for what in ["subjects", *EXPERIMENTS] if "all" in a.what else a.what:
        train(a.work, names) if what == "subjects" else run(a.work, names, what, a.seeds)


if __name__ == "__main__": main()
