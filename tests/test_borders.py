"Other architectures than SDXL: the same rules, in stock pipelines with random weights, through `guide` and `guided`."
import gc
import weakref
from dataclasses import fields

import pytest
import torch
from diffusers import (
    AutoencoderKL, AutoPipelineForImage2Image, AutoPipelineForInpainting, DDIMScheduler, FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from parallel_rescale import CFG, ConsistencyGuidance, ParallelRescale, every, guide
from parallel_rescale.machine import adapter_rows as rows_module
from parallel_rescale.machine.adapter_rows import adapter_layers, adapter_rows
from parallel_rescale.machine.architectures import BORDERS, border_of, denoiser_of
from parallel_rescale.machine.denoiser import guided
from parallel_rescale.machine.guide import encode_named, load_subject, named_texts, subject_of, subjects_of, unload_subject
from parallel_rescale.method.registry import known_rules
from parallel_rescale.tools.embedded import TINY_SDXL, load_tiny_sdxl
from parallel_rescale.tools.util import PACKAGE

FOLDER = PACKAGE / "data" / "subject_pixel"
LATENTS = dict(num_inference_steps=3, output_type="latent")
def noise(seed=0): return torch.Generator().manual_seed(seed)


def vae(channels=4):
    return AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=channels,
                         up_block_types=("UpDecoderBlock2D",) * 2)


def encoder(tokenizer, kind, **more):
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                            max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **more)
    return kind(config).eval()


@pytest.fixture(scope="module")
def tokenizer(): return CLIPTokenizer.from_pretrained(TINY_SDXL, subfolder="tokenizer")


@pytest.fixture(scope="module")
def sd15(tokenizer):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    return StableDiffusionPipeline(unet=unet, vae=vae(), text_encoder=encoder(tokenizer, CLIPTextModel), tokenizer=tokenizer,
                                   scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def sd3(tokenizer):
    "With no T5, as people run it on small cards: the pipeline puts zeros in its place."
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
                                        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64)
    encoders = [encoder(tokenizer, CLIPTextModelWithProjection, projection_dim=32) for _ in range(2)]
    return StableDiffusion3Pipeline(transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=encoders[0],
                                    tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None)


@pytest.fixture(scope="module", params=["sd15", "sd3"])
def pipe(request):
    pipe = request.getfixturevalue(request.param)
    pipe.set_progress_bar_config(disable=True)
    model = denoiser_of(pipe)
    if not getattr(model, "peft_config", None):
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.add_adapter(config, adapter_name="subject")
    return pipe


@pytest.fixture(scope="module")
def xl(): return load_subject(load_tiny_sdxl(StableDiffusionXLPipeline), FOLDER)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("negative", [None, "a dog"])
def test_cfg_is_the_stock_pipelines_own(pipe, negative, n):
    stock = pipe("a cat", negative_prompt=negative, guidance_scale=4., generator=noise(), num_images_per_prompt=n, **LATENTS).images
    with guide(pipe, CFG(4.), "a cat", negative_prompt=negative, num_images_per_prompt=n) as generate:
        ours = generate(generator=noise(), **LATENTS).images
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("name", sorted(known_rules()))
def test_every_rule_runs(pipe, name):
    rule = known_rules()[name]
    # SD3 has no middle to spoil
    layers = {"layers": ("block",)} if "layers" in {f.name for f in fields(rule)} else {}
    try: rule = rule(**layers)
    except (TypeError, ValueError): pytest.skip("needs arguments")
    further = {b.prompt: "a cat" for b in rule.branches} | {"base": None}
    further = {k: v for k, v in further.items() if k not in ("null", "subject", "base")}
    calls = []
    hook = denoiser_of(pipe).register_forward_pre_hook(lambda m, args, kwargs: calls.append(1), with_kwargs=True)
    with guide(pipe, rule, "a cat", base_prompt="a cat" if any(b.prompt == "base" for b in rule.branches) else None, prompts=further) as generate:
        out = generate(generator=noise(), **LATENTS).images
    hook.remove()
    assert out.isfinite().all() and len(calls) == 3                                  # one call a step


def test_one_call_is_as_many_and_switching_is_as_scaling(pipe):
    model, rule = denoiser_of(pipe), ConsistencyGuidance(3., 2.)
    def run(**kwargs):
        with guide(pipe, rule, "a cat", base_prompt="a dog", **kwargs) as generate: return generate(generator=noise(), **LATENTS).images
    assert torch.allclose(run(), run(max_rows=1), atol=1e-4)
    embeds = encode_named(pipe, rule, dict(prompt="a cat"), named_texts(pipe, rule, "a cat", "a dog"))
    border, x, seen = border_of(model), torch.randn(1, 4, 16, 16, generator=noise(2)), {}
    def ask(p): return model(**{border.sample: x, "timestep": torch.tensor([500.])} | border.say({}, p.hidden, p.pooled, {}), return_dict=False)[0]
    with torch.no_grad():
        with guided(model, rule, embeds, on_step=lambda i, n, t, predictions, combined: seen.update(predictions)): ask(embeds["subject"])
        model.disable_adapters()
        null, base = ask(embeds["null"]), ask(embeds["base"])
        model.enable_adapters()
        expected = {("null", 0.): null, ("base", 0.): base, ("subject", 1.): ask(embeds["subject"])}
    assert seen.keys() == expected.keys() and all(torch.allclose(seen[k], v, atol=1e-4) for k, v in expected.items())


def test_steps_are_counted_by_each_scheduler(pipe):
    seen = []
    with guide(pipe, every(CFG(lambda u: 1 + u), 2), "a cat") as generate: generate(generator=noise(), **LATENTS)
    with guided(denoiser_of(pipe), CFG(2.), {n: e for n, e in zip(("null", "subject"), two_prompts(pipe))}, scheduler=pipe.scheduler,
                on_step=lambda i, n, *_: seen.append((i, n))):
        pipe("a cat", guidance_scale=1., generator=noise(), **LATENTS)
    assert seen == [(0, 3), (1, 3), (2, 3)]


def two_prompts(pipe):
    embeds = encode_named(pipe, CFG(), dict(prompt="a cat"), {})
    return embeds["null"], embeds["subject"]


def test_a_wrong_argument_is_named_before_any_work(pipe):
    for bad in ("guidance_scale", "prompt", "num_images_per_prompt"):
        with pytest.raises(ValueError, match=f"{bad}: belongs to"), guide(pipe, CFG(), "a cat") as generate: generate(**{bad: 1})
    with pytest.raises(ValueError, match="without nonsense"), guide(pipe, CFG(), "a cat", nonsense=1): pass
    with pytest.raises(ValueError, match="does not take 'refrence'"), guide(pipe, ParallelRescale(), "a cat", prompts={"refrence": "a"}): pass


def test_borders_are_told_apart(sd15, sd3, xl):
    assert [border_of(denoiser_of(p)).__name__ for p in (sd15, xl, sd3)] == ["Border", "SDXLBorder", "SD3Border"]
    assert len({b.__name__ for b in BORDERS}) == len(BORDERS)
    with pytest.raises(ValueError, match="does not know how a Linear is called"), guided(torch.nn.Linear(1, 1), CFG(adapter=0), {}): pass


def test_a_controlnet_of_sd3_is_refused(sd3):
    null, subject = two_prompts(sd3)
    call = dict(hidden_states=torch.randn(1, 4, 16, 16), timestep=torch.tensor([500.]), encoder_hidden_states=subject.hidden,
                pooled_projections=subject.pooled, block_controlnet_hidden_states=[torch.zeros(1, 256, 32)])
    with pytest.raises(ValueError, match="ControlNet"), guided(sd3.transformer, CFG(adapter=0), {"null": null, "base": subject}): sd3.transformer(**call)


@pytest.mark.parametrize("kind", [AutoPipelineForImage2Image, AutoPipelineForInpainting], ids=["img2img", "inpaint"])
def test_cfg_is_stock_in_other_tasks(xl, kind):
    task = kind.from_pipe(xl)
    task.set_progress_bar_config(disable=True)
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    more = dict(image=picture, strength=.7, num_inference_steps=6, output_type="latent")
    if kind is AutoPipelineForInpainting: more["mask_image"] = Image.linear_gradient("L").resize((64, 64))
    with guide(task, CFG(4.), "a {subject} on the beach") as generate: ours = generate(generator=noise(), **more).images
    assert torch.equal(ours, task("a <pixel> on the beach", guidance_scale=4., generator=noise(), **more).images)
    with guide(task, ParallelRescale(3., 2.), "a {subject} on the beach") as generate: assert generate(generator=noise(), **more).images.isfinite().all()


def test_what_one_pipeline_loads_the_others_know(xl):
    other = AutoPipelineForImage2Image.from_pipe(xl)
    assert subject_of(other) == subject_of(xl) and subjects_of(other) is subjects_of(xl)


def test_an_unloaded_lora_is_let_go():
    pipe = load_subject(load_tiny_sdxl(), FOLDER)
    lora = [weakref.ref(p) for layer in adapter_layers(pipe.unet) for p in layer.lora_A.parameters()]
    with torch.no_grad(), adapter_rows(pipe.unet, [0., 1.]): pass
    unload_subject(pipe)
    gc.collect()
    assert len(lora) > 20 and not any(p() is not None for p in lora)


def test_a_model_without_adapters_is_searched_once(monkeypatch):
    unet = load_tiny_sdxl().unet
    walks = []
    monkeypatch.setattr(type(unet), "modules", lambda self, *a, **k: walks.append(1) or torch.nn.Module.modules(self, *a, **k))
    for _ in range(3): assert adapter_layers(unet) == []
    assert len(walks) == 1
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert adapter_layers(unet) and rows_module._known_layers[unet][0]


def test_torchao_is_looked_at_before_a_lora_is_loaded(monkeypatch):
    import peft.import_utils
    def raises(): raise ImportError("Found an incompatible version of torchao")
    monkeypatch.setattr(peft.import_utils, "is_torchao_available", raises)
    pipe = load_tiny_sdxl()
    with pytest.raises(ImportError, match='pip install --no-deps -U "torchao>=0.16"'): load_subject(pipe, FOLDER)
    assert not subjects_of(pipe) and not getattr(pipe.unet, "peft_config", {})


def test_attention_changes_its_own_row_alone(xl):
    "Each kind, in one row of three; the others are as they are without it, and afterwards all are."
    from parallel_rescale import Attention
    from parallel_rescale.machine.attention_rows import attention_rows
    g = noise(3)
    x = dict(sample=torch.randn(3, 4, 16, 16, generator=g), timestep=500, encoder_hidden_states=torch.randn(3, 32, 128, generator=g), added_cond_kwargs=dict(
        text_embeds=torch.randn(3, 64, generator=g), time_ids=torch.tensor([[64., 64, 0, 0, 64, 64]] * 3)))
    with torch.no_grad():
        plain = xl.unet(**x).sample
        for kind in Attention.KINDS:
            with adapter_rows(xl.unet, [0., 1., .5]), attention_rows(xl.unet, [None, Attention(kind, .2, ("block",)), None]): changed = xl.unet(**x).sample
            with adapter_rows(xl.unet, [0., 1., .5]): same = xl.unet(**x).sample
            apart = (changed - same).abs().amax((1, 2, 3))
            assert apart[1] > 1e-3 and apart[[0, 2]].max() < 1e-4, kind
        with pytest.raises(ValueError, match="no self-attention in attic"), attention_rows(xl.unet, [Attention("skip", layers="attic")]): pass
        assert torch.equal(xl.unet(**x).sample, plain)


def test_a_distracted_row_is_one_more_of_the_same_call(xl):
    from parallel_rescale import PerturbedAttention
    def run(**more):
        with guide(xl, PerturbedAttention(3., 1., layers=("block",)), "a {subject}", **more) as generate: return generate(generator=noise(), **LATENTS).images
    rows = []
    hook = xl.unet.conv_in.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    whole = run()
    hook.remove()
    assert rows == [3, 3, 3] and torch.allclose(whole, run(max_rows=1), atol=2e-3)


def test_a_controlnet_is_refused_at_the_first_step_even_where_one_branch_begins(sd15):
    "A schedule that asks one question first would let it pass, and stop in the middle of a run."
    from parallel_rescale import interval
    null, subject = two_prompts(sd15)
    call = dict(sample=torch.randn(1, 4, 16, 16), timestep=500, encoder_hidden_states=subject.hidden, mid_block_additional_residual=torch.zeros(1, 64, 8, 8))
    with pytest.raises(ValueError, match="ControlNet"), guided(sd15.unet, interval(CFG(adapter=0), .5, 1.), {"null": null, "base": subject}): sd15.unet(**call)
