"""The reproduction's cells in the case that no test machine has, SDXL on a GPU: from a folder of photographs to the table, with small models in the large ones' places."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from parallel_rescale.evidence.questions import prompt_set
from parallel_rescale.subject import previews
from parallel_rescale.tools.embedded import TINY_SDXL

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "tutorials" / "reproduction.ipynb"
DRAWN = dict(steps=1, batch_size=4, seeds=1)
TAUGHT = dict(max_train_steps=1)


def photograph(path, size, seed, **kwargs):
    "A JPEG that is neither square nor small, as photographs are."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, **kwargs)


@pytest.fixture
def photographs(tmp_path):
    "A folder as google/dreambooth's: subfolders of photographs, and files beside them."
    root = tmp_path / "dataset"
    lying = Image.Exif(); lying[0x0112] = 6                    # a phone's note that the picture has to be turned
    for seed, name in enumerate(("dog6", "backpack", "grey_sloth_plushie")):
        photograph(root / name / "00.jpg", (320, 200), seed)
        photograph(root / name / "01.JPG", (200, 320), seed, exif=lying)
    (root / "prompts_and_classes.txt").write_text("…")
    (root / "references_and_licenses.txt").write_text("…")
    return root


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    "A tiny CLIP and DINOv2 of random weights."
    import transformers as t
    root, small = tmp_path_factory.mktemp("encoders"), dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    tokenizer = t.CLIPTokenizer.from_pretrained(TINY_SDXL, subfolder="tokenizer")
    text = dict(**small, intermediate_size=37, vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    processor = t.CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    torch.manual_seed(0)
    models = dict(clip=t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=dict(**small, intermediate_size=37, image_size=32, patch_size=8), projection_dim=16)),
                  dino=t.Dinov2Model(t.Dinov2Config(**small, image_size=32, patch_size=8)))
    for name, model in models.items():
        for part in (model, processor, tokenizer): part.save_pretrained(root / name)
    return tuple(f"{name}:{root / name}" for name in models)


def run_cells(monkeypatch, folder, photographs, scorers, until=None):
    "What the notebook's names stand for after its cells have run as they would with a GPU, up to the cell that holds `until`."
    import matplotlib
    matplotlib.use("Agg")
    for name, value in dict(SDXL=TINY_SDXL, DREAMBOOTH=str(photographs)).items(): monkeypatch.setitem(os.environ, name, value)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(previews, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(previews, "SAMPLE_PROMPTS", previews.SAMPLE_PROMPTS[:1])
    sources = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    asked = "REAL = bool(SDXL) and torch.cuda.is_available()"
    assert sum(asked in source for source in sources) == 1
    known = {}
    for source in sources:
        if source.startswith(("#| eval: false", "%%exercise")): continue
        exec(source.replace(asked, "REAL = True").replace("\nnotebook_style()", ""), known)
        if "drawing, training =" in source: known.update(scorers=scorers, drawing=DRAWN, training=TAUGHT)
        if "\ngroups =" in source: known.update(whole=known["lists"], lists={k: prompts[:2] for k, prompts in known["lists"].items()})
        if until and until in source: break
    return known


def test_from_photographs_to_the_table(monkeypatch, tmp_path, photographs, encoders):
    found = run_cells(monkeypatch, tmp_path, photographs, encoders)
    assert list(found["album"]) == ["backpack", "dog6", "grey_sloth_plushie"]
    assert {r.image.size for references in found["album"].values() for r in references} == {(64, 64)}
    assert found["groups"] == dict(stylised=list(found["album"]), live=["dog6"], object=["backpack", "grey_sloth_plushie"])
    assert {k: [p.text for p in prompts] for k, prompts in found["whole"].items()} == {
        k: [p.text for p in prompt_set(name)] for k, name in dict(stylised="stylised", live="dreambench_live", object="dreambench_object").items()}
    table = found["table"]
    assert (found["text"], found["identity"]) == ("clip_text", "dino") and table[["clip_text", "clip_score", "clip_image", "dino"]].notna().all(axis=None)
    assert table.groupby(["subject", "kind"]).size().eq(8).all() and table.groupby(["subject", "text", "seed"]).noise.nunique().eq(1).all()
    assert set(found["gaps"].verdict) == {"", "too few subjects"} and "SDXL" in found["WHO"]
    assert not list(Path("runs").rglob("checkpoint-*")) and json.loads(Path("runs/reproduction/subjects/grey_sloth_plushie/subject.json").read_text())["class_noun"] == "stuffed animal"
    drawn = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.json")}
    run_cells(monkeypatch, tmp_path, photographs, encoders, until="load_scores(*")
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.json")} == drawn          # done stays done


def test_what_is_missing_is_said_before_anything_is_loaded(monkeypatch, tmp_path, photographs, encoders):
    with pytest.raises(ValueError, match="there is no folder .*git clone https://github.com/google/dreambooth"): run_cells(monkeypatch, tmp_path, tmp_path / "nowhere", encoders)
    with pytest.raises(ValueError, match="hf download"): run_cells(monkeypatch, tmp_path, photographs, ("clip:./nowhere",))
    photograph(photographs / "aunt_emma" / "00.jpg", (80, 60), 0)
    with pytest.raises(ValueError, match="no class noun is known for aunt_emma"): run_cells(monkeypatch, tmp_path, photographs, encoders)
    assert not (tmp_path / "runs").exists()
