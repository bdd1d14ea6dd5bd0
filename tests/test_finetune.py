"""Fine-tuning: the losses, what is learned in every precision, checkpoints to the last bit, and one clear error for each mistake."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from parallel_rescale.machine.saved_subject import Subject, installed_versions, pool_at_eos, save_adapter
from parallel_rescale.method.rules import CFG
from parallel_rescale.subject import checkpoints, previews
from parallel_rescale.subject.adapters import add_token, embed, rows_of
from parallel_rescale.subject.checkpoints import training_log
from parallel_rescale.subject.data import RANDOM_CROPS, random_choices, sample_latents
from parallel_rescale.subject.defaults import half_precision, recommended
from parallel_rescale.subject.finetuning import finetune, prepared_run
from parallel_rescale.subject.losses import dco_loss, dreambooth_loss, min_snr_weight, predict, theta_and_phi
from parallel_rescale.subject.previews import everything_on_device, sample_images
from parallel_rescale.subject.references import as_references
from parallel_rescale.subject.resuming import load_checkpoint
from parallel_rescale.subject.settings import saved_settings
from parallel_rescale.subject.step import autocast, step_batches, forward_and_backward, loss_of, micro_batches
from parallel_rescale.subject.step import read_logs, subject_text, train_step
from parallel_rescale.tools.embedded import TINY_SDXL, load_tiny_sdxl
from parallel_rescale.world.pictures import reference_set

CAT = dict(class_noun="cat", token="<pixel>")
QUICK = """import torch; torch.set_num_threads(1)
from parallel_rescale.subject import finetuning, previews, step
previews.SAMPLE_STEPS, previews.SAMPLE_PROMPTS = 1, previews.SAMPLE_PROMPTS[:1]
"""

UNIT = dict(no=2.0**-24, bf16=2.0**-9, fp16=2.0**-12)                         # relative error of one rounding
cuda = pytest.mark.cuda                                                       # holds on a GPU as well: `-m cuda` there
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("parallel_rescale.subject.previews.SAMPLE_STEPS", 1)
    monkeypatch.setattr("parallel_rescale.subject.previews.SAMPLE_PROMPTS", previews.SAMPLE_PROMPTS[:1])


@pytest.fixture(scope="module")
def references():
    return as_references(reference_set("pixel_the_cat", "{subject}"))


def prepared(references, **changed):
    "A run ready for its first step, without an output folder."
    return prepared_run(references, **CAT | changed)


def weights(folder):
    return {f"{file}:{k}": v for file in ("pytorch_lora_weights", "learned_embeds") if (Path(folder) / f"{file}.safetensors").exists()
            for k, v in load_file(Path(folder) / f"{file}.safetensors").items()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and a
    if torch.cuda.is_available():         # which adds up in no fixed order: AdamW makes whole steps of what a sum's last bit decides
        assert sum((a[k].float() - b[k].float()).norm() / a[k].float().norm() for k in a) / len(a) < 0.1
    else: assert [k for k in a if not torch.equal(a[k], b[k])] == []


# losses

errors = st.lists(st.floats(0.0, 2.0, width=32), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(errors, st.floats(1.0, 2000.0))
def test_dco_is_a_mean_over_samples(model, beta):
    model = torch.tensor(model, dtype=torch.float64)
    reference = model.flip(0) * 0.9
    one_by_one = torch.stack([dco_loss(m[None], r[None], beta) for m, r in zip(model, reference)]).mean()
    torch.testing.assert_close(dco_loss(model, reference, beta), one_by_one)


def test_dco_limits():
    m = torch.tensor([0.1, 0.3], requires_grad=True)
    assert dco_loss(m, m.detach(), 1000.0).item() == pytest.approx(math.log(2))
    dco_loss(m, m.detach(), 1000.0).backward()
    torch.testing.assert_close(m.grad, torch.full((2,), 1000.0 / 2 / 2))       # β σ(0) = β/2, over two samples
    far = torch.tensor([5.0])
    assert dco_loss(far, far - 1, 1000.0) == 1000 and dco_loss(far - 1, far, 1000.0) == 0    # linear, and at rest; never inf


def test_dreambooth_and_min_snr():
    error, snr = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 20.0])
    assert dreambooth_loss(error) == 2
    torch.testing.assert_close(min_snr_weight(snr), torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(min_snr_weight(snr, prediction_type="v_prediction"), torch.tensor([0.5 / 1.5, 5 / 21]))
    torch.testing.assert_close(dreambooth_loss(error, min_snr_weight(snr)), torch.tensor((1 + 0.75) / 2))


# text

def test_embed_equals_the_pipeline():
    pipe, prompts = load_tiny_sdxl(device="cpu"), ["a photo of a cat", "", "a neon sign of a house in the snow"]
    made, (hidden, _, pooled, _) = embed(pipe, prompts), pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(made.hidden, hidden) and torch.equal(made.pooled, pooled)


def test_a_new_token_starts_as_its_noun_and_changes_nothing_else():
    pipe = load_tiny_sdxl(device="cpu")
    before = embed(pipe, ["a photo of a cat in the snow"])
    rows = [add_token(*pair, "<pixel>", "cat") for pair in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))]
    noun, token = (embed(pipe, [f"a photo of a {w} in the snow"]) for w in ("cat", "<pixel>"))
    for made in (noun, token): assert torch.equal(made.hidden, before.hidden) and torch.equal(made.pooled, before.pooled)
    for row in rows: row.data += 1
    noun, token = (embed(pipe, [f"a photo of a {w} in the snow"]) for w in ("cat", "<pixel>"))
    assert torch.equal(noun.hidden, before.hidden) and not torch.equal(token.hidden, before.hidden) and not torch.equal(token.pooled, before.pooled)


def test_several_words_give_their_mean():
    pipe = load_tiny_sdxl(device="cpu")
    ids = pipe.tokenizer("brick wall", add_special_tokens=False).input_ids
    assert len(ids) >= 2
    expected = pipe.text_encoder.get_input_embeddings().weight[ids].mean(0, keepdim=True)
    torch.testing.assert_close(add_token(pipe.tokenizer, pipe.text_encoder, "<x>", "brick wall").data, expected)


@pytest.mark.parametrize("token,words", [("cat</w>", "vocabulary"), ("two words", "space"), ("", "expected a word"), ("<a b>", "space"), ("ctopu", "class noun"), (3, "expected a word")])
def test_token_errors(token, words, references, tmp_path):
    pipe = load_tiny_sdxl(device="cpu")
    before = len(pipe.tokenizer)
    with pytest.raises(ValueError, match="token=.*" + words): add_token(pipe.tokenizer, pipe.text_encoder, token, "octopus")
    assert len(pipe.tokenizer) == before
    with pytest.raises(ValueError, match="token="): finetune(references, class_noun="octopus", token=token, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pooling_at_the_end_of_text_survives_a_new_token():
    pipe = load_tiny_sdxl(device="cpu")
    pipe.tokenizer_2.add_tokens(["<x>"])
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2), mean_resizing=False)
    right = embed(pipe, ["a photo of a <x> in the snow"]).pooled
    for layer in pipe.text_encoder_2.modules():
        if hasattr(layer, "eos_token_id"): layer.eos_token_id = 2              # as in SDXL's own configuration
    assert not torch.allclose(embed(pipe, ["a photo of a <x> in the snow"]).pooled, right)
    pool_at_eos(pipe.tokenizer_2, pipe.text_encoder_2)
    assert torch.equal(embed(pipe, ["a photo of a <x> in the snow"]).pooled, right)


# a step

def gradients(run, step=0):
    for batch in micro_batches(run, run.data, step): loss_of(run, batch)[0].backward()
    return [p.grad.clone() for p in run.trained]


@pytest.fixture(scope="module")
def stirred():
    "LoRA weights that are not the identity any more."
    def stir(run):
        generator = torch.Generator().manual_seed(1)
        for p in run.trained: p.data += 0.02 * torch.randn(p.shape, generator=generator).to(p)    # all of them: they are views of it
        return run
    return stir


@cuda
def test_one_call_equals_two(references, stirred):
    two, one = (stirred(prepared(references, batched=b)) for b in (False, True))
    for a, b in zip(gradients(two), gradients(one)): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_phi_is_the_base_model_and_a_constant(references, stirred):
    run, untouched = stirred(prepared(references)), load_tiny_sdxl(device="cpu").unet
    batch = next(micro_batches(run, run.data, 0))
    subject, base = subject_text(run, batch), rows_of(run.text.base, batch.source)
    for batched in (False, True):
        theta, phi = theta_and_phi(run.pipe.unet, batch, subject, base, batched)
        assert theta.requires_grad and not phi.requires_grad
        with torch.no_grad(): expected = predict(untouched, batch.x_t, batch.t, base, batch.time_ids)
        torch.testing.assert_close(phi, expected, rtol=1e-4, atol=1e-5)
        assert (theta - phi).abs().max() > 1e-3


@cuda
def test_gradient_checkpointing_changes_no_gradient(references, stirred):
    plain, saving = (stirred(prepared(references, gradient_checkpointing=b)) for b in (False, True))
    assert saving.pipe.unet.training
    for a, b in zip(gradients(plain), gradients(saving)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@cuda
def test_a_step_does_not_depend_on_how_it_is_cut(references):
    whole = prepared(references, train_batch_size=4)
    cut = prepared(references, train_batch_size=1, gradient_accumulation_steps=4)
    logs = [train_step(run, 0) for run in (whole, cut)]
    for k in logs[0]: assert logs[0][k] == pytest.approx(logs[1][k], rel=1e-4), k
    moments = [[state["exp_avg"] for state in run.optimizer.state.values()] for run in (whole, cut)]
    assert moments[0]
    for a, b in zip(*moments): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@cuda
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_learned_tokens_get_gradients_and_change_in_every_precision(references, precision):
    run = prepared(references, train_text_encoder_ti=True, mixed_precision=precision, train_batch_size=2, rank=2)
    before, table = {k: r.detach().clone() for k, r in run.rows.items()}, run.pipe.text_encoder.get_input_embeddings().weight
    frozen = table.detach().clone()
    for batch in micro_batches(run, run.data, 0):
        with autocast(run): loss = loss_of(run, batch)[0]
        run.scaler.scale(loss).backward()
    for row in run.rows.values(): assert row.dtype == torch.float32 and row.grad.abs().max() > 0
    run.optimizer.zero_grad(set_to_none=False)
    for step in range(3): train_step(run, step)
    for (key, row), norm in zip(run.rows.items(), run.norms):
        direction = torch.cosine_similarity(row, before[key]).item()
        assert direction < 1 - 1e-6, f"{key} did not turn"
        assert row.norm().item() == pytest.approx(norm, rel=1e-5)
    assert torch.equal(table, frozen)
    assert all(p.dtype == torch.float32 for p in run.trained)


@cuda
def test_tokens_alone(references, tmp_path):
    subject = finetune(references, **CAT, output=tmp_path / "run", rank=0, train_text_encoder_ti=True, max_train_steps=2)
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    assert set(weights(subject.folder)) == {"learned_embeds:clip_l", "learned_embeds:clip_g"}


@cuda
def test_dreambooth_with_prior_and_snr(references, tmp_path):
    finetune(references, **CAT, output=tmp_path / "run", loss="dreambooth", prior_loss_weight=0.5, num_class_images=2, snr_gamma=5.0, max_train_steps=2, train_batch_size=2)
    log = training_log(tmp_path / "run")
    assert log["step"] == [1, 2] and all(np.isfinite(log["prior"])) and len(list((tmp_path / "run/class_images").iterdir())) == 2
    assert "beta" not in Subject.load(tmp_path / "run").settings
    own = finetune(references, **CAT, output=tmp_path / "own", loss="dreambooth", prior_loss_weight=0.5, class_data_dir=tmp_path / "run/class_images",
                   snr_gamma=5.0, max_train_steps=2, train_batch_size=2)
    assert_same_weights(tmp_path / "run", own.folder)


def test_v_prediction_target(references):
    run = prepared(references)
    run.noise_scheduler.register_to_config(prediction_type="v_prediction")
    batch = next(micro_batches(run, run.data, 3))
    which, t, eps, noise = random_choices(4, run.data.moments.shape[2:], 4, 1000, 0, 3, 0)
    clean = sample_latents(run.data.moments[which], eps, run.pipe.vae.config)
    alpha = run.noise_scheduler.alphas_cumprod[t][:, None, None, None]
    torch.testing.assert_close(batch.target, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean)
    torch.testing.assert_close(batch.x_t, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)


@cuda
def test_random_crops(references):
    wide = as_references([(np.asarray(r.image.resize((96, 64))), r.caption) for r in references])
    run = prepared(wide, crop="random")
    assert len(run.data.moments) == 4 * RANDOM_CROPS and run.data.time_ids[:, 3].max() > 0 and run.data.time_ids[:, 2].max() == 0
    train_step(run, 0)


# half precision

@cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_latents_are_those_of_float32(references, precision):
    "Autocast would compute the VAE in half precision whatever its weights are; it is off there, so the latents are the same to the last bit."
    whole, half = (prepared(references, mixed_precision=p) for p in ("no", precision))
    assert torch.equal(whole.data.moments, half.data.moments) and half.pipe.vae.dtype == torch.float32


def with_vae(folder, change):
    "A copy of the embedded model with another VAE."
    from safetensors.torch import save_file
    shutil.copytree(TINY_SDXL, folder)
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata=dict(format="pt"))
    return str(folder)


@cuda
def test_a_vae_that_overflows_in_fp16_does_no_harm(references, tmp_path):
    "SDXL's does. In float32 a first layer 10⁶ times larger changes next to nothing, for a normalisation follows it."
    def enlarge(state):
        for name in ("encoder.conv_in.weight", "encoder.conv_in.bias"): state[name] = state[name].float() * 1e6
    run = prepared(references, base=with_vae(tmp_path / "base", enlarge), mixed_precision="fp16")
    assert run.data.moments.isfinite().all()
    x = torch.zeros(1, 3, 64, 64, device=run.accelerator.device)
    with torch.no_grad(), torch.autocast(x.device.type, torch.float16): naive = run.pipe.vae.to(x.device).encode(x).latent_dist.mean
    assert not naive.isfinite().all()                                         # what would be learned from otherwise


@cuda
def test_latents_that_are_not_finite_name_their_picture(references, tmp_path):
    def spoil(state): state["encoder.conv_out.bias"] += math.inf
    base = with_vae(tmp_path / "base", spoil)
    with pytest.raises(ValueError, match=r"picture 1 \('.*\): the VAE gives latents that are not finite"):
        finetune(references, **CAT, base=base, output=tmp_path / "out", max_train_steps=1)


@cuda
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_class_pictures_and_samples_leave_the_vae_in_float32(references, tmp_path, precision):
    common = CAT | dict(loss="dreambooth", prior_loss_weight=1.0, num_class_images=2, max_train_steps=1, train_batch_size=1)
    subject = finetune(references, **common, mixed_precision=precision, output=tmp_path / "run", validation_prompt="a {subject}", validation_steps=1)
    half, whole = (prepared(references, **common | dict(class_data_dir=tmp_path / "run/class_images", num_class_images=50), mixed_precision=p)
                   for p in (precision, "no"))
    assert torch.equal(half.prior.moments, whole.prior.moments)
    with everything_on_device(half): sample_images(half, ["a {subject}"], CFG(5.0))
    assert half.pipe.vae.dtype == torch.float32 and all(np.isfinite(training_log(subject.folder)["prior"]))


@cuda
@pytest.mark.parametrize("changes", [dict(), dict(train_text_encoder_ti=True), dict(gradient_checkpointing=True), dict(loss="dreambooth"),
                                     dict(loss="dreambooth", prior_loss_weight=1.0)], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_learns(references, stirred, precision, changes, tmp_path):
    """Losses and gradients are means over thousands of roundings of either sign, so a few units of one rounding remain: 8 for
    a loss, and 48 for the gradient, which is one more pass through the network (25 were measured on a CPU, 35 on a GPU)."""
    if changes.get("prior_loss_weight"):
        for n, r in enumerate(references[:2]): r.image.save(tmp_path / f"{n}.png")
        changes = changes | dict(class_data_dir=tmp_path)
    made = []
    for p in ("no", precision):
        run = stirred(prepared(references, mixed_precision=p, train_batch_size=2, **changes))
        logs = forward_and_backward(run, step_batches(run, 0))[0]
        run.scaler.unscale_(run.optimizer)
        made.append((logs, torch.cat([q.grad.flatten() for q in run.trained])))
    (exact, gradient), (logs, rounded) = made
    for k in exact: torch.testing.assert_close(logs[k].float(), exact[k], rtol=8 * UNIT[precision], atol=0)
    assert (rounded - gradient).norm() < 48 * UNIT[precision] * gradient.norm()


@cuda
@pytest.mark.parametrize("precision,levels", [("bf16", 8), ("fp16", 1)])
def test_validation_pictures_in_half_precision(references, monkeypatch, precision, levels):
    "Ten steps with CFG 5 amplify a rounding some fifty times: a mean of 50 × 2⁻⁹ × 127.5 / 2 ≈ 6 of 255 grey levels in bf16, and an eighth of it in fp16."
    monkeypatch.setattr("parallel_rescale.subject.previews.SAMPLE_STEPS", 10)
    pictures = []
    for p in ("no", precision):
        run = prepared(references, mixed_precision=p)
        with everything_on_device(run): pictures.append(np.asarray(sample_images(run, ["a {subject} in the snow"], CFG(5.0))[0], float))
    drawn = [torch.randn(5120, generator=torch.Generator().manual_seed(0), dtype=d).float() for d in (torch.float32, dict(bf16=torch.bfloat16, fp16=torch.float16)[precision])]
    if (drawn[0] - drawn[1]).abs().max() > 0.1: return                           # a torch that draws other noise in half precision
    assert np.abs(pictures[0] - pictures[1]).mean() < levels


@pytest.mark.parametrize("native,expected", [(True, "bf16"), (False, "fp16")])
def test_half_precision_is_the_one_that_the_card_computes_itself(monkeypatch, native, expected):
    "A T4 answers yes to the plain question, for it can emulate bf16."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert half_precision() == expected


# waiting for the device

class Fetches(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts the moments at which Python asks for a tensor's value, and a GPU would have to finish first."
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Fetches.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("changes", [dict(), dict(train_text_encoder_ti=True), dict(gradient_checkpointing=True), dict(batched=True), dict(gradient_accumulation_steps=2),
                                     dict(loss="dreambooth", snr_gamma=5.0), dict(mixed_precision="bf16")], ids=str)
def test_a_step_asks_for_numbers_once(references, monkeypatch, changes):
    run, read, asked = prepared(references, train_batch_size=2, **changes), read_logs, []
    def counted(*args): asked.append(Fetches.count); return read(*args)
    monkeypatch.setattr("parallel_rescale.subject.step.read_logs", counted)
    monkeypatch.setattr(Fetches, "count", 0)
    train_step(run, 0)
    with Fetches(): train_step(run, 1)
    assert asked == [0, 0] and Fetches.count == 0                             # read_logs reads one tensor, as a list


@cuda
@needs_cuda
@pytest.mark.parametrize("changes", [dict(), dict(loss="dreambooth", snr_gamma=5.0), dict(mixed_precision="fp16")], ids=str)
def test_a_step_waits_for_the_gpu_once(references, changes, recwarn):
    run = prepared(references, **changes)
    for step in range(2): train_step(run, step)
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try: train_step(run, 2)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in recwarn if "called a synchronizing" in str(w.message)]) <= 1       # the mode itself announces itself


def test_the_next_step_is_drawn_ahead_and_is_the_same(references):
    ahead, fresh = (prepared(references, train_batch_size=2) for _ in range(2))
    for step in range(3):
        fresh.ahead.clear()
        assert train_step(ahead, step) == train_step(fresh, step)
    assert list(ahead.ahead) == [3]


@cuda
@needs_cuda
def test_vae_and_encoders_are_off_the_card(references, tmp_path):
    run = prepared(references, mixed_precision=half_precision())
    assert {p.device.type for part in (run.pipe.vae, run.pipe.text_encoder, run.pipe.text_encoder_2) for p in part.parameters()} == {"cpu"}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    save_adapter(run.pipe.unet, tmp_path)
    assert torch.cuda.max_memory_allocated() == before                        # no second copy of the LoRA there


# what is saved

@pytest.fixture(scope="module")
def trained(references, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel_rescale.subject.previews.SAMPLE_STEPS", 1)
        patch.setattr("parallel_rescale.subject.previews.SAMPLE_PROMPTS", previews.SAMPLE_PROMPTS[:1])
        folder = tmp_path_factory.mktemp("trained") / "run"
        return finetune(references, **CAT, output=folder, max_train_steps=4, checkpointing_steps=2, train_text_encoder_ti=True, train_batch_size=2,
                        lr_scheduler="cosine", validation_prompt=["a {subject} in the snow", "a sketch of a <pixel>"], validation_steps=4, report_to="tensorboard")


@cuda
def test_the_saved_folder(trained):
    folder = Path(trained.folder)
    names = {p.name for p in folder.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "subject.json", "README.md", "samples", "training_log.jsonl", "logs"} <= names
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl") or p.name.endswith(".part")]
    assert len(list((folder / "validation").iterdir())) == 2 and (folder / "samples/grid.png").exists()
    assert list((folder / "logs").rglob("events.out*")) and "samples/grid.png" in (folder / "README.md").read_text()
    log = training_log(folder)
    assert log["step"] == [1, 2, 3, 4] and log["loss"][0] == pytest.approx(math.log(2), abs=0.6) and log["lr"][-1] == pytest.approx(0, abs=1e-9)
    assert trained == Subject.load(folder) and trained.base == TINY_SDXL and trained.settings["rank"] == 8


def test_stock_diffusers_loads_the_same_model(trained, references):
    from diffusers import StableDiffusionXLPipeline
    run = prepared(references, train_text_encoder_ti=True)
    load_checkpoint(run, Path(trained.folder) / "checkpoint-4")
    pipe = StableDiffusionXLPipeline.from_pretrained(TINY_SDXL, torch_dtype=torch.float32)
    pipe.load_lora_weights(trained.folder)
    rows = load_file(Path(trained.folder) / "learned_embeds.safetensors")
    pipe.load_textual_inversion(rows["clip_l"], token="<pixel>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(rows["clip_g"], token="<pixel>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    for p in (pipe, run.pipe): p.set_progress_bar_config(disable=True)
    ours, stock = (p("a photo of a <pixel>", num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)).images for p in (run.pipe, pipe))
    plain = load_tiny_sdxl(device="cpu")("a photo of a cat", num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)).images
    np.testing.assert_allclose(ours, stock, atol=1e-5)
    assert np.abs(ours - plain).max() > 1e-3


# interruption and resumption

RUN = dict(**CAT, max_train_steps=5, checkpointing_steps=2, train_text_encoder_ti=True, train_batch_size=1, lr_scheduler="linear", rank=2)


@pytest.fixture(scope="module")
def uninterrupted(references, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel_rescale.subject.previews.SAMPLE_STEPS", 1)
        patch.setattr("parallel_rescale.subject.previews.SAMPLE_PROMPTS", previews.SAMPLE_PROMPTS[:1])
        return finetune(references, **RUN, output=tmp_path_factory.mktemp("whole") / "run").folder


def test_the_same_seed_gives_the_same_weights_whatever_came_before(references, uninterrupted, tmp_path):
    torch.manual_seed(99); torch.randn(7)
    finetune(references, **RUN, output=tmp_path / "again")
    assert_same_weights(uninterrupted, tmp_path / "again")
    finetune(references, **RUN, output=tmp_path / "other", seed=1)
    a, b = weights(uninterrupted), weights(tmp_path / "other")
    assert any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("which", ["latest", "checkpoint-2", "path"])
def test_resume_equals_an_uninterrupted_run(references, uninterrupted, tmp_path, which):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for name in ("subject.json", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"): (tmp_path / "run" / name).unlink()
    finetune(references, **RUN, output=tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run/checkpoint-4") if which == "path" else which)
    assert_same_weights(uninterrupted, tmp_path / "run")
    assert training_log(tmp_path / "run") == training_log(uninterrupted)


def script(output, **more):
    return QUICK + textwrap.dedent(f"""
        from parallel_rescale.world.pictures import reference_set
        finetuning.finetune(reference_set("pixel_the_cat", "{{subject}}"), output={str(output)!r}, **{RUN | more!r})
    """)


def start(output, **more):
    return subprocess.Popen([sys.executable, "-c", script(output, **more)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)


def test_killed_and_resumed(references, tmp_path):
    "SIGKILL at an arbitrary moment after the first checkpoint; the run is long enough not to be over by then."
    output, long = tmp_path / "run", dict(max_train_steps=12, checkpointing_steps=3)
    process = start(output, **long)
    wait_for(lambda: (output / "checkpoint-3").exists(), process)
    process.kill()
    process.communicate()
    assert not (output / "subject.json").exists()
    finetune(references, **RUN | long, output=output, resume_from_checkpoint="latest")
    finetune(references, **RUN | long, output=tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", output)
    assert training_log(tmp_path / "whole") == training_log(output)


@cuda
def test_ctrl_c_saves_and_says_how_to_go_on(references, uninterrupted, tmp_path, monkeypatch):
    original, before = train_step, signal.getsignal(signal.SIGINT)
    def step(run, number):
        if number == 2: os.kill(os.getpid(), signal.SIGINT)                    # in the midst of the third step
        return original(run, number)
    monkeypatch.setattr("parallel_rescale.subject.finetuning.train_step", step)
    with pytest.raises(KeyboardInterrupt, match="after step 3.*checkpoint-3.*resume_from_checkpoint='latest'"): finetune(references, **RUN, output=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr("parallel_rescale.subject.finetuning.train_step", original)
    finetune(references, **RUN, output=tmp_path / "run", resume_from_checkpoint="latest")
    assert_same_weights(uninterrupted, tmp_path / "run")


def test_half_a_checkpoint_is_never_taken_for_one(references, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "write_json", lambda file, value: (_ for _ in ()).throw(OSError("disk full")) if Path(file).name == "state.json" else None)
    with pytest.raises(OSError, match="disk full"): finetune(references, **RUN, output=tmp_path / "run")
    assert checkpoints.checkpoints(tmp_path / "run") == []


@cuda
def test_checkpoint_limit(references, tmp_path):
    finetune(references, **RUN | dict(checkpointing_steps=1, checkpoints_total_limit=2), output=tmp_path / "run")
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-5"]
    assert Subject.load(tmp_path / "run/checkpoint-4").token == "<pixel>"      # a checkpoint is a subject that can be tried


def test_a_run_can_be_made_longer(references, tmp_path):
    short = RUN | dict(lr_scheduler="constant", max_train_steps=2)
    finetune(references, **short, output=tmp_path / "run")
    finetune(references, **short | dict(max_train_steps=3), output=tmp_path / "run", resume_from_checkpoint="latest")
    finetune(references, **short | dict(max_train_steps=3), output=tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_resume_errors(references, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    again = lambda images=references, **more: finetune(images, **RUN | dict(output=run, resume_from_checkpoint="latest") | more)
    for more, words in ((dict(learning_rate=5e-4), r"learning_rate=0.0005 \(was 0.001\)"), (dict(token="<other>"), "token="), (dict(train_batch_size=2), "2 samples a step"),
                        (dict(resume_from_checkpoint="checkpoint-9"), "checkpoint-2, checkpoint-4"), (dict(max_train_steps=3), "has done 4 steps"),
                        (dict(images=references[:3]), "fingerprint")):
        with pytest.raises(ValueError, match=words): again(**more)
    assert_same_weights(uninterrupted, run)


def test_a_run_is_readable_to_others(references, tmp_path):
    before = os.umask(0o022)
    try: finetune(references, **RUN | dict(max_train_steps=2, report_to="tensorboard"), output=tmp_path / "run")
    finally: os.umask(before)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {"optimizer.safetensors", "state.json", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "grid.png"} <= {p.name for p in files}
    assert {str(p.relative_to(tmp_path)): oct(p.stat().st_mode & 0o777) for p in files if p.stat().st_mode & 0o777 != 0o644} == {}


# resuming after an upgrade, and how the base was loaded

def test_an_upgraded_package_is_a_warning(references, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    again = lambda: finetune(references, **RUN, output=run, resume_from_checkpoint="latest")
    file = run / "checkpoint-4/state.json"
    state = json.loads(file.read_text())
    assert state["versions"] == installed_versions()
    file.write_text(json.dumps(state | dict(versions=dict(state["versions"], diffusers="0.30.0", torch="2.6.0"))))
    with pytest.warns(UserWarning, match=r"checkpoint-4 was made with other versions \(torch 2.6.0 → .*, diffusers 0.30.0 → "): again()
    assert_same_weights(uninterrupted, run)
    file.write_text(json.dumps({k: v for k, v in state.items() if k != "versions"}))       # as older checkpoints are
    again()


@pytest.fixture(scope="module")
def hub_like(tmp_path_factory):
    "The embedded model with its UNet in fp16 files alone, and beside it another VAE."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(TINY_SDXL, folder / "base")
    (folder / "base/unet/diffusion_pytorch_model.safetensors").unlink()
    UNet2DConditionModel.from_pretrained(TINY_SDXL, subfolder="unet").half().save_pretrained(folder / "base/unet", variant="fp16")
    vae = AutoencoderKL.from_pretrained(TINY_SDXL, subfolder="vae").float()
    for p in vae.decoder.conv_out.parameters(): p.data *= 0.5
    for p in vae.encoder.conv_out.parameters(): p.data += 0.01
    vae.save_pretrained(folder / "vae")
    return folder


def test_variant_and_vae_are_used_and_remembered(references, hub_like, tmp_path):
    base, vae = str(hub_like / "base"), hub_like / "vae"
    given = RUN | dict(base=base, variant="fp16", vae=vae, max_train_steps=2)
    subject = finetune(references, **given, output=tmp_path / "run")
    assert subject.base_options == dict(variant="fp16") and subject.vae == str(vae)
    assert Subject.load(tmp_path / "run/checkpoint-2").vae == str(vae) and f'from_pretrained("{base}", variant="fp16", vae=vae, torch_dtype=dtype)' in Path(subject.folder, "README.md").read_text()
    own, other = (prepared(references, base=base, variant="fp16", vae=v) for v in (None, str(vae)))
    assert not torch.equal(own.data.moments, other.data.moments)
    resumed = dict(output=tmp_path / "run", resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"vae=None \(was '.*vae'\)"): finetune(references, **given | dict(vae=None, max_train_steps=3), **resumed)
    assert finetune(references, **given | dict(max_train_steps=3, lr_scheduler="linear"), **resumed).vae == str(vae)


def test_a_revision_reaches_every_part(references, monkeypatch, tmp_path):
    "There is no Hub here, so the calls are caught on their way to it."
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer
    asked = []
    def at_home(cls, name):
        original = getattr(cls, name)
        def call(base, *args, revision=None, **kwargs):
            asked.append((cls.__name__, revision))
            return original(TINY_SDXL if base == "some/sdxl" else base, *args, **kwargs)
        monkeypatch.setattr(cls, name, call)
    for cls, name in ((UNet2DConditionModel, "load_config"), (AutoencoderKL, "load_config"), (CLIPTokenizer, "from_pretrained"), (StableDiffusionXLPipeline, "from_pretrained")):
        at_home(cls, name)
    run = prepared(references, base="some/sdxl", revision="v1", rank=2)
    of_base = {(name, revision) for name, revision in asked if revision}
    assert of_base == {(name, "v1") for name in ("UNet2DConditionModel", "AutoencoderKL", "CLIPTokenizer", "StableDiffusionXLPipeline")}
    assert saved_settings(run.settings)["revision"] == "v1"


@pytest.mark.parametrize("change,words", [(dict(variant="fp16"), "variant='fp16': base=.* has no files"), (dict(revision="v1"), "revision='v1': base=.* is a folder"),
                                          (dict(vae="../no/such/vae"), "vae='../no/such/vae': neither"), (dict(vae=f"{TINY_SDXL}/unet"), "vae=.*UNet2DConditionModel")])
def test_errors_of_loading_the_base(references, tmp_path, change, words):
    with pytest.raises(ValueError, match=words): finetune(references, **CAT, output=tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_an_old_torchao_stops_a_run_before_any_work(references, tmp_path, monkeypatch):
    from peft import import_utils
    def refuse(): raise ImportError("Found an incompatible version of torchao. Found version 0.10.0")
    monkeypatch.setattr(import_utils, "is_torchao_available", refuse)
    with pytest.raises(ImportError, match="0.10.0.*torchao>=0.16"): finetune(references, **CAT, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    finetune(references, **CAT, output=tmp_path / "token", rank=0, train_text_encoder_ti=True, max_train_steps=1)    # no LoRA, no matter


# bad numbers

def test_nan_in_the_base_is_named(references, tmp_path):
    shutil.copytree(TINY_SDXL, tmp_path / "base")
    file = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    from safetensors.torch import save_file
    state = load_file(file)
    state["mid_block.resnets.0.conv1.bias"][3] = math.nan
    save_file(state, file, metadata=dict(format="pt"))
    with pytest.raises(ValueError, match="base=.*mid_block.resnets.0.conv1.bias"): finetune(references, **CAT, base=str(tmp_path / "base"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@cuda
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_names_the_step_and_loses_nothing(references, uninterrupted, tmp_path, monkeypatch, what):
    original = dco_loss
    count = [0]
    def broken(*args):
        count[0] += 1
        loss = original(*args)
        if count[0] != 4: return loss
        if what == "loss": return loss * math.nan
        loss.register_hook(lambda grad: grad * math.nan)
        return loss * 1
    monkeypatch.setattr("parallel_rescale.subject.step.dco_loss", broken)
    with pytest.raises(FloatingPointError, match=f"step 4: .*{what}.*saved in .*checkpoint-3"): finetune(references, **RUN, output=tmp_path / "run")
    monkeypatch.setattr("parallel_rescale.subject.step.dco_loss", original)
    assert all(v.isfinite().all() for v in weights(tmp_path / "run/checkpoint-3").values())
    finetune(references, **RUN, output=tmp_path / "run", resume_from_checkpoint="latest")
    assert_same_weights(uninterrupted, tmp_path / "run")


# arguments

@pytest.mark.parametrize("change,words", [
    (dict(loss="dreamboth"), "dreambooth"), (dict(loss=None), "dreambooth"), (dict(crop=None), "center"), (dict(beta=-1.0), "beta=-1.0"), (dict(beta=math.nan), "beta=nan"), (dict(learning_rate=math.inf), "learning_rate=inf"),
    (dict(rank=0), "nothing is left to train"), (dict(rank=1.5), "rank=1.5"), (dict(max_train_steps=0), "max_train_steps=0"), (dict(seed=-1), "seed=-1"),
    (dict(loss="dreambooth", beta=10.0), "beta: belongs to the dco"), (dict(snr_gamma=5.0), "snr_gamma"), (dict(prior_loss_weight=1.0), "prior_loss_weight"),
    (dict(loss="dreambooth", class_data_dir="x"), "class_data_dir"), (dict(validation_steps=3), "validation_prompt"), (dict(validation_prompt="a dog"), "a dog"),
    (dict(mixed_precision="bf61"), "bf16"), (dict(lr_scheduler="cosin"), "cosine"), (dict(crop="centre"), "center"), (dict(class_noun=""), "class_noun"),
    (dict(batched=True, gradient_checkpointing=True), "gradient_checkpointing"), (dict(batched=True, loss="dreambooth"), "batched=True"),
    (dict(target_modules=["to_x"]), "target_modules=.*to_x"), (dict(base="no/such/model/here"), "base='no/such/model/here'"), (dict(resolution=100), "resolution=100"),
    (dict(text_encoder_lr=1e-3), "text_encoder_lr"), (dict(report_to="tensorbord"), "tensorboard"), (dict(output=__file__), "is a file")])
def test_argument_errors_come_before_any_work(references, tmp_path, change, words):
    arguments = CAT | dict(output=tmp_path / "out") | change
    with pytest.raises(ValueError, match=words): finetune(references, **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change,package", [(dict(use_8bit_adam=True), "bitsandbytes"), (dict(report_to="wandb"), "wandb")])
def test_missing_packages_are_named(references, tmp_path, monkeypatch, change, package):
    import importlib.util
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*pip install {package}"): finetune(references, **CAT, output=tmp_path / "out", **change)


def test_the_output_of_others_is_safe(references, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex.*overwrite=True"): finetune(references, **CAT, output=tmp_path, max_train_steps=1)
    with pytest.raises(ValueError, match="thesis.tex"): finetune(references, **CAT, output=tmp_path, max_train_steps=1, resume_from_checkpoint="latest")
    (tmp_path / "README.md").write_text("how to read it")
    with pytest.raises(ValueError, match="no run, and overwrite=True"): finetune(references, **CAT, output=tmp_path, max_train_steps=1, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "thesis.tex"]
    run = tmp_path / "run"
    finetune(references, **CAT, output=run, max_train_steps=1, train_batch_size=1)
    (run / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="resume_from_checkpoint='latest'"): finetune(references, **CAT, output=run, max_train_steps=1)
    finetune(references, **CAT, output=run, max_train_steps=2, train_batch_size=1, checkpointing_steps=1, overwrite=True)
    finetune(references, **CAT, output=run, max_train_steps=1, train_batch_size=1, overwrite=True)
    assert (run / "thesis.tex").read_text() == "years of work"
    assert checkpoints.checkpoints(run) == [] and training_log(run)["step"] == [1]


def test_recommended_goes_by_size(monkeypatch):
    assert recommended()["beta"] == 100 and recommended()["rank"] == 8
    sdxl = dict(sample_size=128, block_out_channels=[320, 640, 1280], addition_embed_type="text_time")
    monkeypatch.setattr("parallel_rescale.subject.defaults.denoiser_config", lambda base, revision=None: sdxl)
    large = recommended("stabilityai/stable-diffusion-xl-base-1.0")
    assert (large["beta"], large["rank"], large["learning_rate"], large["max_train_steps"], large["train_batch_size"]) == (1000, 32, 5e-5, 1000, 1)


# the whole path

def in_two_processes(folder, code):
    "Run a script in two processes that talk through gloo; what they print, and the exit status."
    file = folder / "run.py"
    file.write_text(code)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(file)], capture_output=True,
                          text=True, timeout=600, env=os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"))


@pytest.mark.slow
def test_two_processes_equal_one(references, tmp_path):
    "Two processes of batch 1 take the steps of one process of batch 2."
    done = in_two_processes(tmp_path, script(tmp_path / "two", train_batch_size=1, max_train_steps=3))
    assert done.returncode == 0, done.stderr[-3000:]
    finetune(references, **RUN | dict(train_batch_size=2, max_train_steps=3), output=tmp_path / "one")
    assert json.loads((tmp_path / "two/finetune.json").read_text())["num_processes"] == 2
    one, two = training_log(tmp_path / "one"), training_log(tmp_path / "two")
    assert one["step"] == two["step"] == [1, 2, 3]
    np.testing.assert_allclose(one["mse"], two["mse"], rtol=1e-3)


PAIR = QUICK + """
import os, signal
from pathlib import Path
from parallel_rescale.world.pictures import reference_set
rank, original = int(os.environ["RANK"]), step.{name}
def changed(*args, **kwargs):
    result = original(*args, **kwargs)
    {change}
step.{name} = changed
try: finetuning.finetune(reference_set("pixel_the_cat", "{{subject}}"), output={output!r}, **{settings!r})
except (KeyboardInterrupt, FloatingPointError) as error: Path({output!r}, f"left-{{rank}}").write_text(f"{{type(error).__name__}} {{error}}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name,change,words", [
    ("forward_and_backward", "if rank == 1 and args[0].lr_scheduler.last_epoch == 1: os.kill(os.getpid(), signal.SIGINT)\n    return result",
     "KeyboardInterrupt stopped after step 2, saved in"),
    ("loss_of", "return (result[0] * float('nan') if rank == 1 and args[0].lr_scheduler.last_epoch == 2 else result[0]), result[1]",
     "FloatingPointError step 3: loss is not finite; the weights are those of step 2, saved in")])
def test_two_processes_leave_on_the_same_step(tmp_path, name, change, words):
    "Ctrl-C, or a NaN, in one of them alone: the other would wait for it for ever."
    output = tmp_path / "run"
    done = in_two_processes(tmp_path, PAIR.format(name=name, change=change, output=str(output), settings=RUN))
    left = [(output / f"left-{rank}").read_text() for rank in (0, 1) if (output / f"left-{rank}").exists()]
    assert len(left) == 2 and left[0] == left[1] and left[0].startswith(words), (left, done.stderr[-2000:])
    assert [p.name for p in checkpoints.checkpoints(output)] == ["checkpoint-2"]


@pytest.mark.slow
def test_two_processes_share_the_class_pictures(references, tmp_path):
    settings = RUN | dict(loss="dreambooth", prior_loss_weight=1.0, num_class_images=3, max_train_steps=1)
    output, note = tmp_path / "two", "Path(args[0].settings.output, f'drawn-{rank}').open('a').write('x')\n    return result"
    done = in_two_processes(tmp_path, PAIR.format(name="sample_images", change=f"if args[2].branches: {note}", output=str(output), settings=settings))
    assert done.returncode == 0, done.stderr[-3000:]
    finetune(references, **settings, output=tmp_path / "one")
    drawn = [(output / f"drawn-{rank}").read_text().count("x") for rank in (0, 1)]
    assert drawn == [2 + 2, 1]                                                # numbers 0 and 2, and the card's two; number 1
    for n in range(3): assert (output / f"class_images/{n:03d}.png").read_bytes() == (tmp_path / f"one/class_images/{n:03d}.png").read_bytes()


def test_a_thread_can_train(references, tmp_path):
    "Ctrl-C is watched in the main thread alone; elsewhere, as in a widget, training still runs."
    thread = threading.Thread(target=finetune, args=(references,), kwargs=CAT | dict(output=tmp_path / "run", max_train_steps=1, train_batch_size=1))
    thread.start(); thread.join()
    assert (tmp_path / "run/subject.json").exists()


def test_real_photographs(tmp_path):
    "The embedded model has never seen a photograph: this judges the plumbing alone."
    photos = Path(__file__).resolve().parents[2] / "shared/dreambooth/dog"
    if not photos.is_dir(): pytest.skip("the photographs are not beside this checkout")
    subject = finetune(photos, class_noun="dog", token="<dog>", output=tmp_path / "dog", max_train_steps=4, train_text_encoder_ti=True)
    assert subject.class_noun == "dog" and all(np.isfinite(training_log(subject.folder)["loss"]))
    from PIL import Image
    assert np.asarray(Image.open(Path(subject.folder) / "samples/cfg-0.png")).shape == (64, 64, 3)


# pictures may fail; what was learned may not be lost

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), FloatingPointError("NaN at step 3"), OSError("no space left")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("when", ["validation", "samples"])
def test_pictures_that_fail_cost_a_warning(references, tmp_path, monkeypatch, error, when):
    whole, before = finetune(references, **RUN, output=tmp_path / "whole"), previews.sample_images
    def fails(run, prompts, *args, **kwargs):
        if when == "samples" or prompts == ["a {subject} asleep"]: raise error
        return before(run, prompts, *args, **kwargs)
    monkeypatch.setattr(previews, "sample_images", fails)
    more = dict(validation_prompt=["a {subject} asleep"], validation_steps=2) if when == "validation" else {}
    with pytest.warns(UserWarning, match=f"pictures.* are left out: {error}"): subject = finetune(references, **RUN | more, output=tmp_path / "run")
    assert_same_weights(whole.folder, subject.folder)
    assert Subject.load(tmp_path / "run").token == "<pixel>"


def test_ctrl_c_while_the_samples_are_painted_keeps_the_subject(references, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(previews, "sample_images", interrupted)
    with pytest.raises(KeyboardInterrupt): finetune(references, **RUN, output=tmp_path / "run")
    assert weights(tmp_path / "run") and Subject.load(tmp_path / "run").settings["max_train_steps"] == RUN["max_train_steps"]


def test_a_decoder_that_breaks_is_named():
    from parallel_rescale.subject.adapters import decode
    vae = load_tiny_sdxl().vae
    vae.decoder.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="pictures that are not finite"): decode(vae, torch.zeros(1, vae.config.latent_channels, 16, 16))


def test_a_run_goes_on_in_another_precision(references, uninterrupted, tmp_path):
    "Begun on a card with bf16 and gone on with on one without: the master weights are in float32 anyway."
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    with pytest.warns(UserWarning, match=r"goes on with mixed_precision='bf16' \(was 'no'\)"):
        subject = finetune(references, **RUN | dict(max_train_steps=RUN["max_train_steps"] + 1, lr_scheduler=RUN.get("lr_scheduler", "constant"), mixed_precision="bf16"),
                           output=run, resume_from_checkpoint="latest")
    assert all(v.isfinite().all() for v in weights(subject.folder).values()) and len(training_log(run)["step"]) == RUN["max_train_steps"] + 1
