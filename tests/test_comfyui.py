"""What is put into ComfyUI's and WebUI's folders has the names that their tables have."""
import pytest
from safetensors.torch import load_file

from parallel_rescale.machine.saved_subject import load_tokens
from parallel_rescale.tools.embedded import load_tiny_sdxl
from parallel_rescale.tools.util import PACKAGE
from parallel_rescale.use.info import for_comfyui, for_webui


@pytest.mark.parametrize("subject", ["subject_pixel", "subject_pixel_wall"])
def test_every_layer_has_a_name_that_comfyui_knows(subject, tmp_path):
    lora, words = for_comfyui(PACKAGE / "data" / subject, tmp_path)
    assert lora == tmp_path / "models" / "loras" / "pixel.safetensors" and words == tmp_path / "models" / "embeddings" / "pixel.safetensors"
    known = {"lora_unet_" + name.replace(".", "_") for name, _ in load_tiny_sdxl().unet.named_modules()}
    tensors = load_file(lora)
    layers = {key.partition(".")[0] for key in tensors}
    assert layers <= known and any("_to_q" in layer for layer in layers)
    assert {key.partition(".")[2] for key in tensors} == {"alpha", "lora_down.weight", "lora_up.weight"}
    # its strength is alpha over the rank, which is what it was trained at
    for layer in layers: assert tensors[f"{layer}.alpha"].item() == tensors[f"{layer}.lora_down.weight"].shape[0]


def test_an_embeddings_file_has_one_row_for_each_encoder(tmp_path):
    _, words = for_comfyui(PACKAGE / "data" / "subject_pixel", tmp_path)
    rows, (_, small, large) = load_file(words), load_tokens(PACKAGE / "data" / "subject_pixel")
    assert set(rows) == {"clip_l", "clip_g"} and rows["clip_l"].equal(small) and rows["clip_g"].equal(large)


def test_webui_gets_the_same_tensors_under_a_name_that_no_prompt_has_by_accident(tmp_path):
    folder = PACKAGE / "data" / "subject_pixel"
    for ours, theirs in zip(for_comfyui(folder, tmp_path), for_webui(folder, tmp_path)):
        a, b = load_file(ours), load_file(theirs)
        assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
        assert theirs.stem == "pixel_subject" and theirs.stat().st_mode & 0o044       # others may read it
    assert {p.parent.relative_to(tmp_path).as_posix() for p in for_webui(folder, tmp_path)} == {"models/Lora", "embeddings"}


def test_an_alpha_that_other_programs_would_not_know_is_refused(tmp_path):
    from parallel_rescale.machine.saved_subject import Subject, save_adapter
    from peft import LoraConfig
    pipe = load_tiny_sdxl()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]))
    save_adapter(pipe.unet, tmp_path)
    Subject("<x>", "cat").save(tmp_path)
    with pytest.raises(ValueError, match="alpha 4 is not the rank 2"): for_webui(tmp_path, tmp_path / "away")
