"The style contrast and its rival: what must hold for every rule of the family, and where they fall back to plainer ones."
import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st

from parallel_rescale.method import style_contrast as module
from parallel_rescale.method.classifier_free import cfg
from parallel_rescale.machine.denoiser import guided
from parallel_rescale.machine.prompts import encode_prompts
from parallel_rescale.method.guidance import Branch, RULES
from parallel_rescale.method.registry import label, rule
from parallel_rescale.method.rules import ConsistencyGuidance, ParallelRescale
from parallel_rescale.method.schedules import every, interval
from parallel_rescale.method.parallel_rescaling import RATIOS
from parallel_rescale.tools.plot import rule_color
from parallel_rescale.method.style_contrast import NegativeStyle, reference_prompt, style_leak
from parallel_rescale.method.style_contrast import StyleContrast

settings.register_profile("contrast", max_examples=40, deadline=None)
settings.load_profile("contrast")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONTRASTS = [StyleContrast(whole=w, ratio=k) for w in (True, False) for k in RATIOS]
BOTH = [pytest.param(r, id=repr(r)) for r in CONTRASTS + [NegativeStyle()]]
weights = st.floats(0., 12., allow_nan=False)


@st.composite
def predictions(draw, n=4, scale=None):
    "n random predictions [B, C, H, W] of one shape, offset from one another like a model's."
    shape = [draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(2, 7)), draw(st.integers(2, 7))]
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, .1, 1., 30.])) if scale is None else scale
    noise = torch.randn(shape, generator=g)
    return [noise + scale * torch.randn(shape, generator=g) for _ in range(n)]


# ---------------------------------------------------------------- where it falls back


@given(predictions(3), weights, weights, st.sampled_from(DTYPES), st.booleans())
def test_without_a_style_direction_it_is_consistency_guidance_exactly(vs, text, cons, dtype, whole):
    null, base, subject = (v.to(dtype) for v in vs)
    out = StyleContrast(text, cons, whole).combine(null, base, base.clone(), subject)
    assert torch.equal(out, ConsistencyGuidance(text, cons).combine(null, base, subject)) and out.isfinite().all()


@given(predictions(3), weights, weights, st.sampled_from(RATIOS[:1] + RATIOS[2:]), st.booleans())
def test_without_a_style_direction_and_with_a_ratio_it_is_parallel_rescaling_exactly(vs, text, cons, ratio, whole):
    null, base, subject = vs
    assert torch.equal(StyleContrast(text, cons, whole, ratio).combine(null, base, base, subject), ParallelRescale(text, cons, ratio).combine(null, base, subject))


@given(predictions(4), st.booleans())
def test_a_fading_style_direction_fades_out(vs, whole):
    g_cons, g_style, g_text = (vs[i + 1] - vs[0] for i in range(3))
    taken = [(style_leak(g_cons, s * g_style, g_text, whole) * s * g_style).norm() for s in (1e-3, 1e-4, 1e-5)]
    assert taken[0] <= .1 * g_cons.norm() * (g_style.norm() / g_text.norm()).clamp(min=1) * 10
    assert taken[1] <= .11 * taken[0] + 1e-20 and taken[2] <= .11 * taken[1] + 1e-20   # as the length of g_style, not as its direction


@given(predictions(4), weights, st.sampled_from(DTYPES))
def test_consistency_0_is_cfg_on_the_base_model_exactly(vs, text, dtype):
    vs = [v.to(dtype) for v in vs]
    for r in (StyleContrast(text, 0.), StyleContrast(text, 0., False), NegativeStyle(text, 0.)): assert torch.equal(r.combine(*vs), cfg(*vs[:2], text))


@given(predictions(4), weights)
def test_a_subject_that_pulls_away_from_the_references_is_left_alone(vs, cons):
    null, base, reference, _ = vs
    away = base - .7 * (reference - base)
    expected = ConsistencyGuidance(5., cons).combine(null, base, away)
    for whole in (True, False): assert torch.equal(StyleContrast(5., cons, whole).combine(null, base, reference, away), expected)


@given(predictions(4), weights)
def test_negative_style_0_is_consistency_guidance_exactly(vs, cons):
    null, base, _, subject = vs
    assert torch.equal(NegativeStyle(5., cons, 0.).combine(*vs), ConsistencyGuidance(5., cons).combine(null, base, subject))


# ---------------------------------------------------------------- what it takes away


@given(predictions(4), st.booleans())
def test_what_is_taken_is_a_part_of_the_consistency_direction(vs, whole):
    g_cons, g_style, g_text = (vs[i + 1] - vs[0] for i in range(3))
    q = style_leak(g_cons, g_style, g_text, whole)
    assert q.dtype == torch.float32 and q.shape == (len(g_cons), 1, *((1, 1) if whole else g_cons.shape[2:])) and (q >= 0).all()
    dims = (1, 2, 3) if whole else (1,)
    taken, rest = q * g_style, g_cons - q * g_style
    assert (taken.square().sum(dims) <= g_cons.square().sum(dims) * 1.0001 + 1e-30).all()
    assert (rest.square().sum(dims) <= g_cons.square().sum(dims) * 1.0001 + 1e-30).all()
    assert ((rest * g_style).sum(dims) <= (g_cons * g_style).sum(dims).clamp(min=0) + 1e-5 * g_cons.abs().max() * g_style.abs().max() * g_cons[0].numel()).all()


@given(predictions(4), st.booleans())
def test_without_a_floor_nothing_of_the_references_style_is_left(vs, whole):
    g_cons, g_style, g_text = (vs[i + 1] - vs[0] for i in range(3))
    dims = (1, 2, 3) if whole else (1,)
    rest = g_cons - style_leak(g_cons, g_style, g_text, whole, floor=0.) * g_style
    size = g_cons.square().sum(dims).sqrt() * g_style.square().sum(dims).sqrt()
    assert ((rest * g_style).sum(dims) <= 1e-4 * size + 1e-30).all()


def test_negative_style_takes_a_fixed_share():
    g_cons, g_style, g_text = torch.randn(3, 2, 4, 5, 5)
    null, base = torch.zeros_like(g_cons), torch.zeros_like(g_cons)
    assert torch.equal(NegativeStyle(amount=.5).direction(null, base, g_style, g_cons), g_cons - .5 * g_style)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("r", BOTH)
@given(predictions(4))
def test_samples_do_not_influence_one_another(r, vs):
    together = r.combine(*vs)
    for i in range(len(together)):
        alone = r.combine(*(v[i:i + 1] for v in vs))
        assert (alone - together[i:i + 1]).abs().max() <= 1e-5 * together.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("r", BOTH)
@given(predictions(4, scale=.3))
def test_half_in_half_out(r, dtype, vs):
    vs = [v.to(dtype) for v in vs]
    out = r.combine(*vs)
    assert out.dtype == dtype and out.isfinite().all()
    if getattr(r, "ratio", "raw") == "raw":   # the ratio's own precision is its own chapter's business
        exact = r.combine(*(v.float() for v in vs))
        assert (out.float() - exact).abs().max() <= 60 * torch.finfo(dtype).eps * max(1, exact.abs().max())


@pytest.mark.parametrize("r", BOTH)
def test_extreme_predictions_give_finite_results(r):
    for dtype, sizes in ((torch.float32, (0., 1e-30, 1e-12, 1e6)), (torch.float16, (0., 6e-8, 100.))):
        for a in sizes:
            for b in sizes:
                null, reference, subject = (torch.randn(1, 4, 3, 3) for _ in range(3))
                vs = [(s * v).to(dtype) for s, v in ((1., null), (0., null), (a, reference), (b, subject))]
                assert r.combine(*vs).isfinite().all()
    assert torch.equal(r.combine(*[torch.zeros(1, 4, 3, 3)] * 4), torch.zeros(1, 4, 3, 3))


@pytest.mark.parametrize("r", BOTH)
def test_one_nan_reaches_its_own_sample_and_no_other(r):
    for k in range(4):
        vs = [torch.randn(2, 4, 3, 3) for _ in range(4)]
        vs[k][0] = math.nan
        out = r.combine(*vs)
        assert out[0].isnan().any() and out[1].isfinite().all()


@pytest.mark.parametrize("r", BOTH)
@given(predictions(5), st.floats(.05, .999))
def test_the_parametrisation_does_not_matter(r, vs, alpha):
    "x₀-predictions: at a fixed x they are affine in the noise predictions."
    x, *eps = (v.double() for v in vs)
    sigma = math.sqrt(1 - alpha**2)
    to_x0 = lambda e: (x - sigma * e) / alpha
    converted = [to_x0(e) for e in eps]
    size = 4e-7 * (1 + max(c.abs().max() for c in converted)) * 20
    assert (r.combine(*converted) - to_x0(r.combine(*eps))).abs().max() <= size


@pytest.mark.parametrize("r", BOTH)
@given(predictions(1))
def test_equal_predictions_stay_as_they_are(r, vs):
    assert torch.equal(r.combine(*vs * 4), vs[0])


# ---------------------------------------------------------------- members of the family


@pytest.mark.parametrize("r", BOTH)
def test_a_rule_is_a_value(r):
    assert r == copy.deepcopy(r) and hash(r) == hash(copy.deepcopy(r)) and pickle.loads(pickle.dumps(r)) == r
    assert eval(repr(r), vars(module)) == r
    assert r.branches == (Branch("null"), Branch("base"), Branch("reference"), Branch("subject", 1.)) and r.needs_subject
    assert r.branches[r.anchor] == Branch("base")
    vs = [torch.randn(1, 4, 4, 4) for _ in range(4)]
    kept = [v.clone() for v in vs]
    r.combine(*vs)
    assert all(map(torch.equal, vs, kept))


def test_they_are_in_the_family():
    assert RULES["style_contrast"] is StyleContrast and RULES["negative_style"] is NegativeStyle
    assert rule("style-contrast:text=3,consistency=2,whole=false,ratio=normalize") == StyleContrast(3., 2., False, "normalize")
    assert rule("negative_style:text=3,amount=0.25,every=2") == every(NegativeStyle(3., amount=.25), 2)
    assert label(StyleContrast()) == "style contrast 7.5/3" and "negative style" in label(NegativeStyle())
    assert rule_color(every(StyleContrast(), 2)) == rule_color("style_contrast") == StyleContrast.color


@pytest.mark.parametrize("bad,says", [(dict(text=math.nan), "StyleContrast: text"), (dict(ratio="normalise"), "normalize"), (dict(whole=1), "whole")])
def test_bad_arguments(bad, says):
    with pytest.raises(ValueError, match=says): StyleContrast(**bad)


def test_scales_may_move_and_wrappers_work():
    r = StyleContrast(consistency=lambda progress: 3 * (1 - progress))
    assert [r.at(p).consistency for p in (0., 1.)] == [3., 0.]
    branches, _ = interval(r, .5, 1.).step(0, 10, {})
    assert branches == (Branch("subject", 1.),)
    memory, w = {}, every(NegativeStyle(5., 2.), 2)
    vs = [torch.randn(1, 4, 3, 3) for _ in range(4)]
    guided_ = w.step(0, 4, memory)[1](*vs)
    (anchor,), between = w.step(1, 4, memory)
    assert anchor == Branch("base") and torch.equal(between(vs[1]), vs[1] + (guided_ - vs[1]))


def test_reference_prompt():
    assert reference_prompt(["a photo of a {subject} on the beach", "a photo of a {subject} in the snow"]) == "a photo of a {subject}"
    assert reference_prompt(["a {subject} asleep, oil painting", "a {subject} in a boat, oil painting"]) == "a {subject}, oil painting"
    for unclear in ([], ["{subject}"], ["a photo of a {subject}", "the {subject}"]): assert reference_prompt(unclear) == "a photo of a {subject}"


def test_the_denoiser_runs_it():
    from parallel_rescale.tools.embedded import load_tiny_sdxl
    from peft import LoraConfig
    pipe = load_tiny_sdxl(device="cpu")
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    texts = dict(null="", base="a pencil sketch of a cat", reference="a photo of a cat", subject="a pencil sketch of a cat")
    prompts = encode_prompts(pipe, texts)
    def sample(r):
        with guided(pipe.unet, r, prompts, scheduler=pipe.scheduler):
            return pipe("x", num_inference_steps=2, guidance_scale=1., output_type="latent", generator=torch.Generator().manual_seed(0)).images
    plain, contrast = sample(ConsistencyGuidance(3., 2.)), sample(StyleContrast(3., 2., whole=False))
    assert contrast.isfinite().all() and not torch.equal(plain, contrast)
    prompts = prompts | dict(reference=prompts["base"])
    assert (sample(StyleContrast(3., 2., whole=False)) - plain).abs().max() < 1e-4 * plain.abs().max()
    with pytest.raises(ValueError, match="reference"):
        with guided(pipe.unet, StyleContrast(), {k: v for k, v in prompts.items() if k != "reference"}, scheduler=pipe.scheduler): pass
