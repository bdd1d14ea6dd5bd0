"""The embedded model and its judge, as a user meets them: offline, with stock diffusers."""
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel_rescale.world.judge import judge_images, load_judge
from parallel_rescale.tools.embedded import TINY_SDXL, check_tiny_sdxl, load_tiny_sdxl
from parallel_rescale.world.training import frechet_distance, main, score_model
from parallel_rescale.world.tinyworld import CLASSES, random_instance, random_pose, reference_set, render
from parallel_rescale.world.tinyworld import STYLES, SUBJECTS


@pytest.fixture(scope="module")
def pipe():
    return load_tiny_sdxl(device="cpu")


def test_stock_diffusers_loads_it_without_a_network(monkeypatch):
    from diffusers import AutoPipelineForText2Image

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = AutoPipelineForText2Image.from_pretrained(TINY_SDXL, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a cat", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_only_safetensors_and_small():
    files = [f for f in check_tiny_sdxl().rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
    assert sum(f.stat().st_size for f in files) < 40e6


def test_is_an_sdxl(pipe):
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.unet.config.cross_attention_dim == 128
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.vae.config.latent_channels == 4 and pipe.vae_scale_factor == 4
    assert not pipe.config.force_zeros_for_empty_prompt


def test_same_seed_same_picture(pipe):
    draw = lambda seed: pipe("a neon sign of a robot", num_inference_steps=4, generator=torch.Generator().manual_seed(seed), output_type="np").images
    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_any_prompt_and_new_tokens_tokenise(pipe):
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert tokenizer.unk_token_id not in tokenizer("Ünïcödé & 42 zebras!").input_ids[1:-1]
        assert "<zork>" not in tokenizer.get_vocab()


def test_it_follows_prompts(pipe):
    scores = score_model(pipe, load_judge(), n=96, steps=20)
    assert scores["style"] > 0.9 and scores["cls"] > 0.85 and scores["background"] > 0.85, scores
    assert scores["floor"] < scores["frechet"]


def test_judge_orders_identity():
    judge, rng = load_judge(), np.random.default_rng(5)
    margins = []
    for name, subject in SUBJECTS.items():
        other = random_instance(rng, subject.cls)
        draw = lambda z, style: render(z, style, "grass", random_pose(rng), seed=int(rng.integers(1 << 30)))
        references = [image for image, _ in reference_set(name)]
        embeddings = judge_images(judge, references + [draw(subject, s) for s in STYLES] + [draw(other, s) for s in STYLES])["identity"]
        centre = torch.nn.functional.normalize(embeddings[:4].mean(0), dim=0)
        own, others = (embeddings[4:] @ centre).split(len(STYLES))
        margins.append((own - others).mean().item())
    assert min(margins) > 0.15 and np.mean(margins) > 0.35, margins


def test_damaged_judge_is_named(tmp_path):
    (tmp_path / "judge.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="judge.safetensors.*reinstall"):
        load_judge(tmp_path / "judge.safetensors")


def test_frechet_distance_is_a_distance():
    a, b = torch.randn(3000, 5), torch.randn(3000, 5) * 2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_training_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"instances": 1}))
    with pytest.raises(ValueError, match="another recipe"):
        main(tmp_path, recipe="test")
    assert [f.name for f in Path(tmp_path).iterdir()] == ["recipe.json"]
