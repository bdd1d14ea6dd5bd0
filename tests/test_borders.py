"Other architectures than SDXL: the same rules, in stock pipelines with random weights, through `guide` and `guided`."
import gc
import inspect
import subprocess
import sys
import weakref
from dataclasses import dataclass, fields

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, FluxKontextPipeline, FluxPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import MODELS, sd15, tiny

from parallel_rescale import CFG, ConsistencyGuidance, ParallelRescale, every, guide
from parallel_rescale.machine import adapter_rows as rows_module
from parallel_rescale.machine.adapter_rows import adapter_layers, adapter_rows
from parallel_rescale.machine.architectures import BORDERS, border_of, support
from parallel_rescale.machine.denoiser import guided
from parallel_rescale.machine.flow_architectures import pack, padded, unpack
from parallel_rescale.machine.guide import load_subject, subject_of, subjects_of, unload_subject
from parallel_rescale.machine.prompts import PromptEmbeds, encode_prompts
from parallel_rescale.machine.record import Record
from parallel_rescale.method.attention import EntropyRectifying, PerturbedAttention, SkipLayer
from parallel_rescale.method.guidance import Branch, Guidance
from parallel_rescale.method.registry import known_rules
from parallel_rescale.method.several import SeveralSubjects
from parallel_rescale.tools.embedded import load_tiny_sdxl
from parallel_rescale.tools.util import PACKAGE

FOLDER = PACKAGE / "data" / "subject_pixel"
LATENTS = dict(num_inference_steps=3, output_type="latent")
def noise(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    made = tiny(request.param)
    made.name = request.param
    return made


@pytest.fixture(scope="module")
def xl(): return load_subject(load_tiny_sdxl(StableDiffusionXLPipeline), FOLDER)


def draw(model, rule, prompt="a cat", seed=0, **more):
    "Latents under a rule, from the pipeline's own arguments."
    with guide(model.pipe, rule, prompt, **model.encoding, **more) as generate: return generate(generator=noise(seed), **model.size, **LATENTS).images


def calls_of(network):
    "A list that grows by one for each forward pass, and the hook that sees to it."
    calls = []
    return calls, network.register_forward_hook(lambda m, args, out: calls.append(1))


# FLUX.2-dev has no CFG of its own
@pytest.mark.parametrize("model", [name for name in MODELS if name != "flux2_dev"], indirect=True)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("negative", [None, "a dog"])
def test_cfg_equals_stock(model, negative, n):
    """To the last bit, in calls of the shape that the pipeline's own have; else up to rounding, for a matrix product of two rows is not computed as two
    of one are. Z-Image says c + s·(c − n) for n + (1 + s)·(c − n): always up to rounding."""
    stock = model("a cat", num_images_per_prompt=n, **model.stock(4., negative))
    def ours(**more): return draw(model, CFG(4.), negative_prompt=negative, num_images_per_prompt=n, **more)
    assert torch.allclose(ours(), stock, atol=1e-4)
    if model.border.exact: assert torch.equal(ours(max_rows=n if model.border.asked_twice else None), stock)


def further(rule):
    "The prompts that a rule asks for beyond its own."
    names = {b.prompt for b in rule.branches}
    return dict(base_prompt="a cat" if "base" in names else None, prompts={n: "a cat" for n in names - {"null", "subject", "base"}})


def made(name):
    "A rule at its defaults; there is no middle to spoil."
    kind = known_rules()[name]
    return kind(**{"layers": ("block",)} if "layers" in {f.name for f in fields(kind)} else {})


REFUSED = {"z_image": {"temperature", "identity", "skip"}, "sana": {"temperature"}}     # what another attention cannot be in one row
def is_refused(model, name): return any(b.attention and b.attention.kind in REFUSED.get(model, ()) for b in made(name).branches)
PAIRS = [(model, name) for model in [*MODELS, "sdxl"] for name in sorted(known_rules())]


@pytest.mark.parametrize("model, name", [pair for pair in PAIRS if not is_refused(*pair)], indirect=["model"])
def test_every_rule_runs(model, name):
    "In one call a step. The names of these tests make a table in README."
    calls, hook = calls_of(model.model)
    out = draw(model, made(name), **further(made(name)))
    hook.remove()
    assert out.isfinite().all() and len(calls) == 3


@pytest.mark.parametrize("model, name", [pair for pair in PAIRS if is_refused(*pair)], indirect=["model"])
def test_a_rule_is_refused(model, name):
    "Before any work, where it would have no effect, or no place."
    calls, hook = calls_of(model.model)
    with pytest.raises(ValueError, match="changes attention .* no effect, or no place"): draw(model, made(name), **further(made(name)))
    hook.remove()
    assert not calls


@dataclass(frozen=True, repr=False)
class _One(Guidance):
    "One question, and its answer."
    prompt: str = "subject"

    @property
    def branches(self): return (Branch(self.prompt, 1.),)
    def combine(self, prediction): return prediction


def seen_by(model, rule, **more):
    "The predictions of a first step."
    seen = {}
    with guided(model.model, rule, named(model, rule), scheduler=model.pipe.scheduler, on_step=lambda i, n, t, p, combined: seen.update(p), **more):
        model("a cat", steps=1, **unguided(model))
    return seen


def unguided(model):
    return {k: v for k, v in model.border.unguided(model.model).items() if k in inspect.signature(model.pipe.__call__).parameters}


def named(model, rule):
    told = {"null": None, "base": "a dog", "subject": "a cat", "other": "a car"}
    return encode_prompts(model.pipe, {b.prompt: told[b.prompt] for b in rule.branches}, **model.encoding)


def test_rows_equal_switching_and_split_calls(model):
    "A scale for each row is what switching the adapter is, and calls of one row what one call is."
    network, rule = model.model, ConsistencyGuidance(3., 2.)
    assert torch.allclose(draw(model, rule, base_prompt="a dog"), draw(model, rule, base_prompt="a dog", max_rows=1), atol=1e-4)
    def asked(prompt, on):
        (network.enable_adapters if on else network.disable_adapters)()
        try: return seen_by(model, _One(prompt), tokens_only=True).popitem()[1]         # it leaves adapters alone
        finally: network.enable_adapters()
    seen = seen_by(model, rule)
    expected = {("null", 0.): asked("null", False), ("base", 0.): asked("base", False), ("subject", 1.): asked("subject", True)}
    assert seen.keys() == expected.keys()
    for key, v in expected.items(): assert v.shape == seen[key].shape and torch.allclose(seen[key], v, atol=1e-4), key
    assert not torch.allclose(asked("subject", False), expected["subject", 1.], atol=1e-4)      # the adapter does something


@pytest.mark.parametrize("name", [*MODELS, "sdxl"])
def test_every_subject_has_its_own_lora(name):
    "Two in one call, each with its prompt: what switching from one to the other is."
    model, rule = tiny(name), SeveralSubjects(3., 2., "subject+other")
    network = model.model
    network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_k", "to_v"], init_lora_weights=False), adapter_name="other")
    network.set_adapter([*rule.subjects])
    (calls, hook), seen = calls_of(network), seen_by(model, rule)
    hook.remove()
    assert len(calls) == 1
    found = {b.prompt: v for b, v in zip(rule.branches, seen.values())}
    for subject in rule.subjects:
        network.set_adapter(subject)
        alone = seen_by(model, _One(subject), tokens_only=True).popitem()[1]
        assert torch.allclose(found[subject], alone, atol=1e-4)
        network.disable_adapters()
        assert not torch.allclose(seen_by(model, _One(subject), tokens_only=True).popitem()[1], alone, atol=1e-4)
        network.enable_adapters()


@pytest.mark.parametrize("rule", [EntropyRectifying, PerturbedAttention, SkipLayer])
def test_another_attention_changes_its_row(model, rule):
    rule = rule(layers="block")
    spoiled = next(b.attention for b in rule.branches if b.attention)
    if spoiled.kind not in model.border.attention: pytest.skip("refused")
    seen = seen_by(model, rule)
    changed, whole = seen["subject", 1., spoiled], seen["subject", 1.]
    assert not torch.allclose(changed, whole, atol=1e-4) and torch.allclose(whole, seen_by(model, CFG())["subject", 1.], atol=1e-5)
    assert torch.allclose(changed, seen_by(model, rule, max_rows=1)["subject", 1., spoiled], atol=1e-4)
    with pytest.raises(ValueError, match="no self-attention in attic"): draw(model, type(rule)(layers="attic"))


def test_steps_are_counted(model):
    seen = []
    draw(model, every(CFG(lambda u: 1 + u), 2))
    with guided(model.model, CFG(2.), named(model, CFG()), scheduler=model.pipe.scheduler, on_step=lambda i, n, *_: seen.append((i, n))):
        model("a cat", **unguided(model))
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_rules_see_a_picture_and_a_record_is_kept(model):
    record = Record(maps=True)
    rule = ParallelRescale(3., 2.)
    draw(model, rule, base_prompt="a dog", record=record)
    shapes = {tuple(p.shape) for p in seen_by(model, rule).values()}
    assert len(record) == 3 and len(shapes) == 1 and record[0]["p_map"].shape[2:] == (shape := shapes.pop())[2:] and shape[:2] == (1, model.pipe.vae.config.get("latent_channels") or model.pipe.vae.config.z_dim)
    if "height" in model.size: assert shape[2] / shape[3] == model.size["height"] / model.size["width"]


def with_argument(model, **more):
    "The network is called with something more by its pipeline, before `guided` sees the call."
    return model.model.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs | more), with_kwargs=True)


def test_what_was_made_for_one_prompt_is_refused(model):
    "ControlNets and IP-Adapters: one clear error, at the first step."
    border = model.border
    residual = [torch.zeros(1, 96, 32)]
    for arguments, words in (({border.of_one_prompt[0]: dict(enumerate(residual)) if model.pipe.__class__.__name__ == "ZImagePipeline" else residual}, "ControlNet"),
                             ({border.extras: {border.image: [torch.zeros(1, 1, 32)]}}, "no image")):
        if set(arguments) - set(inspect.signature(type(model.model).forward).parameters): continue      # FLUX.2 takes none
        hook = with_argument(model, **arguments)
        try:
            with pytest.raises(ValueError, match=words): draw(model, CFG())
        finally: hook.remove()


def test_a_wrong_argument_is_named_before_any_work(model):
    for bad in ("prompt", "num_images_per_prompt", *model.border.unguided(model.model)):
        with pytest.raises(ValueError, match=f"{bad}: belongs to"), guide(model.pipe, CFG(), "a cat", **model.encoding) as generate: generate(**{bad: 1})
    with pytest.raises(ValueError, match="without nonsense"), guide(model.pipe, CFG(), "a cat", nonsense=1): pass
    with pytest.raises(ValueError, match="does not take 'refrence'"), guide(model.pipe, ParallelRescale(), "a cat", prompts={"refrence": "a"}): pass


def test_everything_is_as_before(model):
    network = model.model
    before = set(vars(network)), len(network._forward_hooks), len(network._forward_pre_hooks), [dict(layer.scaling) for layer in adapter_layers(network)]
    draw(model, ConsistencyGuidance(), base_prompt="a dog")
    def broken(*_): raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"), guided(network, CFG(), named(model, CFG()), on_step=broken, scheduler=model.pipe.scheduler):
        model("a cat", **unguided(model))
    assert before == (set(vars(network)), len(network._forward_hooks), len(network._forward_pre_hooks), [dict(layer.scaling) for layer in adapter_layers(network)])


def test_borders_are_told_apart(xl):
    assert border_of(xl.unet).__name__ == "SDXLBorder" and len({b.__name__ for b in BORDERS.values()}) == len(BORDERS)
    with pytest.raises(ValueError, match="does not know how a Linear is called"), guided(torch.nn.Linear(1, 1), CFG(adapter=0), {}): pass


def test_a_border_is_found_whatever_was_imported():
    code = """
from parallel_rescale.machine.architectures import border_of
class FluxTransformer2DModel: pass
print(border_of(FluxTransformer2DModel()).__name__)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "FluxBorder\n"


def test_cfg_is_stock_in_other_tasks(xl):
    "For inpainting see `test_cfg_equals_stock_in_other_tasks`: diffusers' pipeline for it does not take this model's channels."
    task = AutoPipelineForImage2Image.from_pipe(xl)
    task.set_progress_bar_config(disable=True)
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    more = dict(image=picture, strength=.7, num_inference_steps=6, output_type="latent")
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
    x = dict(sample=torch.randn(3, xl.unet.config.in_channels, 16, 16, generator=g), timestep=500, encoder_hidden_states=torch.randn(3, 32, 128, generator=g), added_cond_kwargs=dict(
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
    def run(**more):
        with guide(xl, PerturbedAttention(3., 1., layers=("block",)), "a {subject}", **more) as generate: return generate(generator=noise(), **LATENTS).images
    rows = []
    hook = xl.unet.conv_in.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    whole = run()
    hook.remove()
    assert rows == [3, 3, 3] and torch.allclose(whole, run(max_rows=1), atol=2e-3)


def test_a_controlnet_is_refused_at_the_first_step_even_where_one_branch_begins():
    "A schedule that asks one question first would let it pass, and stop in the middle of a run."
    from parallel_rescale import interval
    model = tiny("sd15")
    hook = with_argument(model, mid_block_additional_residual=torch.zeros(1, 64, 8, 8))
    with pytest.raises(ValueError, match="ControlNet"): draw(model, interval(CFG(), .5, 1.))
    hook.remove()


def test_tokens_are_a_picture_as_flux_cuts_it():
    tokens = torch.randn(2, 24, 16, generator=noise())
    assert torch.equal(unpack(tokens, (4, 6)), FluxPipeline._unpack_latents(tokens, 16, 24, 2)) and torch.equal(pack(unpack(tokens, (4, 6))), tokens)
    more = torch.cat([tokens, torch.ones(2, 5, 16)], 1)                                # those of a picture to look at
    assert torch.equal(pack(unpack(more, (4, 6)), 29)[:, :24], tokens) and not pack(unpack(more, (4, 6)), 29)[:, 24:].any()
    with pytest.raises(ValueError, match="24 tokens are not a picture of 5 × 6"): unpack(tokens, (5, 6))


@pytest.fixture(scope="module")
def flux(): return tiny("flux1")


@pytest.mark.parametrize("name", ["flux1", "chroma", "qwen_image", "flux2_klein"])
def test_a_second_call_of_a_step_is_answered_from_the_first(name):
    "The pipeline's own CFG left on: it asks for each prompt, and what the rule made of all is both answers."
    model = tiny(name)
    ours, (calls, hook) = draw(model, CFG(4.)), calls_of(model.model)
    inner = []
    deep = model.model.proj_out.register_forward_hook(lambda *_: inner.append(1))
    with guided(model.model, CFG(4.), named(model, CFG()), scheduler=model.pipe.scheduler):
        twice = model("a cat", **model.stock(7., None))
    hook.remove(), deep.remove()
    assert len(inner) == 3 and len(calls) == 6 and torch.allclose(twice, ours, atol=1e-4) and "forward" not in vars(model.model)


def test_an_answer_is_for_another_prompt_alone(flux):
    "The same call again is a new question: a benchmark measures what it should."
    inner = []
    deep = flux.model.proj_out.register_forward_hook(lambda *_: inner.append(1))
    with torch.no_grad(), guided(flux.model, CFG(4.), told := named(flux, CFG())):
        call = dict(hidden_states=torch.randn(1, 24, 16), timestep=torch.tensor([.5]), guidance=torch.tensor([3.5]), img_ids=flux.pipe._prepare_latent_image_ids(
            1, 4, 6, "cpu", torch.float32), txt_ids=torch.zeros(12, 3), encoder_hidden_states=told["subject"].hidden, pooled_projections=told["subject"].pooled)
        first, again = (flux.model(**call).sample for _ in range(2))
        other = flux.model(**call | dict(encoder_hidden_states=told["null"].hidden)).sample
        later = flux.model(**call | dict(encoder_hidden_states=told["subject"].hidden, timestep=torch.tensor([.4]))).sample
    deep.remove()
    assert len(inner) == 3 and torch.equal(first, again) and torch.equal(first, other) and not torch.equal(first, later)


def test_who_else_has_replaced_forward_finds_it_again(flux):
    "As accelerate's hooks do, which come and go with every run of a pipeline."
    network, made = flux.model, []
    plain = network.forward
    network.forward = lambda *args, **kwargs: made.append(1) or plain(*args, **kwargs)
    theirs = network.forward
    try:
        with guided(network, CFG(4.), named(flux, CFG()), scheduler=flux.pipe.scheduler):
            for _ in range(2):
                flux("a cat", **flux.stock(7., None))
                network.forward = theirs                                               # put there again at the end of each run
        assert network.forward is theirs and 6 <= len(made) <= 8
        draw(flux, CFG(4.))
        assert network.forward is theirs
    finally: del network.forward


def test_a_compiled_transformer_is_guided_all_the_same(flux):
    expected, rule = draw(flux, ConsistencyGuidance(), base_prompt="a dog"), ConsistencyGuidance()
    network, flux.pipe.transformer = flux.pipe.transformer, torch.compile(flux.pipe.transformer, backend="eager")
    try: assert torch.allclose(draw(flux, rule, base_prompt="a dog"), expected, atol=1e-4)
    finally: flux.pipe.transformer = network


def test_distilled_guidance_stays_as_the_call_gives_it():
    for name in ("flux1", "flux2_dev"):
        model, seen = tiny(name), []
        hook = model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["guidance"]), with_kwargs=True)
        with guide(model.pipe, CFG(1.), "a cat", **model.encoding) as generate:
            one, other = (generate(generator=noise(), guidance_scale=g, **model.size, **LATENTS).images for g in (2., 5.))
        hook.remove()
        assert [t[0].item() for t in seen] == [2., 2, 2, 5, 5, 5] and torch.allclose(one, model("a cat", guidance_scale=2., **unguided(model)), atol=1e-4)
        assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen_image", "sana", "z_image"])
def test_prompts_of_any_length_go_together(name):
    "Padded and masked, or in a list, each row is what it is alone."
    model = tiny(name)
    told = {"null": "", "base": "a dog in the snow at night", "subject": "a cat"}
    options = {k: v for k, v in model.encoding.items() if k != "max_sequence_length"} if name != "sana" else model.encoding
    told = {n: encode_prompts(model.pipe, {n: text}, **options)[n] for n, text in told.items()}
    if name == "sana": told["base"] = PromptEmbeds(told["base"].hidden[:, :9], added={k: v[:, :9] for k, v in told["base"].added.items()})
    assert len({p.hidden[0].shape[0] for p in told.values()}) > 1
    def run(max_rows):
        seen = {}
        with guided(model.model, ConsistencyGuidance(), told, scheduler=model.pipe.scheduler, max_rows=max_rows, on_step=lambda i, n, t, p, c: seen.update(p)):
            model("a cat", steps=1, **unguided(model))
        return seen
    one, many = run(None), run(1)
    for key in one: assert torch.allclose(one[key], many[key], atol=1e-4)


def test_prompts_of_other_lengths_are_refused_where_there_is_no_mask(flux):
    assert {row["model"] for row in support() if row["prompt_lengths"] == "any"} == {"Qwen-Image", "Z-Image", "Sana"}
    told = named(flux, CFG())
    told["null"] = PromptEmbeds(told["null"].hidden[:, :7], told["null"].pooled)
    def run(**more):
        with guided(flux.model, CFG(4.), told, scheduler=flux.pipe.scheduler, **more): return flux("a cat", **unguided(flux))
    with pytest.raises(ValueError, match="'null': 7, 'subject': 12}, and this network has no mask"): run()
    assert run(max_rows=1).isfinite().all()
    with pytest.raises(ValueError, match="pooled embedding"):
        told["null"] = PromptEmbeds(told["subject"].hidden)
        run()


def test_masks_of_prompts_are_made_whole():
    one, two = PromptEmbeds(torch.ones(1, 3, 2)), PromptEmbeds(torch.ones(1, 5, 2), added={"mask": torch.tensor([[1, 1, 1, 1, 0]])})
    a, b = padded([one, two], "mask")
    assert a.hidden.shape == (1, 5, 2) and a.added["mask"].tolist() == [[1, 1, 1, 0, 0]] and b.added["mask"].tolist() == [[1, 1, 1, 1, 0]]
    assert padded([one, one], "mask") == [one, one]


@pytest.mark.parametrize("name", ["flux1", "qwen_image", "z_image", "sana"])
def test_in_half_precision_cfg_is_still_stock(name):
    "Z-Image and Sana guide in float32 whatever the network computes in."
    model = tiny(name)
    model.pipe.to(torch.bfloat16)
    stock, ours = model("a cat", **model.stock(4., None)), draw(model, CFG(4.), max_rows=1 if model.border.asked_twice else None)
    assert ours.dtype == stock.dtype and torch.allclose(ours.float(), stock.float(), atol=.05 if name == "z_image" else 0.)


def test_steps_are_told_in_half_precision_by_their_place():
    "994 is 992 in bfloat16: fifty steps of a shifted schedule lie closer together."
    model, seen = tiny("flux1"), []
    model.pipe.to(torch.bfloat16)
    with guided(model.model, CFG(), named(model, CFG()), scheduler=model.pipe.scheduler, on_step=lambda i, n, *_: seen.append(i)):
        model("a cat", steps=50, **unguided(model))
    assert seen == list(range(50))


@pytest.mark.parametrize("where", ["all_x_embedder", "cap_embedder"])
def test_an_adapter_where_rows_run_as_one_is_refused(where):
    model = tiny("z_image", adapter=None)
    model.model.add_adapter(LoraConfig(r=2, target_modules=rf".*{where}\.(2-)?1", init_lora_weights=False))
    with pytest.raises(ValueError, match=f"changes {where}.*, where the rows of a batch run as one"): draw(model, ConsistencyGuidance(), base_prompt="a dog")


def test_what_has_no_border_is_refused():
    klein, z = tiny("flux2_klein"), tiny("z_image")
    hook = with_argument(klein, kv_cache_mode="extract")
    with pytest.raises(ValueError, match="kv_cache"): draw(klein, CFG())
    hook.remove()
    hook = with_argument(z, siglip_feats=[None])
    with pytest.raises(ValueError, match="Omni"): draw(z, CFG())
    hook.remove()


# every pipeline of diffusers that has one of these tasks and CFG of its own: FLUX.2 and Sana begin from no picture but klein's to fill in
KINDS = {"sdxl": "StableDiffusionXL{}", "sd15": "StableDiffusion{}", "sd3": "StableDiffusion3{}", "flux1": "Flux{}", "chroma": "Chroma{}", "qwen_image": "QwenImage{}", "z_image": "ZImage{}",
         "flux2_klein": "Flux2Klein{}"}
TASKS = [(name, task) for name in KINDS for task in ("img2img", "inpaint") if (name, task) != ("flux2_klein", "img2img")]


def from_a_picture(model, task):
    "(a stock pipeline of the model's parts that draws from a picture, its arguments)."
    pipe = getattr(diffusers, KINDS[model.name].format({"img2img": "Img2Img", "inpaint": "Inpaint"}[task]) + "Pipeline").from_pipe(model.pipe)
    pipe.set_progress_bar_config(disable=True)
    for name in ("prompt_template_encode", "prompt_template_encode_start_idx"):                 # Qwen-Image's, made short
        if hasattr(model.pipe, name): setattr(pipe, name, getattr(model.pipe, name))
    picture = Image.effect_noise((model.size.get("width", 16), model.size.get("height", 16)), 50).convert("RGB")
    mask = dict(mask_image=Image.linear_gradient("L").resize(picture.size)) if task == "inpaint" else {}
    return pipe, dict(image=picture, strength=.7, num_inference_steps=4, output_type="latent", **mask, **model.size)


@pytest.mark.parametrize("model, task", TASKS, indirect=["model"])
def test_cfg_equals_stock_in_other_tasks(model, task):
    "As `test_cfg_equals_stock`, for two pictures of a prompt."
    pipe, given = from_a_picture(model, task)
    def ours(rule, **more):
        with guide(pipe, rule, "a cat", negative_prompt="a dog", num_images_per_prompt=2, **model.encoding, **more) as generate:
            return generate(generator=noise(), **given).images
    def theirs(scale): return pipe(prompt="a cat", num_images_per_prompt=2, generator=noise(), **given, **model.stock(scale, "a dog"), **model.encoding).images
    stock = theirs(4.)
    assert torch.allclose(ours(CFG(4.)), stock, atol=1e-4) and not torch.allclose(theirs(1.), stock, atol=1e-3)
    if model.border.exact: assert torch.equal(ours(CFG(4.), max_rows=2 if model.border.asked_twice else None), stock)


def test_a_network_that_was_trained_to_inpaint():
    "It reads nine channels, the mask and the rest of the picture beside x_t, and answers in four."
    torch.manual_seed(0)
    model = sd15(in_channels=9)
    model.name = "sd15"
    pipe, given = from_a_picture(model, "inpaint")
    with guide(pipe, CFG(4., adapter=0), "a cat") as generate: ours = generate(generator=noise(), **given).images
    assert torch.equal(ours, pipe("a cat", guidance_scale=4., generator=noise(), **given).images)
    with guide(pipe, every(CFG(4., adapter=0), 2), "a cat", max_rows=1) as generate: assert generate(generator=noise(), **given).images.isfinite().all()


@pytest.mark.parametrize("model, task", TASKS, indirect=["model"])
def test_every_rule_runs_in_other_tasks(model, task):
    "Each that runs from text alone; in one call."
    pipe, given = from_a_picture(model, task)
    (calls, hook), rules = calls_of(model.model), [name for of, name in PAIRS if of == model.name and not is_refused(of, name)]
    for name in rules:
        with guide(pipe, made(name), "a cat", **further(made(name)), **model.encoding) as generate:
            assert generate(generator=noise(), **given | dict(num_inference_steps=2, strength=.5)).images.isfinite().all()
    hook.remove()
    assert len(calls) == len(rules) > 20


@pytest.mark.parametrize("name", ["flux1", "flux2_klein"])
def test_cfg_equals_stock_beside_a_picture(name):
    "FLUX Kontext and FLUX.2 look at a picture: its tokens stand behind those that are drawn."
    model = tiny(name)
    task = model.pipe
    if name == "flux1": task = FluxKontextPipeline(**{k: v for k, v in model.pipe.components.items()})
    task.set_progress_bar_config(disable=True)
    more = dict(image=Image.effect_noise((64, 64), 50).convert("RGB"), num_inference_steps=3, output_type="latent", **model.size)
    if name == "flux1": more |= dict(_auto_resize=False, max_area=16 * 24)
    seen = []
    hook = model.model.register_forward_hook(lambda m, args, kwargs, out: seen.append(out[0].shape[1]), with_kwargs=True)
    with guide(task, CFG(4.), "a cat", max_rows=1, **model.encoding) as generate: ours = generate(generator=noise(), **more).images
    hook.remove()
    assert min(seen) > 24                                                               # tokens of both pictures
    assert torch.equal(ours, task(prompt="a cat", generator=noise(), **more, **model.stock(4., None), **model.encoding).images)
