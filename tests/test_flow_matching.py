"""Teaching flow-matching models: SD3, FLUX.1 and Z-Image with random weights, built here and written to folders as the Hub has them."""
import json
import math
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from safetensors.torch import load_file
from tiny_pipelines import letters, t5, tiny

from parallel_rescale.machine.adapter_rows import adapter_rows
from parallel_rescale.machine.architectures import border_of, denoiser_of
from parallel_rescale.machine.guide import load_subject, subject_of, unload_subject
from parallel_rescale.machine.saved_subject import Subject, base_signature
from parallel_rescale.method.rules import CFG
from parallel_rescale.subject import previews
from parallel_rescale.subject.adapters import embed, rows_of
from parallel_rescale.subject.checkpoints import step_generator, training_log
from parallel_rescale.subject.data import make_batch, random_choices, sample_latents
from parallel_rescale.subject.defaults import native_resolution, recommended
from parallel_rescale.subject.finetuning import finetune, prepared_run
from parallel_rescale.machine.flow_architectures import pack, unpack
from parallel_rescale.subject.flow_matching import FLOWS, denoiser_config, levels_of_a_flow, places, training_noise
from parallel_rescale.subject.losses import dco_loss, min_snr_weight, mse, predict, theta_and_phi
from parallel_rescale.subject.references import as_references
from parallel_rescale.subject.step import loss_of, micro_batches, subject_text, train_step
from parallel_rescale.tools.embedded import load_tiny_sdxl
from parallel_rescale.tools.util import quietly
from parallel_rescale.world.pictures import reference_set

CAT = dict(class_noun="cat", token="<pixel>", resolution=32)
NAMES = ["sd3", "flux", "z_image"]


# the schedulers with the shifts that these models have

SCHEDULERS = dict(sd3=dict(shift=3.0), flux=dict(shift=3.0, use_dynamic_shifting=True), z_image=dict(shift=3.0))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "Name → the folder of a model, as `from_pretrained` reads it."
    folder = tmp_path_factory.mktemp("bases")
    for name, kind in dict(sd3="sd3", flux="flux1", z_image="z_image").items():
        pipe = tiny(kind, adapter=None).pipe
        pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS[name]))
        if name == "sd3": pipe.register_modules(text_encoder_3=t5(64), tokenizer_3=letters())       # saved, all parts must be there
        # the last layers of these classes begin at zero, and a velocity of zero would have no gradient
        for p in pipe.transformer.parameters():
            if not p.any(): torch.nn.init.normal_(p, std=0.05)
        pipe.save_pretrained(folder / name)
    return {name: str(folder / name) for name in NAMES}


@pytest.fixture(scope="module", params=NAMES)
def base(request, bases): return bases[request.param]


@pytest.fixture(scope="module")
def references(): return as_references(reference_set("pixel_the_cat", "{subject}"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("parallel_rescale.subject.previews.SAMPLE_STEPS", 1)
    monkeypatch.setattr("parallel_rescale.subject.previews.SAMPLE_PROMPTS", previews.SAMPLE_PROMPTS[:1])


def paints(base):
    "Whether guidance knows this architecture, so that a run can paint with its rules."
    with quietly(): model = DiffusionPipeline.from_pretrained(base).transformer
    try: return bool(border_of(model))
    except ValueError: return False


def prepared(references, base, **changed): return prepared_run(references, **CAT | dict(base=base, train_batch_size=3) | changed)


def stirred(run):
    "LoRA weights that are not the identity any more."
    for p in run.trained: p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
    return run


# the loss of a batch is the training script's, written out

def script_inputs(run, step=0):
    "Latents, noise, sigmas and timesteps as in examples/dreambooth/train_dreambooth_lora_*.py, with this run's random numbers."
    s, scheduler = run.settings, FlowMatchEulerDiscreteScheduler.from_pretrained(run.settings.base, subfolder="scheduler")
    n = s.train_batch_size
    g = step_generator(s.seed, step, 0)
    which = torch.randint(len(run.data.moments), (n,), generator=g)
    scheme = "logit_normal" if "SD3" in type(run.model).__name__ else "none"
    u = compute_density_for_timestep_sampling(weighting_scheme=scheme, batch_size=n, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=g)
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[[(scheduler.timesteps == t).nonzero().item() for t in timesteps]].flatten().view(-1, 1, 1, 1)
    shape = run.data.moments.shape[2:]
    mean, std = run.data.moments[which].unbind(1)
    sample = mean + std * torch.randn(n, *shape, generator=g)
    model_input = (sample - run.pipe.vae.config.shift_factor) * run.pipe.vae.config.scaling_factor
    return which, model_input, torch.randn(n, *shape, generator=g), sigmas, timesteps


def script_prediction(run, noisy, timesteps, captions):
    "The call of each script, with the pipeline's own packing."
    pipe, model = run.pipe, run.model
    if isinstance(pipe, StableDiffusion3Pipeline):
        hidden, _, pooled, _ = pipe.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
        return model(hidden_states=noisy, timestep=timesteps, encoder_hidden_states=hidden, pooled_projections=pooled, return_dict=False)[0]
    if isinstance(pipe, FluxPipeline):
        hidden, pooled, text_ids = pipe.encode_prompt(captions, captions)
        b, c, h, w = noisy.shape
        out = model(hidden_states=FluxPipeline._pack_latents(noisy, b, c, h, w), timestep=timesteps / 1000, guidance=torch.tensor([1.0]).expand(b), pooled_projections=pooled,
                    encoder_hidden_states=hidden, txt_ids=text_ids, img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, noisy.device, noisy.dtype), return_dict=False)[0]
        return FluxPipeline._unpack_latents(out, height=h * 2, width=w * 2, vae_scale_factor=2)
    hidden, _ = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)
    out = model(list(noisy.unsqueeze(2).unbind(dim=0)), (1000 - timesteps) / 1000, hidden, return_dict=False)[0]
    return -torch.stack(out, dim=0).squeeze(2)


def captions_of(run, which): return [run.references[i].caption.replace("{subject}", "<pixel>") for i in which]


def test_dreambooth_is_the_scripts_loss(references, base):
    run = stirred(prepared(references, base, loss="dreambooth"))
    which, model_input, noise, sigmas, timesteps = script_inputs(run)
    with torch.no_grad():
        model_pred = script_prediction(run, (1.0 - sigmas) * model_input + sigmas * noise, timesteps, captions_of(run, which))
        weighting = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
        target = noise - model_input
        script = torch.mean((weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()
        ours, log = loss_of(run, next(micro_batches(run, run.data, 0)))
    torch.testing.assert_close(ours, script, rtol=1e-5, atol=1e-6)
    assert log["mse"] == ours and run.model.training is False


def test_the_three_errors_of_one_prediction(references, base):
    "SD3's script predicts the picture by default (precondition_outputs): σ² times the velocity's error. The noise's is (1−σ)² times that."
    run = prepared(references, base, loss="dreambooth")
    which, x, noise, sigmas, timesteps = script_inputs(run)
    x_t = (1.0 - sigmas) * x + sigmas * noise
    with torch.no_grad(): v = script_prediction(run, x_t, timesteps, captions_of(run, which))
    error, sigma = mse(v, noise - x), sigmas.flatten()
    torch.testing.assert_close(mse(v * (-sigmas) + x_t, x), sigma**2 * error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mse(x_t + (1 - sigmas) * v, noise), (1 - sigma) ** 2 * error, rtol=1e-4, atol=1e-5)
    snr = ((1 - sigma) / sigma) ** 2                                             # min-SNR of the picture's error, in terms of the velocity's
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "flow") * error, snr.clamp(max=5) * sigma**2 * error)


def test_dco_compares_with_the_base(references, base):
    run = stirred(prepared(references, base, beta=30.0))
    which, x, noise, sigmas, timesteps = script_inputs(run)
    x_t, nouns = (1.0 - sigmas) * x + sigmas * noise, [r.caption.replace("{subject}", "cat") for r in references]
    with torch.no_grad():
        theta = mse(script_prediction(run, x_t, timesteps, captions_of(run, which)), noise - x)
        run.model.disable_adapters()
        phi = mse(script_prediction(run, x_t, timesteps, [nouns[i] for i in which]), noise - x)
        run.model.enable_adapters()
        loss, log = loss_of(run, next(micro_batches(run, run.data, 0)))
    assert (theta - phi).abs().min() > 1e-5
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(-30.0 * (theta - phi)).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log["mse_reference"], phi.mean(), rtol=1e-4, atol=1e-5)


def test_dco_at_its_limits(references, base):
    "β → 0 is DreamBooth's gradient times β/2 (and the loss log 2); β → ∞ asks only for samples that are behind."
    def gradient(**settings):
        run = stirred(prepared(references, base, **settings))
        loss, _ = loss_of(run, next(micro_batches(run, run.data, 0)))
        loss.backward()
        return loss.item(), run.trained[0].grad.clone()
    (flat, small), (_, plain) = gradient(beta=1e-4), gradient(loss="dreambooth")
    assert flat == pytest.approx(math.log(2), abs=1e-4)
    torch.testing.assert_close(small / (1e-4 / 2), plain, rtol=1e-2, atol=1e-3 * plain.abs().max().item())
    run = stirred(prepared(references, base))
    batch = next(micro_batches(run, run.data, 0))
    with torch.no_grad(): theta, phi = theta_and_phi(run.model, batch, subject_text(run, batch), rows_of(run.text.base, batch.source))
    behind = (mse(theta, batch.target) - mse(phi, batch.target)).clamp(min=0).mean().item()
    assert gradient(beta=1e7)[0] / 1e7 == pytest.approx(behind, rel=1e-3, abs=1e-6)


def test_previews_ask_for_no_more_guidance_than_training(references, bases):
    run, told = prepared(references, bases["flux"]), []
    hook = run.model.register_forward_pre_hook(lambda model, args, kwargs: told.append(kwargs["guidance"]), with_kwargs=True)
    previews.sample_latents_of(run, "a photo of a {subject}", CFG(5.0), seed=0)
    hook.remove()
    assert told and all((guidance == 1).all() for guidance in told)


def test_phi_is_the_base_and_one_call_is_two(references, base):
    run = stirred(prepared(references, base))
    with quietly(): untouched = DiffusionPipeline.from_pretrained(base).transformer.eval()
    batch = next(micro_batches(run, run.data, 0))
    subject, noun = subject_text(run, batch), rows_of(run.text.base, batch.source)
    for batched in (False, True):
        theta, phi = theta_and_phi(run.model, batch, subject, noun, batched)
        assert theta.requires_grad and not phi.requires_grad and theta.shape == batch.x_t.shape
        with torch.no_grad(): torch.testing.assert_close(phi, predict(untouched, batch.x_t, batch.t, noun, None), rtol=1e-4, atol=1e-5)
        assert (theta - phi).abs().max() > 1e-3
    torch.testing.assert_close(theta, theta_and_phi(run.model, batch, subject, noun)[0], rtol=1e-4, atol=1e-5)


# noise levels

@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift,dynamic", [(1.0, False), (3.0, False), (3.0, True)])
def test_noise_levels_are_drawn_as_the_scripts_draw_them(density, shift, dynamic):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    t = levels_of_a_flow(scheduler, density)(200_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000
    u = 1 - torch.rand(200_000, generator=torch.Generator().manual_seed(1)) if density == "uniform" else torch.randn(200_000, generator=torch.Generator().manual_seed(1)).sigmoid()
    k = 1.0 if dynamic else shift                                                # the scripts shift by the fixed shift alone
    expected = k * u / (1 + (k - 1) * u)
    q = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(scheduler.sigmas[t].quantile(q), expected.quantile(q), rtol=0, atol=5e-3)


def test_training_has_all_noise_levels_whatever_sampling_uses():
    sampling = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampling.set_timesteps(4)
    assert len(training_noise(sampling).timesteps) == 1000 and len(sampling.timesteps) == 4
    assert type(training_noise(DDIMScheduler())).__name__ == "DDPMScheduler"


def test_latents_packed_and_back():
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 8)) and torch.equal(unpack(pack(x), (3, 4)), x)
    assert torch.equal(places(6, 8, "cpu").float(), FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


# settings

@pytest.mark.parametrize("change,words", [
    (dict(train_text_encoder_ti=True), "train_text_encoder_ti=True: words are learned for SDXL alone"), (dict(token="two words"), "token='two words': has a space"),
    (dict(rank=0), "nothing is left to train"), (dict(timestep_density="often"), "timestep_density"),
    (dict(target_modules=["no_such_layer"]), "target_modules"), (dict(revision="v1"), "is a folder here")])
def test_one_clear_error(references, base, tmp_path, change, words):
    with pytest.raises(ValueError, match=words): finetune(references, **CAT | dict(base=base, output=tmp_path / "out") | change)
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(references, bases, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(bases["sd3"], folder)
    file = folder / "transformer/config.json"
    file.write_text(file.read_text().replace("SD3Transformer2DModel", "SanaTransformer2DModel"))
    with pytest.raises(ValueError, match="SanaTransformer2DModel; those that can be taught are SDXL's UNet, SD3"): finetune(references, **CAT, base=folder, output=tmp_path / "out")
    config = json.loads(Path(bases["flux"], "transformer/config.json").read_text()) | dict(in_channels=96)
    shutil.copytree(bases["flux"], tmp_path / "fill")
    (tmp_path / "fill/transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="reads 96 channels, expected 16"): finetune(references, **CAT, base=tmp_path / "fill", output=tmp_path / "out")
    with pytest.raises(ValueError, match="timestep_density: belongs to flow"): finetune(references, class_noun="cat", token="<pixel>", timestep_density="uniform", output=tmp_path / "out")
    with pytest.raises(ValueError, match="neither a folder nor a Hub model"): denoiser_config(tmp_path)


def test_what_is_recommended(bases, monkeypatch):
    small = recommended(bases["sd3"])
    assert small["timestep_density"] == "logit_normal" and small["target_modules"] == FLOWS["SD3Transformer2DModel"].targets and small["learning_rate"] == 1e-3
    assert "timestep_density" not in recommended() and native_resolution(bases["sd3"]) == 32 and native_resolution(bases["z_image"]) == 256
    large = dict(_class_name="ZImageTransformer2DModel", dim=3840)
    monkeypatch.setattr("parallel_rescale.subject.defaults.denoiser_config", lambda base, revision=None: large)
    found = recommended("Tongyi-MAI/Z-Image")
    assert found["timestep_density"] == "uniform" and found["learning_rate"] == 1e-4 and found["beta"] == 200 and found["max_train_steps"] == 1000


def test_the_default_beta_is_that_of_the_noises_error():
    "1000, DCO's β on SDXL, times the mean of (1−σ)² over each model's own noise levels (shift 3 for SD3 and Z-Image, none for FLUX.1), to one digit."
    for name, k in dict(SD3Transformer2DModel=3.0, FluxTransformer2DModel=1.0, ZImageTransformer2DModel=3.0).items():
        scheduler = FlowMatchEulerDiscreteScheduler(shift=k)
        sigma = scheduler.sigmas[levels_of_a_flow(scheduler, FLOWS[name].density)(100_000, torch.Generator().manual_seed(0))]
        mean = 1000 * ((1 - sigma) ** 2).mean().item()
        assert round(mean, -2) == FLOWS[name].beta, (name, mean)


# a run: learned, killed, resumed, loaded

RUN = dict(**CAT, max_train_steps=5, checkpointing_steps=2, train_batch_size=2, lr_scheduler="linear", rank=2)
QUICK = """import torch; torch.set_num_threads(1)
from parallel_rescale.subject import finetuning, previews
previews.SAMPLE_STEPS, previews.SAMPLE_PROMPTS = 1, previews.SAMPLE_PROMPTS[:1]
"""


def weights(folder): return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and a and [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.fixture(scope="module")
def trained(references, base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel_rescale.subject.previews.SAMPLE_STEPS", 1)
        patch.setattr("parallel_rescale.subject.previews.SAMPLE_PROMPTS", previews.SAMPLE_PROMPTS[:1])
        return finetune(references, **RUN, base=base, output=tmp_path_factory.mktemp("trained") / "run", validation_prompt="a {subject} in the snow", validation_steps=4)


def test_the_saved_folder(trained, base):
    folder = Path(trained.folder)
    names = {p.name for p in folder.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "subject.json", "README.md", "training_log.jsonl"} <= names and "learned_embeds.safetensors" not in names
    assert trained == Subject.load(folder) and trained.base == base and trained.settings["timestep_density"] and "beta" in trained.settings
    if paints(base): assert len(list((folder / "validation").iterdir())) == 1 and (folder / "samples/grid.png").exists()
    state, card = weights(folder), (folder / "README.md").read_text()
    assert all(k.startswith("transformer.") for k in state) and {v.dtype for v in state.values()} == {torch.float32}
    assert f'DiffusionPipeline.from_pretrained("{base}", torch_dtype=dtype)' in card and "load_textual_inversion" not in card


def test_training_lowers_the_loss(references, base):
    "On the same noise as before, so that other pictures and noise levels do not hide it."
    for loss in ("dco", "dreambooth"):
        run = prepared(references, base, loss=loss, train_batch_size=4, learning_rate=3e-3)
        def error():
            with torch.no_grad(): return torch.stack([loss_of(run, batch)[0] for step in range(100, 108) for batch in micro_batches(run, run.data, step)]).mean().item()
        before = error()
        for step in range(12): train_step(run, step)
        assert error() < before, loss


def test_the_same_seed_gives_the_same_weights_and_another_others(references, trained, base, tmp_path):
    torch.manual_seed(99); torch.randn(7)
    finetune(references, **RUN, base=base, output=tmp_path / "again")
    assert_same_weights(trained.folder, tmp_path / "again")
    finetune(references, **RUN | dict(max_train_steps=1), base=base, output=tmp_path / "other", seed=1)
    assert any(not torch.equal(v, weights(trained.folder)[k]) for k, v in weights(tmp_path / "other").items())


@pytest.mark.parametrize("which", ["latest", "checkpoint-2"])
def test_resume_equals_an_uninterrupted_run(references, trained, base, tmp_path, which):
    shutil.copytree(trained.folder, tmp_path / "run")
    for name in ("subject.json", "pytorch_lora_weights.safetensors"): (tmp_path / "run" / name).unlink()
    finetune(references, **RUN, base=base, output=tmp_path / "run", resume_from_checkpoint=which)
    assert_same_weights(trained.folder, tmp_path / "run")
    assert training_log(tmp_path / "run") == training_log(trained.folder)


@pytest.mark.parametrize("base", [pytest.param(name, marks=[pytest.mark.slow] * (name != "flux")) for name in NAMES], indirect=True)
def test_killed_and_resumed(references, base, tmp_path):
    "SIGKILL at an arbitrary moment after the first checkpoint; the run is long enough not to be over by then."
    output, long = tmp_path / "run", RUN | dict(base=base, max_train_steps=24, checkpointing_steps=3)
    script = QUICK + textwrap.dedent(f"""
        from parallel_rescale.world.pictures import reference_set
        finetuning.finetune(reference_set("pixel_the_cat", "{{subject}}"), output={str(output)!r}, **{long!r})""")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.time() + 300
    while not (output / "checkpoint-3").exists():
        assert time.time() < end and process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (output / "subject.json").exists()
    finetune(references, **long, output=output, resume_from_checkpoint="latest")
    finetune(references, **long, output=tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", output)
    assert training_log(tmp_path / "whole") == training_log(output)


def draw(pipe, words="a photo of a <pixel>"):
    pipe.set_progress_bar_config(disable=True)
    return pipe(words, num_inference_steps=2, height=32, width=32, output_type="latent", generator=torch.Generator().manual_seed(0)).images


def stock(base):
    with quietly(): return DiffusionPipeline.from_pretrained(base)


def stronger(folder, to, factor=300.0):
    "A copy of a subject whose few steps are seen more clearly."
    from safetensors import safe_open
    from safetensors.torch import save_file
    shutil.copytree(folder, to)
    file = to / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as f: header = f.metadata()
    save_file({k: v * factor if "lora_B" in k else v for k, v in load_file(file).items()}, file, metadata=header)
    return to


def test_the_stock_pipeline_loads_it_and_paints_something_else(trained, base, tmp_path):
    folder, pipe = stronger(trained.folder, tmp_path / "subject"), stock(base)
    before = draw(pipe)
    with quietly(): pipe.load_lora_weights(folder)
    there = draw(pipe)
    assert (there - before).abs().max() > 1e-3
    ours = load_subject(stock(base), folder)
    assert torch.equal(draw(ours), there) and subject_of(ours).token == "<pixel>"
    with adapter_rows(denoiser_of(ours), 0.0): assert torch.equal(draw(ours), before)
    unload_subject(ours)
    assert torch.equal(draw(ours), before) and subject_of(ours) is None


def test_a_checkpoint_is_the_model_that_was_trained(references, trained, base):
    from parallel_rescale.subject.resuming import load_checkpoint
    run = prepared_run(references, **RUN, base=base)
    load_checkpoint(run, Path(trained.folder) / "checkpoint-4")
    pipe = load_subject(stock(base), Path(trained.folder) / "checkpoint-4")
    batch = next(micro_batches(run, run.data, 9))
    with torch.no_grad():
        ours = predict(run.model, batch.x_t, batch.t, subject_text(run, batch), None)
        theirs = predict(pipe.transformer, batch.x_t, batch.t, rows_of(embed(pipe, captions_of(run, range(4))), batch.source), None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_subject_of_another_architecture_does_not_fit(trained, bases, base):
    other = next(b for b in bases.values() if b != base)
    with pytest.raises(ValueError, match="was made for .*, which does not fit"): load_subject(stock(other), trained.folder)
    with pytest.raises(ValueError, match="was made for .*, which does not fit"): load_subject(load_tiny_sdxl(StableDiffusionXLPipeline), trained.folder)
    assert "block_out_channels" not in base_signature(stock(base).transformer)


# half precision, prior preservation, memory

@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_base_is_in_half_precision_and_the_lora_is_not(references, base, precision):
    run = prepared(references, base, mixed_precision=precision)
    whole = prepared(references, base)
    assert {p.dtype for n, p in run.model.named_parameters() if "lora" not in n} <= {dict(bf16=torch.bfloat16, fp16=torch.float16)[precision], torch.float32}
    assert {p.dtype for n, p in run.model.named_parameters() if "lora" in n} == {torch.float32} and run.pipe.vae.dtype == torch.float32
    assert torch.equal(run.data.moments, whole.data.moments)                     # latents are those of float32
    before = run.trained[0].detach().clone()
    logs, others = (train_step(r, 0) for r in (run, whole))
    assert logs["mse"] == pytest.approx(others["mse"], rel=0.05) and not torch.equal(run.trained[0], before)


def test_dreambooth_with_prior_and_snr(references, base, tmp_path):
    (tmp_path / "cats").mkdir()
    references[0].image.save(tmp_path / "cats/0.png")
    given = dict(num_class_images=1) if paints(base) else dict(class_data_dir=tmp_path / "cats")
    finetune(references, **RUN | dict(loss="dreambooth", prior_loss_weight=0.5, snr_gamma=5.0, max_train_steps=2) | given, base=base, output=tmp_path / "run")
    log = training_log(tmp_path / "run")
    assert log["step"] == [1, 2] and all(map(math.isfinite, log["prior"]))
    if paints(base): assert len(list((tmp_path / "run/class_images").iterdir())) == 1


def test_gradient_checkpointing_changes_no_gradient(references, base):
    plain, saving = (stirred(prepared(references, base, gradient_checkpointing=b)) for b in (False, True))
    assert saving.model.training
    for run in (plain, saving): loss_of(run, next(micro_batches(run, run.data, 0)))[0].backward()
    torch.testing.assert_close(plain.trained[0].grad, saving.trained[0].grad, rtol=1e-4, atol=1e-6)


def test_a_step_does_not_depend_on_how_it_is_cut(references, base):
    whole, cut = prepared(references, base, train_batch_size=4), prepared(references, base, train_batch_size=1, gradient_accumulation_steps=4)
    logs = [train_step(run, 0) for run in (whole, cut)]
    for k in logs[0]: assert logs[0][k] == pytest.approx(logs[1][k], rel=1e-4), k


def test_other_densities_can_be_asked_for(references, base):
    a, b = (prepared(references, base, timestep_density=d, train_batch_size=64) for d in ("uniform", "logit_normal"))
    spread = [next(micro_batches(r, r.data, 0)).snr.log().std().item() for r in (a, b)]
    assert spread[0] > spread[1]                                                 # of the logit-normal, more in the middle


def test_long_captions_are_told(references, base):
    long = [(references[0].image, "a photo of a {subject} " + "very long " * 80)]
    with pytest.warns(UserWarning, match="tokens; the text encoders read the first"): prepared(long, base)
