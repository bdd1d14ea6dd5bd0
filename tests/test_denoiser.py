"The denoiser: equal to stock diffusers where it should be, one call equal to many, and the UNet as it was."
import copy
import gc
import math

import pytest
import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler,
                       StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, UNet2DConditionModel)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from tiny_pipelines import tiny

from parallel_rescale.machine.adapter_rows import adapter_layers, adapter_rows, Rows, RowScale
from parallel_rescale.machine.architectures import repeat_rows
from parallel_rescale.machine.denoiser import guided
from parallel_rescale.machine.prompts import encode_prompts, PromptEmbeds
from parallel_rescale.method.guidance import Branch, Guidance
from parallel_rescale.method.rules import AutoGuidance, CFG, ConsistencyGuidance, OrthogonalOnly
from parallel_rescale.method.rules import ParallelRescale, PersonalizationGuidance
from parallel_rescale.method.schedules import every, interval
from parallel_rescale.tools.embedded import load_tiny_sdxl, TINY_SDXL

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = ATTENTION + ["conv1", "conv_in", "time_emb_proj", "linear_1", "proj_in", "ff.net.2"]  # inputs of 2, 3 and 4 dimensions
STEPS = 4
CHANNELS = UNet2DConditionModel.load_config(TINY_SDXL, subfolder="unet")["in_channels"]


def add_lora(unet, name, targets, rank=4, alpha=4, seed=0, **kwargs):
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **kwargs), adapter_name=name)
    g = torch.Generator().manual_seed(seed)
    for key, p in unet.named_parameters():
        if f".{name}." in key: p.data = torch.randn(p.shape, generator=g) * (.1 if "lora_A" in key else .05)
    unet.requires_grad_(False)


@pytest.fixture(scope="module")
def pipe():
    return load_tiny_sdxl(device="cpu")


@pytest.fixture(scope="module")
def adapted():
    "A pipeline with two adapters, both active, with weights of their own."
    pipe = load_tiny_sdxl(device="cpu")
    add_lora(pipe.unet, "dog", EVERYWHERE, seed=1)
    add_lora(pipe.unet, "cat", ATTENTION, rank=2, alpha=3, seed=2)
    pipe.unet.set_adapters(["dog", "cat"], [1.0, 0.5])
    return pipe


def embeds(pipe, n=2, **texts):
    texts = {"null": "", "base": "a photo of a cat", "subject": "a photo of a dog"} | texts
    return encode_prompts(pipe, {k: v if isinstance(v, list) else [v] * n for k, v in texts.items()})


def sample(pipe, prompt="ignored", seed=0, n=2, **kwargs):
    kwargs = dict(num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent") | kwargs
    return pipe([prompt] * n, generator=torch.Generator().manual_seed(seed), **kwargs).images


def call_arguments(n=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    added = dict(text_embeds=torch.randn(n, 64, generator=g).to(dtype), time_ids=torch.tensor([[64., 64, 0, 0, 64, 64]] * n).to(dtype))
    return dict(sample=torch.randn(n, CHANNELS, 16, 16, generator=g).to(dtype), timestep=500, encoder_hidden_states=torch.randn(n, 32, 128, generator=g).to(dtype),
                added_cond_kwargs=added)


def state(module):
    "Everything about a UNet that `guided` could leave changed."
    scalings = [dict(m.scaling) | {"off": m._disable_adapters, "active": list(m.active_adapters), "dropout": [id(d) for d in m.lora_dropout.values()]} for m in module.modules() if isinstance(m, LoraLayer)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in module.modules()]
    return scalings, hooks, {k: (v.data_ptr(), v._version) for k, v in module.state_dict().items()}


# --- equal to stock diffusers, bit for bit ---

SCHEDULERS = dict(euler=EulerDiscreteScheduler, ancestral=EulerAncestralDiscreteScheduler, dpm=DPMSolverMultistepScheduler, heun=HeunDiscreteScheduler, ddim=DDIMScheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_cfg_is_the_stock_pipeline(pipe, name):
    other = type(pipe)(**pipe.components | {"scheduler": SCHEDULERS[name].from_config(pipe.scheduler.config)}, force_zeros_for_empty_prompt=False, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    stock = sample(other, "a photo of a cat", guidance_scale=5.0)
    with guided(other.unet, CFG(5.0, adapter=0), embeds(pipe), scheduler=other.scheduler):
        assert torch.equal(sample(other), stock)
    assert torch.equal(sample(other, "a photo of a cat", guidance_scale=5.0), stock)


def test_cfg_on_the_adapted_model_is_the_stock_pipeline(adapted):
    stock = sample(adapted, "a photo of a dog", guidance_scale=5.0)
    with guided(adapted.unet, CFG(5.0), embeds(adapted), scheduler=adapted.scheduler): assert torch.equal(sample(adapted), stock)
    scaled = dict(cross_attention_kwargs={"scale": 0.5})
    stock = sample(adapted, "a photo of a dog", guidance_scale=5.0, **scaled)
    with guided(adapted.unet, CFG(5.0), embeds(adapted), scheduler=adapted.scheduler): assert torch.equal(sample(adapted, **scaled), stock)


def test_prompt_lists_and_several_pictures(pipe):
    prompts = ["a photo of a cat", "a sketch of a fish"]
    kwargs = dict(num_inference_steps=STEPS, output_type="latent", num_images_per_prompt=2)
    stock = pipe(prompts, negative_prompt=["", "a photo"], guidance_scale=4.0, generator=torch.Generator().manual_seed(1), **kwargs).images
    named = encode_prompts(pipe, {"null": ["", "a photo"], "base": prompts}, num_images_per_prompt=2)
    with guided(pipe.unet, CFG(4.0, adapter=0), named):
        assert torch.equal(pipe(["", ""], guidance_scale=1, generator=torch.Generator().manual_seed(1), **kwargs).images, stock)


def test_one_row_of_a_prompt_serves_the_whole_batch(pipe):
    with guided(pipe.unet, CFG(4.0, adapter=0), embeds(pipe, 3)): many = sample(pipe, n=3)
    with guided(pipe.unet, CFG(4.0, adapter=0), embeds(pipe, 1)): assert torch.allclose(sample(pipe, n=3), many, atol=3e-4)     # 1.2e-4 on a CPU with AVX2


def test_image_to_image(pipe):
    other = StableDiffusionXLImg2ImgPipeline(**pipe.components, force_zeros_for_empty_prompt=False, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    def draw(prompt, scale):
        return other([prompt], image=Image.new("RGB", (64, 64), "red"), strength=.6, num_inference_steps=8, guidance_scale=scale, output_type="latent",
                     generator=torch.Generator().manual_seed(0)).images
    stock, seen = draw("a photo of a cat", 5.0), []
    with guided(other.unet, CFG(5.0, adapter=0), embeds(pipe, 1), scheduler=other.scheduler, on_step=lambda i, n, *_: seen.append((i, n))):
        assert torch.equal(draw("", 1.0), stock)
    assert seen == [(i, 8) for i in range(4, 8)]       # the run starts in the middle of the schedule


def test_inpainting():
    pipe = tiny("sdxl", adapter=None).pipe
    other = StableDiffusionXLInpaintPipeline(**pipe.components, force_zeros_for_empty_prompt=False, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    def draw(prompt, scale):
        return other([prompt], image=Image.new("RGB", (64, 64), "red"), mask_image=Image.new("L", (64, 64), 255), height=64, width=64, strength=.99,
                     num_inference_steps=4, guidance_scale=scale, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    stock = draw("a photo of a cat", 5.0)
    with guided(other.unet, CFG(5.0, adapter=0), embeds(pipe, 1), scheduler=other.scheduler): assert torch.equal(draw("", 1.0), stock)


def test_stable_diffusion_1_5(pipe):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16, cross_attention_dim=64,
                                attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    other = StableDiffusionPipeline(vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=unet, scheduler=pipe.scheduler,
                                    safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    stock = sample(other, "a photo of a cat", guidance_scale=5.0)
    with guided(other.unet, CFG(5.0, adapter=0), embeds(other), scheduler=other.scheduler): assert torch.equal(sample(other), stock)
    add_lora(unet, "dog", ATTENTION)
    for batched in (True, False):
        with guided(unet, ParallelRescale(), embeds(other), scheduler=other.scheduler, max_rows=None if batched else 1): assert sample(other).isfinite().all()


def test_the_pipelines_own_empty_prompt(pipe):
    zeros = type(pipe)(**pipe.components, force_zeros_for_empty_prompt=True, add_watermarker=False)
    zeros.set_progress_bar_config(disable=True)
    stock = sample(zeros, "a photo of a cat", guidance_scale=5.0)
    named = encode_prompts(zeros, {"null": None, "base": ["a photo of a cat"] * 2})
    assert not named["null"].hidden.any()
    with guided(zeros.unet, CFG(5.0, adapter=0), named): assert torch.equal(sample(zeros), stock)


# --- one call equals many ---

RULES = [CFG(), ConsistencyGuidance(), ParallelRescale(), ParallelRescale(ratio="center", gain=lambda p: 1 - p), OrthogonalOnly(), AutoGuidance(),
         AutoGuidance(weak="cat", adapter="dog"), PersonalizationGuidance(omega=.3), PersonalizationGuidance(omega=lambda p: p),
         every(ParallelRescale(), 2), interval(ParallelRescale(), .25, .75)]


@pytest.mark.parametrize("rule", RULES)
def test_batched_equals_one_by_one(adapted, rule):
    seen = {True: [], False: []}
    for batched in seen:
        with guided(adapted.unet, rule, embeds(adapted), scheduler=adapted.scheduler, max_rows=None if batched else 1, on_step=lambda i, n, t, p, c: seen[batched].append((p, c))):
            sample(adapted)
    for (many, _), (one, _) in zip(seen[True], seen[False]):
        assert many.keys() == one.keys()
    (many, combined), (one, combined_) = seen[True][0], seen[False][0]    # the same latents went in
    for key in many: assert torch.allclose(many[key], one[key], rtol=1e-5, atol=1e-5 * one[key].abs().max().item())
    assert (combined - combined_).norm() <= 1e-5 * combined_.norm() * 20  # a rule multiplies small differences of predictions


def predict(unet, scale, weights=None, **kwargs):
    "The prediction with the adapters at a scale, by PEFT's own means."
    args = call_arguments(**kwargs)
    if scale == 0:
        unet.disable_adapters()
        try: return unet(**args).sample
        finally: unet.enable_adapters(); unet.requires_grad_(False)
    unet.set_adapters(["dog", "cat"], [scale * w for w in weights])
    try: return unet(**args).sample
    finally: unet.set_adapters(["dog", "cat"], [1.0, 0.5])


@torch.no_grad()
def test_each_row_has_its_own_scale(adapted):
    unet, args = adapted.unet, call_arguments(n=3)
    with adapter_rows(unet, [0, 1, .3]): rows = unet(**args).sample
    for r, scale in enumerate([0, 1, .3]):
        assert torch.allclose(rows[r], predict(unet, scale, (1, .5), n=3)[r], rtol=1e-5, atol=1e-5)
    with adapter_rows(unet, [{"dog": 1.}, {"cat": 1.}, {}]): rows = unet(**args).sample
    for r, weights in enumerate([(1, 0), (0, .5)]): assert torch.allclose(rows[r], predict(unet, 1, weights, n=3)[r], rtol=1e-5, atol=1e-5)
    assert torch.allclose(rows[2], predict(unet, 0, n=3)[2], rtol=1e-5, atol=1e-5)
    with adapter_rows(unet, 0): assert torch.equal(unet(**args).sample, predict(unet, 0, n=3))
    assert not torch.allclose(rows[0], rows[2], atol=1e-2)     # the adapter matters at all


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    unet = load_tiny_sdxl(device="cpu").unet
    add_lora(unet, "dog", EVERYWHERE)
    unet.to(dtype)
    args = call_arguments(n=2, dtype=dtype)
    with adapter_rows(unet, [0, 1]): rows = unet(**args).sample
    assert rows.dtype == dtype
    assert torch.allclose(rows[1], unet(**args).sample[1], rtol=.05, atol=.05)


def test_dropout_is_off_while_sampling():
    pipe = load_tiny_sdxl(device="cpu")
    add_lora(pipe.unet, "dog", ATTENTION, lora_dropout=.5)
    pipe.unet.eval()
    with guided(pipe.unet, ParallelRescale(), embeds(pipe), scheduler=pipe.scheduler): one, two = sample(pipe), sample(pipe)
    assert torch.equal(one, two)


@torch.no_grad()
def test_equals_the_two_call_sampler(adapted):
    "DCO's sampler: a batch of null and base at LoRA scale 0, then the subject's row, in a loop of its own."
    unet, scheduler, named = adapted.unet, copy.deepcopy(adapted.scheduler), embeds(adapted, 1)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    ids = torch.tensor([[64., 64, 0, 0, 64, 64]])
    def ask(x, t, *names, **kwargs):
        hidden, pooled = (torch.cat([getattr(named[k], part) for k in names]) for part in ("hidden", "pooled"))
        return unet(x.repeat(len(names), 1, 1, 1), t, hidden, added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids.repeat(len(names), 1)), **kwargs).sample
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        null, base = ask(scaled, t, "null", "base", cross_attention_kwargs={"scale": 0.0}).chunk(2)
        unet.set_adapters(["dog", "cat"], [1.0, 0.5])   # diffusers forgets the weights after scale 0
        subject = ask(scaled, t, "subject")
        x = scheduler.step(null + 7.5 * (base - null) + 3.0 * (subject - base), t, x).prev_sample
    with guided(unet, ConsistencyGuidance(7.5, 3.0), named, scheduler=adapted.scheduler):
        ours = sample(adapted, n=1)
    assert (ours - x).norm() <= 1e-4 * x.norm()


# --- whatever a pipeline passes to the UNet reaches every branch ---

class _Middle(Guidance):
    "A rule of two equal branches: its combination must equal either."
    name, branches = "middle", (Branch("base"), Branch("null"))
    def combine(self, base, null): return base
    def _scales(self): return []
    def __repr__(self): return "middle()"


@torch.no_grad()
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_every_argument_is_repeated(pipe, batched, n):
    args, g = call_arguments(n), torch.Generator().manual_seed(3)
    args |= dict(encoder_attention_mask=(torch.rand(n, 32, generator=g) > .3).float(),
                 timestep=torch.full((n,), 500))
    plain = pipe.unet(**args).sample
    same = PromptEmbeds(args["encoder_hidden_states"], args["added_cond_kwargs"]["text_embeds"])
    with guided(pipe.unet, _Middle(), {"base": same, "null": same}, max_rows=None if batched else 1):
        assert torch.allclose(pipe.unet(**args).sample, plain, rtol=1e-5, atol=1e-5)
        positional = [args.pop(k) for k in ("sample", "timestep", "encoder_hidden_states")]
        assert torch.allclose(pipe.unet(*positional, **args, return_dict=False)[0], plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prompt_may_have_conditions_of_its_own(pipe):
    args = call_arguments(2)
    hidden, pooled = args["encoder_hidden_states"], args["added_cond_kwargs"]["text_embeds"]
    other = torch.tensor([[32., 32, 0, 0, 32, 32]])
    expected = pipe.unet(**args | {"added_cond_kwargs": dict(text_embeds=pooled, time_ids=other.repeat(2, 1))}).sample
    seen = {}
    with guided(pipe.unet, _Middle(), {"base": PromptEmbeds(hidden, pooled), "null": PromptEmbeds(hidden, pooled, {"time_ids": other})},
                on_step=lambda i, n, t, p, c: seen.update(p)):
        pipe.unet(**args)
    assert torch.allclose(seen["null", 0.], expected, rtol=1e-5, atol=1e-5) and not torch.allclose(seen["base", 0.], expected, atol=1e-3)


def test_repeat_rows():
    t = torch.arange(4.).view(2, 2)
    assert repeat_rows(t, 2, 2).tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    made = repeat_rows({"a": [t, (t, 1)], "b": torch.tensor(3), "c": torch.zeros(5, 2), "d": None}, 3, 2)
    assert len(made["a"][0]) == len(made["a"][1][0]) == 6 and isinstance(made["a"][1], tuple) and made["b"].ndim == 0 and len(made["c"]) == 5


# --- the UNet afterwards ---

@pytest.mark.parametrize("batched", [True, False])
def test_restored_on_exit(adapted, batched):
    before = state(adapted.unet)
    with guided(adapted.unet, PersonalizationGuidance(omega=.3), embeds(adapted), scheduler=adapted.scheduler, max_rows=None if batched else 1): sample(adapted)
    assert state(adapted.unet) == before
    assert all(type(s) is float for m in adapted.unet.modules() if isinstance(m, LoraLayer) for s in m.scaling.values())


@pytest.mark.parametrize("batched", [True, False])
def test_restored_after_errors(adapted, batched):
    before = state(adapted.unet)
    def stop(*_): raise KeyError("from a callback")
    with pytest.raises(KeyError):
        with guided(adapted.unet, ParallelRescale(), embeds(adapted), on_step=stop, max_rows=None if batched else 1): sample(adapted)
    assert state(adapted.unet) == before
    for error in (RuntimeError, KeyboardInterrupt):                    # from inside the UNet
        def fail(*_): raise error
        hook = adapted.unet.mid_block.register_forward_hook(fail)
        with pytest.raises(error):
            with guided(adapted.unet, ParallelRescale(), embeds(adapted), max_rows=None if batched else 1): sample(adapted)
        hook.remove()
        assert state(adapted.unet) == before


def test_a_failed_call_does_not_spoil_the_next(adapted):
    with guided(adapted.unet, ParallelRescale(), embeds(adapted), scheduler=adapted.scheduler): expected = sample(adapted)
    with guided(adapted.unet, ParallelRescale(), embeds(adapted), scheduler=adapted.scheduler):
        def fail(*_): raise KeyboardInterrupt
        hook = adapted.unet.mid_block.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt): sample(adapted)
        hook.remove()
        assert torch.equal(sample(adapted), expected)


def test_the_innermost_context_holds(adapted):
    named, before = embeds(adapted), state(adapted.unet)
    with guided(adapted.unet, CFG(3.0), named): three = sample(adapted)
    with guided(adapted.unet, ParallelRescale(), named): rescaled = sample(adapted)
    with guided(adapted.unet, ParallelRescale(), named):
        with guided(adapted.unet, CFG(3.0), named): assert torch.equal(sample(adapted), three)
        assert torch.equal(sample(adapted), rescaled)
    assert state(adapted.unet) == before


def test_nothing_is_kept_alive():
    pipe = load_tiny_sdxl(device="cpu")
    with guided(pipe.unet, CFG(adapter=0), embeds(pipe)): sample(pipe)
    import weakref
    unet = weakref.ref(pipe.unet)
    del pipe; gc.collect()
    assert unet() is None


# --- with other people's machinery ---

def small_unet():
    "One block down, one up, an adapter on linear layers and convolutions, and what to call it with."
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16, attention_head_dim=2,
                                down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None)
    add_lora(unet, "dog", ["to_q", "to_out.0", "conv1", "time_emb_proj"])
    return unet, (torch.randn(2, 4, 8, 8), 500, torch.randn(2, 5, 16)), {k: PromptEmbeds(torch.randn(2, 5, 16)) for k in ("null", "base", "subject")}


@torch.no_grad()
@pytest.mark.parametrize("in_place", [pytest.param(False, marks=pytest.mark.slow), True])
def test_torch_compile(in_place):
    unet, args, named = small_unet()
    def answers(unet): return [asked(unet, *how) for how in ((ParallelRescale(), True), (ParallelRescale(), False), (CFG(), True))]
    def asked(unet, rule, batched):
        with guided(unet, rule, named, max_rows=None if batched else 1): return unet(*args).sample
    plain, eager = unet(*args).sample, answers(unet)
    if in_place: unet.compile(backend="eager")
    else: unet = torch.compile(unet, backend="eager")
    for _ in range(2):
        assert torch.allclose(unet(*args).sample, plain, atol=1e-5)      # compiled first when the hooks were not there
        for ours, expected in zip(answers(unet), eager): assert torch.allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("batched", [True, False])
def test_offload_hooks(adapted, batched):
    "accelerate moves weights from within `forward`: its hooks run inside ours and stay in place."
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    with guided(adapted.unet, ParallelRescale(), embeds(adapted), scheduler=adapted.scheduler): expected = sample(adapted)
    class Moves(ModelHook):                         # as enable_model_cpu_offload does for the whole module
        seen = []
        def pre_forward(self, module, *args, **kwargs): self.seen.append(len(args[0])); return args, kwargs
    add_hook_to_module(adapted.unet, Moves())
    try:
        with guided(adapted.unet, ParallelRescale(), embeds(adapted), scheduler=adapted.scheduler, max_rows=None if batched else 1):
            assert torch.allclose(sample(adapted), expected, atol=1e-3)
        assert Moves.seen[0] == (6 if batched else 1) and hasattr(adapted.unet, "_hf_hook")
    finally: remove_hook_from_module(adapted.unet); Moves.seen.clear()
    pipe = load_tiny_sdxl(device="cpu")             # and for every layer, as enable_sequential_cpu_offload does
    add_lora(pipe.unet, "dog", ATTENTION)
    with guided(pipe.unet, ParallelRescale(), embeds(pipe), scheduler=pipe.scheduler): expected = sample(pipe)
    cpu_offload(pipe.unet, execution_device="cpu")
    with guided(pipe.unet, ParallelRescale(), embeds(pipe), scheduler=pipe.scheduler, max_rows=None if batched else 1):
        assert torch.allclose(sample(pipe), expected, atol=1e-3)


# --- runs, steps, memory ---

@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_are_counted(pipe, name):
    scheduler, seen = SCHEDULERS[name].from_config(pipe.scheduler.config), []
    other = type(pipe)(**pipe.components | {"scheduler": scheduler}, force_zeros_for_empty_prompt=False, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    with guided(pipe.unet, CFG(adapter=0), embeds(pipe), scheduler=scheduler, on_step=lambda i, n, t, *_: seen.append((i, n, t))): sample(other)
    steps = [i for i, _, _ in seen]
    assert {n for _, n, _ in seen} == {STEPS} and steps[0] == 0 and steps[-1] == STEPS - 1
    assert steps == sorted(steps) and set(steps) == set(range(STEPS))      # Heun visits the inner steps twice
    assert all(t in [float(s) for s in scheduler.timesteps] for _, _, t in seen)


def test_progress_without_a_scheduler(pipe):
    seen, args = [], call_arguments()
    class Watch(CFG):
        def step(self, i, n, memory): seen.append(i / (n - 1)); return super().step(i, n, memory)
    with torch.no_grad(), guided(pipe.unet, Watch(adapter=0), embeds(pipe)):
        for t in (1000, 750, 1): pipe.unet(**args | {"timestep": t})
    assert seen == pytest.approx([0, .25, .999])


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_memory_lasts_for_one_run(adapted, name):
    scheduler, rows = SCHEDULERS[name].from_config(adapted.scheduler.config), []
    other = type(adapted)(**adapted.components | {"scheduler": scheduler}, force_zeros_for_empty_prompt=False, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    hook = adapted.unet.conv_in.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    with guided(adapted.unet, every(ParallelRescale(), 2), embeds(adapted), scheduler=scheduler): one, two = sample(other), sample(other)
    three = []
    for seed, n in ((0, 2), (0, 1), (0, 2)):       # a run of another size in between
        with guided(adapted.unet, every(ParallelRescale(), 2), embeds(adapted, 1), scheduler=scheduler): three.append(sample(other, n=n))
    hook.remove()
    assert torch.equal(one, two) and torch.allclose(three[0], one, atol=1e-3) and torch.equal(three[0], three[2])
    pattern = [6, 2, 6, 2] if name == "euler" else [6, 2, 2, 6, 6, 2, 2][:2 * STEPS - 1]
    assert rows[:len(pattern)] == pattern


def test_one_step_runs_start_afresh(adapted):
    rows = []
    hook = adapted.unet.conv_in.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    with guided(adapted.unet, every(ParallelRescale(), 2), embeds(adapted), scheduler=adapted.scheduler):
        for _ in range(2): sample(adapted, num_inference_steps=1)
    hook.remove()
    assert rows == [6, 6]


def test_a_prompt_replaced_in_the_middle_takes_effect(pipe):
    named, calls = embeds(pipe), []
    def swap(i, *_):
        if i == 1: named["base"] = embeds(pipe, base="a sketch of a fish")["base"]
    with guided(pipe.unet, CFG(3.0, adapter=0), embeds(pipe), scheduler=pipe.scheduler): expected = sample(pipe)
    with guided(pipe.unet, CFG(3.0, adapter=0), named, scheduler=pipe.scheduler, on_step=swap): assert not torch.allclose(sample(pipe), expected, atol=1e-3)


def test_a_branch_asked_for_twice_is_evaluated_once(pipe):
    rows = []
    class Twice(_Middle):
        branches = (Branch("base"), Branch("null"), Branch("base"))
        def combine(self, a, b, c): assert a is c; return a + b - c
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    with torch.no_grad(), guided(pipe.unet, Twice(), embeds(pipe)): pipe.unet(**call_arguments())
    hook.remove()
    assert rows == [4]


# --- bad input: one clear error ---

@pytest.mark.parametrize("where", ["weights", "latents", "prompt", "scale"])
def test_not_a_number(where):
    pipe = load_tiny_sdxl(device="cpu")
    add_lora(pipe.unet, "dog", ATTENTION)
    named, args, rule = embeds(pipe), {}, ParallelRescale()
    if where == "weights":                          # of the adapter: only the subject's prediction is spoiled
        next(p for k, p in pipe.unet.named_parameters() if "lora_B.dog" in k).data.fill_(math.nan)
        named["subject"], expected = named["subject"], "adapter scale 1"
    if where == "latents": args, expected = {"latents": torch.full((2, CHANNELS, 16, 16), math.nan)}, "latents"
    if where == "prompt": named["subject"], expected = PromptEmbeds(named["subject"].hidden * math.inf, named["subject"].pooled), "'subject' at adapter scale 1"
    if where == "scale": rule, expected = ConsistencyGuidance(text=1e300), "what ConsistencyGuidance"
    with pytest.raises(FloatingPointError, match="step 0 of 4") as error:
        with guided(pipe.unet, rule, named, scheduler=pipe.scheduler, max_rows=None if where != "weights" else 1): sample(pipe, **args)
    assert expected in str(error.value)


def test_a_rule_needs_its_subject(pipe, adapted):
    with pytest.raises(ValueError, match="needs a subject.*tokens_only=True"):
        with guided(pipe.unet, ParallelRescale(), embeds(pipe)): pass
    with guided(pipe.unet, ParallelRescale(), embeds(pipe), tokens_only=True): assert sample(pipe).isfinite().all()
    with pytest.raises(ValueError, match="'horse'.*cat.*dog"):
        with guided(adapted.unet, AutoGuidance(weak="horse"), embeds(adapted)): pass
    with pytest.raises(ValueError, match="prompt 'base'"):
        with guided(adapted.unet, ParallelRescale(), {"null": None, "subject": None}): pass
    other = load_tiny_sdxl(device="cpu")
    add_lora(other.unet, "dog", ATTENTION)
    other.disable_lora()
    with pytest.raises(ValueError, match="needs a subject.*none"):
        with guided(other.unet, ParallelRescale(), embeds(other)): pass


def test_tokens_only_leaves_other_adapters_alone(adapted):
    same = embeds(adapted, base="a photo of a dog")
    seen = []
    with guided(adapted.unet, ParallelRescale(), same, tokens_only=True, on_step=lambda i, n, t, p, c: seen.append(p)): sample(adapted)
    assert torch.allclose(seen[0]["base", 0.], seen[0]["subject", 1.], atol=1e-5)


def test_adapters_that_have_no_scale():
    pipe = load_tiny_sdxl(device="cpu")
    add_lora(pipe.unet, "dog", ATTENTION)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="fused"):
        with guided(pipe.unet, ParallelRescale(), embeds(pipe)): pass
    with guided(pipe.unet, CFG(), embeds(pipe)): assert sample(pipe).isfinite().all()     # asks for nothing but scale 1
    pipe.unfuse_lora()
    with guided(pipe.unet, ParallelRescale(), embeds(pipe)): pass
    other = load_tiny_sdxl(device="cpu")
    add_lora(other.unet, "dog", ATTENTION, use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        with guided(other.unet, ParallelRescale(), embeds(other)): pass
    with pytest.raises(ValueError, match="DoRA"):
        with adapter_rows(other.unet, [0, 1]): pass


def test_other_bad_input(pipe, adapted):
    with pytest.raises(ValueError, match="pipe.unet"):
        with guided(pipe, CFG(adapter=0), embeds(pipe)): pass
    with pytest.raises(ValueError, match="rule must be"):
        with guided(pipe.unet, "cfg", embeds(pipe)): pass
    with pytest.raises(ValueError, match="scheduler"):
        with guided(adapted.unet, interval(every(ParallelRescale(), 2), 0, 1), embeds(adapted)): pass
    with pytest.raises(ValueError, match="4 rows.*guidance_scale=1"):
        with guided(pipe.unet, CFG(adapter=0), embeds(pipe)): sample(pipe, guidance_scale=5.0)
    named = embeds(pipe)
    short = named | {"base": PromptEmbeds(named["base"].hidden[:, :16], named["base"].pooled)}
    with pytest.raises(ValueError, match="numbers of tokens.*max_rows=1"):
        with guided(pipe.unet, CFG(adapter=0), short): sample(pipe)
    with guided(pipe.unet, CFG(adapter=0), short, max_rows=1): sample(pipe)
    with pytest.raises(ValueError, match="pooled"):
        with guided(pipe.unet, CFG(adapter=0), named | {"base": PromptEmbeds(named["base"].hidden)}): sample(pipe)


def test_row_scale_is_a_number():
    s = RowScale(torch.tensor([1., 2.]))
    for shape in ((2,), (2, 3), (2, 3, 4), (2, 3, 4, 5)):
        x = torch.randn(shape)
        assert torch.equal(x * s, x * torch.tensor([1., 2.]).view(-1, *[1] * (len(shape) - 1)))
    x = torch.ones(2, 3)
    assert torch.equal(x * (s * .5 / 2), x * s / 4) and torch.equal(x * (s * s), x * s * s)


# --- what a real card asks for ---

class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts what makes the CPU wait for a device."
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "item", "is_nonzero", "equal")
        return func(*args, **kwargs or {})


def test_a_step_reads_nothing_from_the_device(adapted):
    named = embeds(adapted)
    with Reads() as stock: sample(adapted, guidance_scale=5.0)
    for rule in (ParallelRescale(), PersonalizationGuidance(omega=lambda u: u), every(ParallelRescale(), 2)):
        with guided(adapted.unet, rule, named, scheduler=adapted.scheduler):
            with Reads() as ours: sample(adapted)
        assert ours.count <= stock.count, rule


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_does_not_wait_on_cuda():
    pipe = load_tiny_sdxl(device="cuda")
    add_lora(pipe.unet, "dog", ATTENTION)
    pipe.unet.to("cuda")
    def watch(pipe, i, t, kwargs): torch.cuda.set_sync_debug_mode("error" if i < STEPS - 2 else "default"); return kwargs
    named = embeds(pipe, 1)
    try:
        with guided(pipe.unet, ParallelRescale(), named, scheduler=pipe.scheduler):
            pipe("", num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent", callback_on_step_end=watch)
    finally: torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("max_rows", [1, 2, 4, 5, 100])
def test_rows_in_several_calls(adapted, max_rows):
    args, rows, seen = call_arguments(3), [], {}
    named = {k: PromptEmbeds(args["encoder_hidden_states"].roll(i, 0), args["added_cond_kwargs"]["text_embeds"]) for i, k in enumerate(("null", "base", "subject"))}
    def keep(i, n, t, predictions, combined): seen.setdefault("all", []).append(predictions)
    with guided(adapted.unet, ParallelRescale(), named, on_step=keep): adapted.unet(**args)
    hook = adapted.unet.conv_in.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    with guided(adapted.unet, ParallelRescale(), named, max_rows=max_rows, on_step=keep): adapted.unet(**args)
    hook.remove()
    assert sum(rows) == 9 and max(rows) <= max_rows and len(rows) == math.ceil(9 / max_rows)
    one, many = seen["all"]                         # differently shaped matrix products round differently
    for key in one: assert torch.allclose(one[key], many[key], rtol=1e-5, atol=1e-5 * one[key].abs().max().item())


def test_max_rows_is_checked(pipe):
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="max_rows must be"):
            with guided(pipe.unet, CFG(adapter=0), embeds(pipe), max_rows=bad): pass
    with pytest.warns(FutureWarning, match="max_rows=1"):
        with guided(pipe.unet, CFG(adapter=0), embeds(pipe), batched=False): pass


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_that_came_in_goes_out(dtype):
    class Upcasts(_Middle):
        def combine(self, base, null): return base.double()
    unet = load_tiny_sdxl(device="cpu").unet.to(dtype)
    args = call_arguments(2, dtype=dtype)
    same = PromptEmbeds(args["encoder_hidden_states"], args["added_cond_kwargs"]["text_embeds"])
    with guided(unet, Upcasts(), {"base": same, "null": same}): assert unet(**args).sample.dtype == dtype
    x = torch.randn(2, 3).to(dtype)                 # 0.3 is no number of this dtype: rounded once, as PEFT's number is
    assert torch.equal(x * RowScale(torch.tensor([.3, .3])), x * .3)


def test_one_row_filter_serves_all_layers():
    unet = load_tiny_sdxl(device="cpu").unet
    add_lora(unet, "dog", EVERYWHERE)
    def filters():
        with adapter_rows(unet, [0., 0., 1.]): return [layer.lora_dropout["dog"] for layer in adapter_layers(unet)]
    assert len({id(f) for f in filters()}) == 1 and isinstance(filters()[0], Rows)      # 560 modules a plan at SDXL's size, else
    for layer in adapter_layers(unet): layer.lora_dropout["dog"] = torch.nn.Dropout(.1).eval()
    assert len({id(f) for f in filters()}) == len(adapter_layers(unet))                  # each has its own dropout to apply
    assert not any(f.training for f in filters())


@torch.no_grad()
@pytest.mark.parametrize("how", [*(pytest.param(how, marks=pytest.mark.slow) for how in ("in place", "whole")), "regional"])
def test_compiled_once_for_each_arrangement_of_rows(how):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    unet, counter = load_tiny_sdxl(device="cpu").unet, CompileCounter()
    add_lora(unet, "dog", ["to_q"])
    layers = adapter_layers(unet)
    called = unet
    if how == "in place": unet.compile(backend=counter)
    elif how == "whole": called = torch.compile(unet, backend=counter)
    else: unet.compile_repeated_blocks(backend=counter)
    args = call_arguments(2)

    def new(rule, **options):
        "How many compilations three steps under `rule` took."
        before, embeds = counter.frame_count, {name: PromptEmbeds(torch.randn(1, *args["encoder_hidden_states"].shape[1:]), torch.randn(1, 64))
                                               for name in ("null", "base", "subject")}
        with guided(called, rule, embeds, **options):
            for t in (900., 500., 100.): called(**args | {"timestep": torch.tensor(t)})
        return counter.frame_count - before

    first = new(ParallelRescale())
    assert first >= 1
    assert [new(ConsistencyGuidance()), new(ParallelRescale(3., 2.)), new(ParallelRescale(lambda u: 3 + u, lambda u: 2 * u))] == [0, 0, 0]
    for layer in layers: layer.lora_B["dog"].weight.normal_()            # another subject, put in place as hot-swapping does
    assert new(ParallelRescale()) == 0
    assert 0 < new(PersonalizationGuidance(3., omega=.25)) <= first      # another number of rows
    assert new(PersonalizationGuidance(5., omega=lambda u: .3 + u / 2)) == 0
    torch._dynamo.reset()


def test_switching_the_lora_off_does_not_walk_the_model(monkeypatch):
    "It stands in every training step, and SDXL has 7,530 modules."
    unet, seen = load_tiny_sdxl(device="cpu").unet, []
    add_lora(unet, "dog", ATTENTION)
    with adapter_rows(unet, 0.): pass                        # finds the layers
    whole = unet.parameters
    monkeypatch.setattr(unet, "parameters", lambda: (seen.append(p) or p for p in whole()))
    monkeypatch.setattr(unet, "modules", lambda: pytest.fail("walked the modules"))
    with adapter_rows(unet, 0.): pass
    assert len(seen) <= 2


def test_layers_are_looked_for_once():
    pipe = load_tiny_sdxl(device="cpu")
    add_lora(pipe.unet, "dog", ATTENTION)
    walks, modules = [], pipe.unet.modules
    pipe.unet.modules = lambda: walks.append(1) or modules()
    for _ in range(3):
        with adapter_rows(pipe.unet, 0.): pass
    assert len(walks) == 1
    del pipe.unet.modules
    first = adapter_layers(pipe.unet)
    add_lora(pipe.unet, "cat", EVERYWHERE)
    assert len(adapter_layers(pipe.unet)) > len(first)
    pipe.unet.delete_adapters("cat")
    assert all("cat" not in layer.scaling for layer in adapter_layers(pipe.unet))
    pipe.unload_lora_weights()
    assert adapter_layers(pipe.unet) == []


@torch.no_grad()
def test_weights_parked_on_meta():
    from accelerate import cpu_offload
    pipe = load_tiny_sdxl(device="cpu")
    add_lora(pipe.unet, "dog", ATTENTION)
    args = call_arguments(2)
    with adapter_rows(pipe.unet, [0, .3]): expected = pipe.unet(**args).sample
    cpu_offload(pipe.unet, execution_device="cpu")
    with adapter_rows(pipe.unet, [0, .3]): assert torch.allclose(pipe.unet(**args).sample, expected, atol=1e-5)


@torch.no_grad()
def test_conditions_that_depend_on_the_prompt(pipe):
    args = call_arguments(2)
    with pytest.raises(ValueError, match="ControlNet"):
        with guided(pipe.unet, CFG(adapter=0), embeds(pipe)): pipe.unet(**args, down_block_additional_residuals=[], mid_block_additional_residual=torch.zeros(2, 128, 4, 4))
    args["added_cond_kwargs"]["image_embeds"] = [torch.zeros(2, 1, 8)]
    with pytest.raises(ValueError, match="null prompt has no image"):
        with guided(pipe.unet, CFG(adapter=0), embeds(pipe)): pipe.unet(**args)


def test_a_bad_step_is_told_on_exit(pipe):
    args, reached = call_arguments(2), []
    with pytest.raises(FloatingPointError, match="step 500 of 1001.*latents"):
        with torch.no_grad(), guided(pipe.unet, CFG(adapter=0), embeds(pipe)):
            pipe.unet(**args | {"sample": args["sample"] * math.nan})
            reached.append(1)                       # the step itself does not wait for the answer
    assert reached
