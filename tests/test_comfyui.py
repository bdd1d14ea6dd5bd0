"""What the tutorial puts into ComfyUI's folders has the names that ComfyUI's tables have."""
import json
from pathlib import Path

import pytest
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parallel_rescale.machine.saved_subject import LORA_FILE, Subject, load_tokens
from parallel_rescale.tools.embedded import load_tiny_sdxl
from parallel_rescale.tools.util import PACKAGE

TUTORIAL = Path(__file__).resolve().parent.parent / "nbs" / "tutorials" / "comfyui.ipynb"


@pytest.fixture(scope="module")
def for_comfyui():
    cells = ["".join(c["source"]) for c in json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]]
    source = next(s for s in cells if s.startswith("def for_comfyui"))
    names = dict(json=json, Path=Path, safe_open=safe_open, save_file=save_file, load_file=load_file, LORA_FILE=LORA_FILE, Subject=Subject,
                 load_tokens=load_tokens, convert_state_dict_to_kohya=convert_state_dict_to_kohya)
    exec(source[:source.index("comfy = tempfile")], names)
    return names["for_comfyui"]


@pytest.mark.parametrize("subject", ["subject_pixel", "subject_pixel_wall"])
def test_every_layer_has_a_name_that_comfyui_knows(for_comfyui, subject, tmp_path):
    lora, words = for_comfyui(PACKAGE / "data" / subject, tmp_path)
    assert lora == tmp_path / "models" / "loras" / "pixel.safetensors" and words == tmp_path / "models" / "embeddings" / "pixel.safetensors"
    known = {"lora_unet_" + name.replace(".", "_") for name, _ in load_tiny_sdxl().unet.named_modules()}
    tensors = load_file(lora)
    layers = {key.partition(".")[0] for key in tensors}
    assert layers <= known and any("_to_q" in layer for layer in layers)
    assert {key.partition(".")[2] for key in tensors} == {"alpha", "lora_down.weight", "lora_up.weight"}
    # its strength is alpha over the rank, which is what it was trained at
    for layer in layers: assert tensors[f"{layer}.alpha"].item() == tensors[f"{layer}.lora_down.weight"].shape[0]


def test_an_embeddings_file_has_one_row_for_each_encoder(for_comfyui, tmp_path):
    _, words = for_comfyui(PACKAGE / "data" / "subject_pixel", tmp_path)
    rows, (_, small, large) = load_file(words), load_tokens(PACKAGE / "data" / "subject_pixel")
    assert set(rows) == {"clip_l", "clip_g"} and rows["clip_l"].equal(small) and rows["clip_g"].equal(large)
