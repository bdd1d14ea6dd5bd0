"SubjectPipeline: its parent where no rule is given, a rule's pictures where one is, and subjects that come and go."
import inspect
import math
import warnings

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from parallel_rescale.machine.denoiser import guided
from parallel_rescale.machine.prompts import encode_prompts
from parallel_rescale.evidence.evaluation import load_pipeline
from parallel_rescale.method.guidance import Branch, Guidance
from parallel_rescale.method.rules import AutoGuidance, CFG, ConsistencyGuidance, OrthogonalOnly
from parallel_rescale.method.rules import ParallelRescale, PersonalizationGuidance
from parallel_rescale.method.schedules import every, interval
from parallel_rescale.machine.pipeline import SubjectPipeline
from parallel_rescale.machine.record import Record, diagnostics
from parallel_rescale.tools.plot import plot_ratio
from parallel_rescale.machine.saved_subject import LORA_FILE, TOKENS_FILE, Subject, load_tokens
from parallel_rescale.tools.embedded import TINY_SDXL, load_tiny_sdxl
from test_subject_folder import make_subject

PROMPT = "a <dog> on the beach"
DRAW = dict(num_inference_steps=3, output_type="latent")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("subjects")
    make_subject(root / "dog")
    make_subject(root / "cat", "<cat>", "cat", seed=5)
    make_subject(root / "word", "<word>", "owl", seed=6, lora=False, rows=2)
    make_subject(root / "bare", "car", "car", seed=7, rows=0)
    return root


@pytest.fixture(scope="module")
def base(): return load_tiny_sdxl(SubjectPipeline, device="cpu")


@pytest.fixture(scope="module")
def pipe(folders): return load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "dog")


def stock(*folders):
    "What a user without this package does."
    pipe = load_tiny_sdxl(StableDiffusionXLPipeline, device="cpu")
    for folder in folders:
        if (folder / LORA_FILE).is_file(): pipe.load_lora_weights(folder, adapter_name=folder.name)
        if (folder / TOKENS_FILE).is_file():
            rows = load_file(folder / TOKENS_FILE)
            token = load_tokens(folder)[0][0]
            pipe.load_textual_inversion(rows["clip_l"], token=token, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
            pipe.load_textual_inversion(rows["clip_g"], token=token, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    return pipe


def draw(pipe, prompt=PROMPT, seed=0, **kwargs): return pipe(prompt, generator=torch.Generator().manual_seed(seed), **DRAW | kwargs)[0]


# --- the parent ---

def test_without_guidance_it_is_its_parent(base):
    parent = load_tiny_sdxl(StableDiffusionXLPipeline, device="cpu")
    for kwargs in (dict(), dict(guidance_scale=1.0), dict(negative_prompt="a photo", num_images_per_prompt=2, guidance_rescale=.5), dict(output_type="np", return_dict=False)):
        ours, theirs = (draw(p, "a photo of a cat", **kwargs) for p in (base, parent))
        assert (ours == theirs).all()
    assert draw(base, output_type="pil")[0].size == (64, 64)


def test_with_a_subject_and_without_guidance_it_is_the_adapted_parent(pipe, folders):
    assert torch.equal(draw(pipe), draw(stock(folders / "dog")))            # save → load in stock diffusers gives the same pictures


def test_cfg_is_the_parents_guidance(pipe):
    for kwargs in (dict(), dict(negative_prompt="a photo"), dict(prompt=[PROMPT, "a <dog>"], negative_prompt=["", "a sketch"], num_images_per_prompt=2),
                   dict(prompt_2="a <dog> in watercolor", negative_prompt_2="snow"), dict(clip_skip=1), dict(cross_attention_kwargs={"scale": .5}),
                   dict(original_size=(32, 64), negative_original_size=(16, 16), negative_target_size=(32, 32), negative_crops_coords_top_left=(4, 4))):
        assert torch.equal(draw(pipe, **{"prompt": PROMPT} | kwargs, guidance=CFG(4.0)), draw(pipe, **{"prompt": PROMPT} | kwargs, guidance_scale=4.0)), kwargs


def test_cfg_on_the_base_model(base, pipe):
    expected = draw(base, "a dog on the beach", guidance_scale=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(draw(base, "a dog on the beach", guidance=CFG(4.0, adapter=0)), expected)
        assert torch.allclose(draw(pipe, guidance=CFG(4.0, adapter=0)), expected, atol=1e-4)   # the subject is loaded, φ does not see it


def test_prompt_embeds(pipe):
    positive, negative, pooled, negative_pooled = pipe.encode_prompt([PROMPT] * 2, device="cpu", negative_prompt=["snow"] * 2)
    embeds = dict(prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled)
    assert torch.equal(draw(pipe, **embeds, guidance=CFG(4.0)), draw(pipe, **embeds, guidance_scale=4.0))
    text = dict(prompt=[PROMPT] * 2, negative_prompt=["snow"] * 2)
    expected = draw(pipe, **text, guidance=ParallelRescale())
    assert torch.allclose(draw(pipe, **embeds, base_prompt="a dog on the beach", guidance=ParallelRescale()), expected, atol=1e-4)
    with pytest.raises(ValueError, match="base_prompt"): draw(pipe, **embeds, guidance=ParallelRescale())


def test_signature():
    ours, parents = (list(inspect.signature(c.__call__).parameters) for c in (SubjectPipeline, StableDiffusionXLPipeline))
    assert [p for p in ours if p in parents] == parents and set(ours) - set(parents) == {"guidance", "base_prompt", "prompts", "record", "max_rows", "batched"}


def test_arguments_by_position(pipe):
    assert torch.equal(pipe(PROMPT, None, 64, 64, 3, generator=torch.Generator().manual_seed(0), output_type="latent", guidance=CFG()).images, draw(pipe, guidance=CFG()))


# --- rules ---

RULES = [ConsistencyGuidance(), ParallelRescale(), OrthogonalOnly(), AutoGuidance(), PersonalizationGuidance(omega=lambda p: .5 * p), every(ParallelRescale(), 2),
         interval(ParallelRescale(), 0, .5)]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_the_denoiser_in_a_stock_pipeline(pipe, folders, rule):
    other = stock(folders / "dog")
    named = encode_prompts(other, {"null": "", "base": "a dog on the beach", "subject": PROMPT})
    with guided(other.unet, rule, named, scheduler=other.scheduler): expected = draw(other, "ignored", guidance_scale=1.0)
    assert torch.allclose(draw(pipe, guidance=rule), expected, atol=1e-5)
    assert torch.allclose(draw(pipe, guidance=rule, max_rows=1), expected, atol=1e-2 * expected.abs().max().item())


def test_pictures_do_not_depend_on_their_company(pipe):
    prompts, seeds = [PROMPT, "a sketch of a <dog>", "a <dog> in the snow"], [3, 4, 5]
    def many(prompts, seeds, **kwargs): return pipe(prompts, generator=[torch.Generator().manual_seed(s) for s in seeds], guidance=ParallelRescale(), **DRAW, **kwargs).images
    together = many(prompts, seeds)
    for i in range(3): assert torch.allclose(many(prompts[i:i + 1], seeds[i:i + 1])[0], together[i], atol=1e-3)
    twice = pipe(prompts[:2], generator=[torch.Generator().manual_seed(s) for s in (3, 9, 4, 9)], num_images_per_prompt=2, guidance=ParallelRescale(), **DRAW).images
    assert torch.allclose(twice[0], together[0], atol=1e-3) and torch.allclose(twice[2], together[1], atol=1e-3)


def test_base_prompt(pipe):
    derived = draw(pipe, guidance=ParallelRescale())
    for same in ("a dog on the beach", ["a dog on the beach"], "a {subject} on the beach", PROMPT):
        assert torch.equal(draw(pipe, guidance=ParallelRescale(), base_prompt=same), derived)
    assert not torch.allclose(draw(pipe, guidance=ParallelRescale(), base_prompt="a cat in the snow"), derived, atol=1e-3)
    with pytest.raises(ValueError, match="base_prompt: 2 texts for 1"): draw(pipe, guidance=ParallelRescale(), base_prompt=["a", "b"])


class Contrast(ParallelRescale):
    "A rule with a fourth branch."
    branches = *ParallelRescale().branches, Branch("reference")
    def combine(self, null, base, subject, reference): return super().combine(null, base, subject) + .5 * (base - reference)


def test_further_prompts(pipe, base):
    default = draw(pipe, guidance=Contrast())
    for same in ("a photo of a dog", ["a photo of a dog"], "a photo of a {subject}", "a photo of a <dog>"):
        assert torch.equal(draw(pipe, guidance=Contrast(), prompts={"reference": same}), default)
    assert not torch.allclose(draw(pipe, guidance=Contrast(), prompts={"reference": "a sketch"}), default, atol=1e-3)
    with pytest.raises(ValueError, match="'refrence'.*reference"): draw(pipe, guidance=Contrast(), prompts={"refrence": "a photo"})
    with pytest.raises(ValueError, match="negative_prompt="): draw(pipe, guidance=Contrast(), prompts={"null": "a photo"})
    class Fourth(Contrast): branches = *ParallelRescale().branches, Branch("weather")
    with pytest.raises(ValueError, match="'weather'"): draw(pipe, guidance=Fourth())
    assert draw(pipe, guidance=Fourth(), prompts={"weather": "rain"}).isfinite().all()


def test_callbacks(pipe):
    seen = []
    def halve(p, i, t, kwargs): seen.append((i, len(kwargs["latents"]))); return {"latents": kwargs["latents"] * (.5 if i == 0 else 1)}
    assert not torch.allclose(draw(pipe, guidance=ParallelRescale(), callback_on_step_end=halve), draw(pipe, guidance=ParallelRescale()), atol=1e-3)
    assert seen == [(0, 1), (1, 1), (2, 1)]
    other = pipe.encode_prompt("a sketch of a <dog>", device="cpu", do_classifier_free_guidance=False)
    def change(p, i, t, kwargs): return {"prompt_embeds": other[0], "add_text_embeds": other[2]} if i == 1 else {}
    inputs = ["latents", "prompt_embeds", "add_text_embeds"]
    changed = draw(pipe, guidance=ParallelRescale(), callback_on_step_end=change, callback_on_step_end_tensor_inputs=inputs)
    assert not torch.allclose(changed, draw(pipe, guidance=ParallelRescale()), atol=1e-3)
    from diffusers.callbacks import SDXLCFGCutoffCallback
    draw(pipe, guidance=ParallelRescale(), callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=.4))
    def stop(p, i, t, kwargs): p._interrupt = i == 0; return {}
    draw(pipe, guidance=ParallelRescale(), callback_on_step_end=stop)


def test_text_encoder_adapters_belong_to_the_subject(folders):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "dog")
    plain = {k: draw(pipe, guidance=CFG(4.0, adapter=a)) for k, a in (("φ", 0), ("θ", 1))}
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert torch.allclose(draw(pipe, guidance=CFG(4.0, adapter=0)), plain["φ"], atol=1e-4)
    theta = draw(pipe, guidance=CFG(4.0))
    assert not torch.allclose(theta, plain["θ"], atol=1e-3) and torch.equal(theta, draw(pipe, guidance_scale=4.0))
    seen = []
    draw(pipe, guidance=ParallelRescale(), record=seen)
    assert seen and all(m.scaling["default"] == 4.0 for m in pipe.text_encoder.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict))  # alpha 8, rank 2


# --- record ---

@pytest.mark.parametrize("rule", [ParallelRescale(), ConsistencyGuidance(), every(OrthogonalOnly(), 2), Contrast()])
def test_record(pipe, rule):
    record = Record(maps=True)
    pictures = draw(pipe, [PROMPT] * 2, guidance=rule, record=record)
    assert torch.equal(pictures, draw(pipe, [PROMPT] * 2, guidance=rule))    # looking changes nothing
    assert [r["step"] for r in record] == ([0, 2] if "every" in repr(rule) else [0, 1, 2])
    for r in record:
        assert set(r["p"]) == {"mean", "std", "q05", "q25", "q50", "q75", "q95"} and all(len(v) == 2 for v in r["p"].values())
        assert r["p_map"].shape == (2, 1, 16, 16) and r["p_map"][0].mean().item() == pytest.approx(r["p"]["mean"][0], rel=1e-4, abs=1e-5)
        for b in range(2): assert r["norm_cons"][b] ** 2 == pytest.approx(r["norm_parallel"][b] ** 2 + r["norm_orthogonal"][b] ** 2, rel=1e-3)
    rows = record.rows()
    assert len(rows) == 2 * len(record) and rows[1]["sample"] == 1 and rows[1]["p_q50"] == record[0]["p"]["q50"][1] and rows[1]["t"] == record[0]["t"]
    plain = []
    draw(pipe, [PROMPT] * 2, guidance=rule, record=plain)
    assert [r["p"] for r in plain] == [r["p"] for r in record] and "p_map" not in plain[0]
    plot_ratio(plain)


def test_record_needs_three_predictions(pipe):
    for rule in (CFG(), AutoGuidance(), PersonalizationGuidance()):
        with pytest.raises(ValueError, match="record.*base"): draw(pipe, guidance=rule, record=[])


def test_diagnostics_by_hand():
    null, base, subject = torch.zeros(1, 2, 1, 1), torch.tensor([2., 0.]).view(1, 2, 1, 1), torch.tensor([3., 4.]).view(1, 2, 1, 1)
    seen = diagnostics(null, base, subject)
    assert seen["p"]["mean"] == [.5] and seen["norm_text"] == [2] and seen["norm_parallel"] == [1] and seen["norm_orthogonal"] == [4]
    assert seen["norm_cons"][0] == pytest.approx(math.sqrt(17))


# --- subjects ---

def test_load_and_unload(folders):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu")
    before, words = draw(pipe, "a dog"), len(pipe.tokenizer)
    weights = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    assert pipe.subject is None
    for _ in range(2): assert pipe.load_subject(folders / "dog") is pipe    # the same twice is fine
    assert pipe.subject.class_noun == "dog" and list(pipe.subjects) == ["subject"] and not torch.equal(draw(pipe, "a dog"), before)
    dog = draw(pipe)
    pipe.load_subject(folders / "cat")                                       # the same name: replaced
    assert pipe.subject.token == "<cat>" and "<dog>" not in pipe.tokenizer.get_vocab() and len(pipe.tokenizer) == words + 1
    pipe.load_subject(str(folders / "dog"))
    assert torch.equal(draw(pipe), dog)
    pipe.unload_subject()
    assert pipe.subject is None and torch.equal(draw(pipe, "a dog"), before) and len(pipe.tokenizer) == len(pipe.tokenizer_2) == words
    assert all(torch.equal(v, weights[k]) for k, v in pipe.text_encoder.state_dict().items())
    assert not any("lora" in k for k in pipe.unet.state_dict())
    with pytest.raises(ValueError, match="'subject'"): pipe.unload_subject("subject")


def test_several_subjects(folders):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu")
    pipe.load_subject(folders / "dog", "dog").load_subject(folders / "cat", "cat")
    assert list(pipe.subjects) == ["dog", "cat"] and set(pipe.unet.active_adapters()) == {"dog", "cat"}
    both, record = "a <dog> and a <cat>", []
    draw(pipe, both, guidance=ParallelRescale(), record=record)
    assert torch.equal(draw(pipe, both, guidance=ParallelRescale(), base_prompt="a dog and a cat"), draw(pipe, both, guidance=ParallelRescale()))
    class Two(CFG):
        branches = Branch("null", {"dog": 1., "cat": .5}), Branch("subject", {"dog": 1., "cat": .5})
    ours = draw(pipe, both, guidance=Two(4.0))
    pipe.set_adapters(["dog", "cat"], [1.0, .5])
    assert torch.allclose(ours, draw(pipe, both, guidance_scale=4.0), atol=1e-4)
    pipe.set_adapters(["dog", "cat"], [1.0, 1.0])
    pipe.unload_subject("cat")
    alone = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "dog")
    assert torch.allclose(draw(pipe, guidance=ParallelRescale()), draw(alone, guidance=ParallelRescale()), atol=1e-4)


def test_a_subject_in_its_token_alone(folders, tmp_path):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "word")
    prompt, record = "a photo of a <word>", []                               # two rows for one token
    assert torch.equal(draw(pipe, prompt), draw(stock(folders / "word"), prompt))
    assert torch.equal(draw(pipe, prompt, guidance=CFG(4.0)), draw(pipe, prompt, guidance_scale=4.0))
    draw(pipe, prompt, guidance=ParallelRescale(), record=record)
    assert record[0]["norm_cons"][0] > 0
    pipe.load_subject(folders / "cat", "cat")                                # beside one with a LoRA
    draw(pipe, "a <word> and a <cat>", guidance=ParallelRescale())
    pipe.unload_subject()
    assert "<word>_1" not in pipe.tokenizer.get_vocab()


def test_a_subject_without_a_token_of_its_own(folders):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "bare")
    record = []
    draw(pipe, "a photo of a car", guidance=ParallelRescale(), record=record)
    assert record[0]["norm_cons"][0] > 0


def test_a_lora_made_elsewhere(folders):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu")
    pipe.load_lora_weights(folders / "dog", adapter_name="elsewhere")
    record = []
    draw(pipe, "a photo of a dog", guidance=ParallelRescale(), record=record)  # θ and φ read the same words
    assert record[0]["norm_cons"][0] > 0
    with pytest.raises(ValueError, match="'elsewhere'"): pipe.load_subject(folders / "cat", "elsewhere")
    pipe.load_subject(folders / "cat")
    assert set(pipe.unet.active_adapters()) == {"elsewhere", "subject"}


def test_from_pipe(pipe, folders):
    made = SubjectPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    assert made.subject == pipe.subject and torch.equal(draw(made, guidance=ParallelRescale()), draw(pipe, guidance=ParallelRescale()))
    other = SubjectPipeline.from_pipe(stock(folders / "dog"))
    other.set_progress_bar_config(disable=True)
    assert other.subject is None and torch.equal(draw(other), draw(pipe))
    image = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)                 # and away from it
    named = encode_prompts(image, {"null": "", "base": "a dog", "subject": "a <dog>"})
    with guided(image.unet, ParallelRescale(), named, scheduler=image.scheduler):
        image("a <dog>", image=draw(pipe, output_type="pil")[0], num_inference_steps=4, guidance_scale=1.0, output_type="latent")


def test_from_pretrained(folders):
    made = SubjectPipeline.from_pretrained(Subject.load(folders / "dog").base)
    assert type(made) is SubjectPipeline and made.load_subject(folders / "dog").subject.token == "<dog>"


def test_ip_adapter(folders):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "dog")
    g, pair, size = torch.Generator().manual_seed(0), {}, 128
    for i, (name, p) in enumerate([k for k in pipe.unet.attn_processors.items()]):
        if "attn2" not in name: continue
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        pair |= {f"{i}.to_k_ip.weight": torch.randn(hidden, size, generator=g) * .1, f"{i}.to_v_ip.weight": torch.randn(hidden, size, generator=g) * .1}
    projection = {"proj.weight": torch.randn(4 * size, 32, generator=g) * .1, "proj.bias": torch.zeros(4 * size), "norm.weight": torch.ones(size), "norm.bias": torch.zeros(size)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": pair}])
    image = dict(ip_adapter_image_embeds=[torch.cat([torch.zeros(1, 1, 32), torch.randn(1, 1, 32, generator=g)])], num_images_per_prompt=2)
    expected = draw(pipe, **image, guidance_scale=4.0)
    assert torch.equal(draw(pipe, **image, guidance=CFG(4.0)), expected)
    draw(pipe, **image, guidance=ParallelRescale())


@torch.no_grad()
def test_a_t2i_adapter_serves_every_branch(pipe, folders):
    "It does not read the prompt, so its one result is every branch's, as in stock guidance."
    from diffusers import StableDiffusionXLAdapterPipeline, T2IAdapter
    torch.manual_seed(0)
    widths = pipe.unet.config.block_out_channels
    adapter = T2IAdapter(3, channels=widths, num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl")
    drawing = StableDiffusionXLAdapterPipeline(**pipe.components, adapter=adapter)
    drawing.set_progress_bar_config(disable=True)
    for p in adapter.parameters(): p.copy_(torch.randn_like(p) * .1)
    sketch = dict(image=torch.rand(1, 3, 64, 64), height=64, width=64)
    expected = draw(drawing, **sketch, negative_prompt="", guidance_scale=4.0)
    assert not torch.allclose(expected, draw(drawing, **sketch | dict(image=torch.zeros(1, 3, 64, 64)), negative_prompt="", guidance_scale=4.0), atol=.01)
    with guided(drawing.unet, CFG(4.0), encode_prompts(drawing, dict(null="", subject=PROMPT)), scheduler=drawing.scheduler):
        close = draw(drawing, **sketch, guidance_scale=1.0)
    assert torch.allclose(close, expected, atol=1e-4)


@torch.no_grad()
def test_a_controlnet_is_refused_and_nothing_is_left_behind(pipe):
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
    torch.manual_seed(0)
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    drawing = StableDiffusionXLControlNetPipeline(**parts, controlnet=ControlNetModel.from_unet(pipe.unet, conditioning_channels=3, load_weights_from_unet=False,
                                                                 conditioning_embedding_out_channels=(16, 32, 96)))
    drawing.set_progress_bar_config(disable=True)
    sketch = dict(image=torch.rand(1, 3, 64, 64), height=64, width=64)
    before = draw(drawing, **sketch, guidance_scale=4.0)
    with pytest.raises(ValueError, match="residuals of a ControlNet depend on the prompt"):
        with guided(drawing.unet, ParallelRescale(), encode_prompts(drawing, dict(null="", base="a dog", subject=PROMPT)), scheduler=drawing.scheduler):
            draw(drawing, **sketch, guidance_scale=1.0)
    assert torch.equal(draw(drawing, **sketch, guidance_scale=4.0), before)


# --- half precision ---

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}      # relative error of one rounding


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("rule", [CFG(3.), ConsistencyGuidance(3., 2.), ParallelRescale(3., 2.), every(ParallelRescale(3., 2.), 2), PersonalizationGuidance(3., omega=lambda u: u)], ids=lambda r: r.label)
def test_half_precision_against_float32(folders, rule, dtype):
    """A branch's prediction is off by a few roundings of its size, independent from the next branch's; a rule with weights w adds
    them up to √Σw² ≈ 4 times that, and four steps to another 2: about ten roundings, and six times as many are allowed (44 were measured on a GPU)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole, half = (load_pipeline(TINY_SDXL, device, d).load_subject(folders / "dog") for d in ("float32", str(dtype).split(".")[1]))
    # torch may draw other numbers in half precision: both get the same
    latents = torch.randn(1, whole.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    generate = lambda p: draw(p, guidance=rule, num_inference_steps=4, latents=latents.to(device, p.unet.dtype))
    a, b = generate(whole), generate(half)
    assert b.dtype == dtype and b.isfinite().all()
    relative = ((a - b.float()).norm() / a.norm()).item()
    assert 0 < relative < 60 * UNIT[dtype]


def test_offloading(folders):
    "The hooks of accelerate on every component, as enable_model_cpu_offload puts them, here without a GPU."
    from accelerate.hooks import ModelHook, add_hook_to_module
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "dog")
    expected, order = draw(pipe, guidance=ParallelRescale()), []
    class Moves(ModelHook):
        def __init__(self, name): self.name = name
        def pre_forward(self, module, *args, **kwargs): order.append(self.name); return args, kwargs
    for name in ("text_encoder", "text_encoder_2", "unet"): add_hook_to_module(getattr(pipe, name), Moves(name))
    assert torch.equal(draw(pipe, guidance=ParallelRescale()), expected)
    assert order.index("unet") == len(order) - 3 and order[-3:] == ["unet"] * 3   # the encoders first, then one UNet call a step


@pytest.mark.parametrize("method,device", [("enable_model_cpu_offload", "meta"), ("enable_sequential_cpu_offload", "cpu")])
def test_offloading_survives_a_subject(folders, monkeypatch, method, device):
    "diffusers puts its hooks back for the device that it finds the text encoders on: offloaded, that is the CPU. 'meta' stands for the card."
    from types import SimpleNamespace
    monkeypatch.setattr(torch, "meta", SimpleNamespace(empty_cache=lambda: None), raising=False)
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu")
    words = len(pipe.tokenizer), pipe.text_encoder.get_input_embeddings().weight.clone()
    getattr(pipe, method)(device=device)
    for _ in range(2): pipe.load_subject(folders / "dog")          # the second time in place of the first
    assert pipe._offload_device.type == device and hasattr(pipe.text_encoder, "_hf_hook") and hasattr(pipe.unet, "_hf_hook")
    pipe.unload_subject()
    assert pipe._offload_device.type == device and hasattr(pipe.text_encoder_2, "_hf_hook")
    pipe.remove_all_hooks()
    assert len(pipe.tokenizer) == words[0] and torch.equal(pipe.text_encoder.get_input_embeddings().weight, words[1])


# --- bad input ---

def test_rules_that_need_a_subject(base):
    for rule in (CFG(), ParallelRescale(), PersonalizationGuidance()):
        with pytest.raises(ValueError, match="load_subject"): draw(base, "a dog", guidance=rule)


def test_a_prompt_without_the_token(pipe):
    with pytest.warns(UserWarning, match="'a cat'.*<dog>.*identity"): draw(pipe, ["a <dog>", "a cat"], guidance=ParallelRescale())


def test_arguments_that_could_not_act(pipe):
    for kwargs in (dict(base_prompt="a dog"), dict(record=[]), dict(max_rows=1), dict(prompts={})):
        with pytest.raises(ValueError, match=next(iter(kwargs))): draw(pipe, **kwargs)
    for kwargs in (dict(guidance_scale=7.0), dict(guidance_rescale=.7)):
        with pytest.raises(ValueError, match=next(iter(kwargs))): draw(pipe, guidance=ParallelRescale(), **kwargs)
    with pytest.raises(ValueError, match="guidance must be a rule"): draw(pipe, guidance="parallel_rescale")
    with pytest.raises(ValueError, match="Provide either `prompt` or"): draw(pipe, None, guidance=ParallelRescale())
    with pytest.raises(ValueError, match="divisible by 8"): draw(pipe, height=63, guidance=ParallelRescale())


def test_tokens_that_are_taken(folders, tmp_path):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "dog")
    make_subject(tmp_path / "dog2", seed=9)
    with pytest.raises(ValueError, match="'<dog>'.*vocabulary"): pipe.load_subject(tmp_path / "dog2", "dog2")
    assert list(pipe.subjects) == ["subject"] and set(pipe.unet.peft_config) == {"subject"}


def test_made_for_another_model(folders, tmp_path):
    from dataclasses import replace
    made = make_subject(tmp_path / "big")
    replace(made, base="stabilityai/stable-diffusion-xl-base-1.0", signature=made.signature | {"cross_attention_dim": 2048}).save()
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu")
    with pytest.raises(ValueError, match="stabilityai/stable-diffusion-xl-base-1.0.*tiny_sdxl"): pipe.load_subject(tmp_path / "big")
    assert pipe.subject is None and not getattr(pipe.unet, "peft_config", {})


def test_not_a_number(folders):
    pipe = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(folders / "dog")
    next(p for k, p in pipe.unet.named_parameters() if "lora_B" in k).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 0 of 3.*'subject'"): draw(pipe, guidance=ParallelRescale(), max_rows=1)
