"""What the embedded model and its judge are worth: measures training/score.json and writes the figures on the model's card.

python benchmarks/tiny_sdxl.py N [HELD]    # N random prompts, and HELD (default: N) with pairs that training never showed: about 2 s each on one core
python benchmarks/tiny_sdxl.py 0           # only the card's figures, from training/score.json
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCORE, CARD = ROOT / "training" / "score.json", ROOT / "parallel_rescale" / "tiny_sdxl" / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/tiny_sdxl.py -->\n", "<!-- end of figures -->\n"


def measure(n, held=None, renders=1200):
    "Scores of the embedded model on n random prompts and on `held` with held-out pairs, and of its judge on fresh renders."
    from parallel_rescale.tools.embedded import load_tiny_sdxl
    from parallel_rescale.world.judge import judge_report, load_judge
    from parallel_rescale.world.model import score_model
    from parallel_rescale.world.pictures import render_dataset
    pipe, judge, fresh = load_tiny_sdxl(), load_judge(), render_dataset(renders // 4, 4, seed=92)
    trained = json.loads((ROOT / "training" / "log.json").read_text())[-1]
    return dict(samples=trained["samples"], hours=trained["hours"], random=score_model(pipe, judge, n=n),
                held_out=score_model(pipe, judge, n=held or n, held=True), judged_renders=renders,
                judge=judge_report(judge, fresh["images"], fresh["labels"]))


def percent(value): return "" if value is None else f"{100 * value:.1f}"


def lines(score):
    "The card's figures as Markdown."
    found, judge = score["random"], score["judge"]
    columns = [found[f"{who}, {which}"] for which in ("one", "two") for who in ("model", "truth")]
    names = [*judge, "alignment"]
    rows = [[name.replace("cls", "class"), *(percent(c.get(name)) for c in columns)] for name in names]
    held = [score["held_out"][f"{who}, one"]["alignment"] for who in ("model", "truth")]
    sure = ", ".join(f"{name.replace('cls', 'class')} {percent(r['accuracy'])} ({percent(r['calibration_error'])})"
                     for name, r in judge.items())
    return "\n".join([
        f"On {found['n']:,} prompts drawn at random (CFG 5, 30 steps, seed 0), in percent: how probable the judge finds what was asked, in the",
        "model's picture and in a true render of the same scene, where there is one subject and where there are two.", "",
        "| asked for | one: model | render | two: model | render |", "| --- | ---: | ---: | ---: | ---: |",
        *("| " + " | ".join(row) + " |" for row in rows), "",
        f"Fréchet distance in the judge's features to as many fresh renders: {found['frechet']:.3f}, where two sets of renders are",
        f"{found['floor']:.3f} apart (both fall with the number of pictures). On {score['held_out']['n']:,} prompts with a pair of attributes that no training",
        f"picture showed, where they have one subject: alignment {percent(held[0])}, true renders {percent(held[1])}.", "",
        f"The judge itself on {score['judged_renders']:,} fresh renders, right in percent (expected calibration error): {sure}.", ""])


def write_card(score):
    text = CARD.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    CARD.write_text(before + BEGIN + lines(score) + END + after, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3): sys.exit(__doc__)
    if n := int(sys.argv[1]): SCORE.write_text(json.dumps(measure(n, *map(int, sys.argv[2:])), indent=1) + "\n", encoding="utf-8")
    write_card(json.loads(SCORE.read_text(encoding="utf-8")))
