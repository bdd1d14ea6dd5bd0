"""The embedded model and its judge, as a user meets them: offline, with stock diffusers."""
import importlib.util
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel_rescale.tools.embedded import TINY_SDXL, check_tiny_sdxl, load_tiny_sdxl
from parallel_rescale.world.judge import judge_images, judge_report, load_judge
from parallel_rescale.world.model import assembled, frechet_distance, main, score_model
from parallel_rescale.world.painting import render
from parallel_rescale.world.pictures import reference_set, render_dataset
from parallel_rescale.world.scenes import ATTRIBUTES, PLACES, random_instance, random_pose, Scene, SUBJECTS
from parallel_rescale.world.training import min_snr_mse

ROOT = Path(__file__).resolve().parents[1]


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
    image = pipe("a photo of a cat wearing a hat", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_only_safetensors_and_small():
    files = [f for f in check_tiny_sdxl().rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
    assert sum(f.stat().st_size for f in files) < 40e6


def test_is_an_sdxl(pipe):
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.unet.config.cross_attention_dim == 128
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.unet.config.in_channels == pipe.vae.config.latent_channels and pipe.vae_scale_factor == 4
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
    scores = score_model(pipe, load_judge(), n=32, steps=15)
    model, truth = scores["model, one"], scores["truth, one"]
    assert model["style"] > .9 and model["place"] > .8 and model["alignment"] > .75 * truth["alignment"], (model, truth)
    assert scores["frechet"] < 2 * scores["floor"]


def test_the_judge_sees_everything_that_can_be_asked():
    fresh = render_dataset(30, 4, seed=77)
    report = judge_report(load_judge(), fresh["images"], fresh["labels"])
    accuracy = {name: r["accuracy"] for name, r in report.items()}
    assert set(accuracy) == set(ATTRIBUTES)
    assert min(accuracy[n] for n in ("cls", "style", "place", "weather", "doing", "companion", "other")) > .9, accuracy
    # far above chance: eight accessories, seven colours
    assert min(accuracy["accessory"], accuracy["colour"]) > .85, accuracy
    assert max(r["calibration_error"] for r in report.values()) < .12, report


def test_judge_orders_identity_under_hats_and_paint():
    judge, rng = load_judge(), np.random.default_rng(5)
    changes = [{}, dict(style="sketch"), dict(style="glass"), dict(accessory="hat"), dict(colour="red"), dict(doing="asleep")]
    margins = []
    for name, subject in SUBJECTS.items():
        other = random_instance(rng, subject.cls)
        def draw(who, change): return render(Scene(who, place=rng.choice(PLACES), pose=random_pose(rng), seed=int(rng.integers(1 << 30)), **change))
        references = [image for image, _ in reference_set(name)]
        found = judge_images(judge, references + [draw(who, c) for who in (subject, other) for c in changes])["identity"]
        centre = torch.nn.functional.normalize(found[:4].mean(0), dim=0)
        own, others = (found[4:] @ centre).split(len(changes))
        margins.append((own - others).mean().item())
    assert sum(m > 0 for m in margins) >= 11 and np.mean(margins) > .15, margins


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
    assert [f.name for f in tmp_path.iterdir()] == ["recipe.json"]


def test_training_killed_in_the_middle_ends_in_the_same_model(tmp_path, monkeypatch):
    def train(name): return main(tmp_path / name, recipe="test", device="cpu", processes=1)
    whole, calls = train("whole"), []
    shutil.copytree(tmp_path / "whole" / "tokenizer", tmp_path / "killed" / "tokenizer")      # a few seconds less

    def stopped(*args):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(0)
        return min_snr_mse(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("parallel_rescale.world.painter.min_snr_mse", stopped)
        train("killed")
    assert not (tmp_path / "killed" / "tiny_sdxl").exists()
    again = train("killed")
    for file in whole.rglob("*.safetensors"): assert file.read_bytes() == (again / file.relative_to(whole)).read_bytes(), file
    assert (tmp_path / "whole/judge.safetensors").read_bytes() == (tmp_path / "killed/judge.safetensors").read_bytes()


def test_the_embedded_model_is_made_of_the_stored_weights(pipe):
    "`train-tiny --start training` goes on from what is shipped."
    stored = ROOT / "training"
    made = assembled(stored)
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        mine, theirs = getattr(made, part).state_dict(), getattr(pipe, part).state_dict()
        assert set(mine) == set(theirs)
        apart = max((mine[k].float() - theirs[k].float()).abs().max().item() for k in mine)
        assert apart < 5e-3, (part, apart)
    assert made.vae.config.scaling_factor == pipe.vae.config.scaling_factor
    assert made.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    ours, shipped = load_judge(stored / "judge.safetensors").state_dict(), load_judge().state_dict()
    assert all(torch.equal(ours[k], shipped[k]) for k in shipped)


def test_the_card_says_what_was_measured():
    spec = importlib.util.spec_from_file_location("measured", ROOT / "benchmarks" / "tiny_sdxl.py")
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    score, log = (json.loads((ROOT / "training" / f"{name}.json").read_text()) for name in ("score", "log"))
    assert score["samples"] == log[-1]["samples"], "the weights are newer than their score: run python benchmarks/tiny_sdxl.py 1000"
    assert script.lines(score) in script.CARD.read_text(), "run python benchmarks/tiny_sdxl.py 0"
