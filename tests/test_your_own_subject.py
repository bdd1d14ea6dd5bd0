"""The tour's cells as Colab with a GPU would run them: files uploaded, taught, gone on with, taken away. The embedded model stands in SDXL's place."""
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from parallel_rescale.machine.saved_subject import Subject
from parallel_rescale.subject import previews
from parallel_rescale.subject.checkpoints import training_log
from parallel_rescale.tools.embedded import TINY_SDXL

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "tutorials" / "your_own_subject.ipynb"
# what a GPU and the network would be needed for, and what would take long
IN_PLACE = {'DEVICE == "cuda" and bool(COLAB or PHOTOS)': "True", "torch.float16 if REAL": "torch.float32 if REAL",
            '"stabilityai/stable-diffusion-xl-base-1.0", "dog"': f'"{TINY_SDXL}", "cat"', 'variant="fp16", checkpointing_steps=100': "checkpointing_steps=1",
            'Path("runs/rex"), 500': 'Path("runs/rex"), 2', "num_inference_steps=30": "num_inference_steps=2"}


def photograph(size, seed, **kwargs):
    "The bytes of a JPEG."
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=95, **kwargs)
    return file.getvalue()


@pytest.fixture
def colab(monkeypatch):
    "A stand-in for google.colab; what was downloaded."
    lying = Image.Exif(); lying[0x0112] = 6
    colab, files, got = ModuleType("google.colab"), ModuleType("google.colab.files"), []
    files.upload = lambda: {"a.jpg": photograph((320, 200), 0), "b.JPG": photograph((200, 320), 1, exif=lying), "c.jpg": photograph((900, 200), 2),
                            "d.jpg": photograph((200, 210), 3), "again.jpg": photograph((160, 100), 0), "e.HEIC": b"?"}
    files.download, colab.files = got.append, files
    for name, module in (("google", ModuleType("google")), ("google.colab", colab), ("google.colab.files", files)): monkeypatch.setitem(sys.modules, name, module)
    return got


@pytest.fixture
def ran(monkeypatch, tmp_path, colab, capsys):
    "The names of the tour after its cells have run, and what it printed."
    import matplotlib
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(previews, "SAMPLE_STEPS", 1)
    sources = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    whole = "\n".join(sources)
    assert all(whole.count(text) == 1 for text in IN_PLACE)
    known = {}
    for source in sources:
        if source.startswith("%%exercise") or '"pip"' in source: continue
        for text, other in IN_PLACE.items(): source = source.replace(text, other)
        exec(source.replace("\nnotebook_style()", ""), known)
    return known, capsys.readouterr().out


def test_from_upload_to_zip(ran, colab):
    known, said = ran
    assert "e.HEIC: HEIC, left out" in said and "5 pictures" in said
    assert "b.JPG: turned" in said and "c.jpg: 900×200 is long" in said and "d.jpg: 200×210" not in said
    assert "again.jpg" in said and "nearly the same picture" in said
    output = Path("runs/rex")
    # the files load in stock diffusers: the tour's own cell compared the pictures
    assert known["apart"] < 2 and Subject.load(output).token == "<rex>"
    away = {str(p.relative_to(known["away"])) for p in known["away"].rglob("*.safetensors")}
    assert away == {"ComfyUI/models/loras/rex.safetensors", "ComfyUI/models/embeddings/rex.safetensors",
                    "webui/models/Lora/rex_subject.safetensors", "webui/embeddings/rex_subject.safetensors"}
    assert set(load_file(known["away"] / "webui/embeddings/rex_subject.safetensors")) == {"clip_l", "clip_g"}
    (parcel,) = colab
    assert {"rex/subject.json", "rex/README.md", "rex/pytorch_lora_weights.safetensors", "rex/learned_embeds.safetensors"} <= set(ZipFile(parcel).namelist())
    assert not any("checkpoint" in name for name in ZipFile(parcel).namelist())
    # more steps go on; as many are not taught again; a caption for no file is found out
    written = (output / "subject.json").stat().st_mtime_ns
    known["taught"]()
    assert (output / "subject.json").stat().st_mtime_ns == written
    known["STEPS"] = 3
    assert known["taught"]().settings["max_train_steps"] == 3 and training_log(output)["step"] == [1, 2, 3]
    with pytest.raises(ValueError, match="z.jpg: no such file"): known["with_captions"](known["folder"], {"z.jpg": "a {subject}"}, [])
