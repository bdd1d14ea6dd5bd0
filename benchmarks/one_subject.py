"""One subject, seen: a cat photographed before one wall, eight prompts, five rules on the same noise.

    python benchmarks/one_subject.py     # about four minutes on a CPU → one_subject.csv, ../nbs/images/one_subject.jpg

A look before the evidence (evidence.py), and no part of it: one subject proves nothing about the rules.
"""
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from parallel_rescale import CFG, ConsistencyGuidance, finetune, FocusedContrast, ParallelRescale, PersonalizationGuidance
from parallel_rescale.evidence.scorers import Prompt, References, score
from parallel_rescale.evidence.world_scorers import ASKED, JudgeScorer, true_images
from parallel_rescale.tools.plot import image_grid
from parallel_rescale.use.pictures import pipeline_of
from parallel_rescale.world.pictures import reference_set

NAME, TOKEN = "pixel_the_cat", "<pixel>"
PROMPTS = ("a photo of a {subject} on the beach", "a photo of a {subject} wearing a hat", "a photo of a {subject} wearing a crown in the city",
           "a photo of a blue {subject}", "a photo of a {subject} asleep in the snow", "a photo of a {subject} upside down at night",
           "a watercolor painting of a {subject} wearing a crown", "a neon sign of a blue {subject}")
RULES = CFG(5.), PersonalizationGuidance(5., .5), ConsistencyGuidance(5., 2.), ParallelRescale(5., 2.), FocusedContrast(5., 2.)
SEEDS, STEPS = 2, 20
HERE = Path(__file__).parent


def drawn(pipe, rule, seed):
    noise = [torch.Generator().manual_seed(1000 + i + 100 * seed) for i in range(len(PROMPTS))]
    return pipe([p.replace("{subject}", TOKEN) for p in PROMPTS], guidance=rule, num_inference_steps=STEPS, generator=noise).images


def main():
    references = [(Image.fromarray(np.asarray(image)), text) for image, text in reference_set(NAME, "{subject}", "same place", named=False)]
    who = References(NAME, "cat", tuple(image for image, _ in references))
    with tempfile.TemporaryDirectory() as folder:
        pipe = pipeline_of(finetune(references, class_noun="cat", token=TOKEN, output=folder, seed=0, overwrite=True).folder)
        pictures = {rule.label: [image for seed in range(SEEDS) for image in drawn(pipe, rule, seed)] for rule in RULES}
    truth = [Image.fromarray(true_images(NAME, prompt, 1)[0]) for prompt in PROMPTS]
    tables = {rule: pd.DataFrame(score(JudgeScorer(), images, [Prompt(p) for p in PROMPTS * (len(images) // len(PROMPTS))], who))
              for rule, images in dict(pictures, **{"true renders": truth}).items()}
    pd.concat([t.mean().to_frame(rule).T for rule, t in tables.items()]).dropna(axis=1).round(3).rename_axis("rule").to_csv(HERE / "one_subject.csv")
    missed = {rule: t[[a for a in ASKED if a in t]].min(axis=1) < .5 for rule, t in tables.items()}
    grid = [[references[i % 4][0], truth[i], *(images[i] for images in pictures.values())] for i in range(len(PROMPTS))]
    frames = [[None, None, *("#E00000" if missed[rule][i] else None for rule in pictures)] for i in range(len(PROMPTS))]
    page = image_grid(grid, [p.replace("{subject}", TOKEN) for p in PROMPTS], ["it was shown", "the truth", *pictures], scale=2, smooth=True, text=15, frames=frames,
                      title="One wall, four photographs: in a red frame something asked for is missing").convert("RGB")
    page.resize((820, round(820 * page.height / page.width)), Image.LANCZOS).save(HERE.parent / "nbs" / "images" / "one_subject.jpg", quality=72, optimize=True)


if __name__ == "__main__": main()
