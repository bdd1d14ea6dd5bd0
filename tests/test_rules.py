"""Properties of the guidance rules: the list of what must hold for the method, for every rule where it can be said of every rule."""
import copy, importlib, json, math, os, pickle, subprocess, sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest, torch
from hypothesis import assume, given, settings, strategies as st

from parallel_rescale.method.classifier_free import cfg
from parallel_rescale.method.projection import coefficient, project
from parallel_rescale.method.consistency import consistency_guidance, consistency_ratio, ratio_summary
from parallel_rescale.method.parallel_rescaling import RATIOS, normalize_ratio, parallel_rescale
from parallel_rescale.method.guidance import Adapter, Branch, Guidance, RULES, Scale
from parallel_rescale.method.registry import known_rules, label, rule
from parallel_rescale.method.rules import AutoGuidance, CFG, ConsistencyGuidance, OrthogonalOnly
from parallel_rescale.method.rules import ParallelRescale, PersonalizationGuidance
from parallel_rescale.method.schedules import every, interval

ROOT = Path(__file__).parents[1]
settings.register_profile("rules", max_examples=40, deadline=None)
settings.load_profile("rules")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OWN = {n: c for n, c in known_rules().items() if c.__module__.startswith("parallel_rescale.")}   # other tests make rules too
ALL = [pytest.param(c(), id=n) for n, c in OWN.items()]
THREE = (ConsistencyGuidance, ParallelRescale, OrthogonalOnly)


@st.composite
def predictions(draw, n=3, dtype=torch.float32, scale=None):
    "n random predictions [B, C, H, W] of one shape, offset from one another like a model's."
    shape = [draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(2, 7)), draw(st.integers(2, 7))]
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, .1, 1., 30.])) if scale is None else scale
    noise = torch.randn(shape, generator=g)
    return [((noise + scale * torch.randn(shape, generator=g))).to(dtype) for _ in range(n)]


def close(a, b, rel=1e-5):
    "Equal up to `rel` of the largest entry."
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= rel * max(a.abs().max(), b.abs().max(), torch.tensor(1e-30))


weights = st.floats(0., 12., allow_nan=False)

# ---------------------------------------------------------------- 1. the split


@given(predictions(2), st.sampled_from([(1,), (1, 2, 3)]))
def test_parts_add_up_and_are_orthogonal(vs, dims):
    v, onto = vs
    par, orth = project(v, onto, dims)
    close(par + orth, v)
    dot = (orth.double() * onto.double()).sum(dims)
    size = v.double().square().sum(dims).sqrt() * onto.double().square().sum(dims).sqrt()
    assert (dot.abs() <= 1e-5 * size + 1e-30).all()


@given(predictions(2))
def test_projection_is_idempotent_and_ignores_the_length_of_the_direction(vs):
    v, onto = vs
    par, orth = project(v, onto)
    again, rest = project(par, onto)
    size = v.abs().max()
    assert (again - par).abs().max() <= 1e-5 * size and rest.abs().max() <= 1e-5 * size
    assert (project(v, -3 * onto)[0] - par).abs().max() <= 1e-5 * size


@given(predictions(2))
def test_a_zero_direction_leaves_everything_orthogonal(vs):
    v, onto = (t.clone() for t in vs)
    onto[..., 0, 0] = 0
    par, orth = project(v, onto)
    assert torch.equal(par[..., 0, 0], torch.zeros_like(v[..., 0, 0])) and torch.equal(orth[..., 0, 0], v[..., 0, 0])
    p = consistency_ratio(v, onto)
    assert p.isfinite().all() and (p[..., 0, 0] == 0).all()
    # the location keeps g_cons whole whatever is made of p
    for ratio in RATIOS: assert torch.equal(parallel_rescale(v, onto, ratio)[..., 0, 0], v[..., 0, 0])


@given(st.floats(1e-45, 1e-3), st.floats(1e-20, 1e3))
def test_tiny_directions_never_overflow(small, size):
    v, onto = size * torch.randn(1, 4, 3, 3), small * torch.randn(1, 4, 3, 3)
    for part in project(v, onto): assert part.isfinite().all()
    for ratio in RATIOS: assert parallel_rescale(v, onto, ratio).isfinite().all()

# ---------------------------------------------------------------- 2. the normalised ratio


@given(predictions(2))
def test_normalised_ratio_has_mean_0_and_std_1(vs):
    raw = consistency_ratio(*vs)
    p = normalize_ratio(raw)
    assert p.dtype == torch.float32 and p.shape == vs[0][:, :1].shape
    # what float32 leaves of a small spread around a large mean
    tolerance = 1e-5 + 1e-6 * (raw.abs().amax((1, 2, 3)) / raw.std((1, 2, 3), unbiased=False)).max()
    assert p.flatten(1).mean(1).abs().max() < tolerance
    assert (p.flatten(1).std(1, unbiased=False) - 1).abs().max() < tolerance


@given(st.floats(-1e6, 1e6), st.integers(1, 4))
def test_constant_ratio_becomes_zero(value, b):
    p = torch.full((b, 1, 5, 5), value)
    assert torch.equal(normalize_ratio(p), torch.zeros_like(p))
    v = torch.randn(b, 4, 5, 5)
    # g_cons = k·g_text everywhere: nothing is orthogonal and the ratio is constant
    assert parallel_rescale(2 * v, v).abs().max() < 1e-5 * v.abs().max()


@given(predictions(2), st.floats(.01, 100.), st.floats(-50., 50.))
def test_normalised_ratio_ignores_scale_and_shift(vs, k, shift):
    p = consistency_ratio(*vs).double()
    assume(p.std((1, 2, 3)).min() > .01)  # far from where a spread counts as none
    assert (normalize_ratio(k * p + shift) - normalize_ratio(p)).abs().max() < 1e-6


def test_one_nan_reaches_its_own_sample_and_no_other():
    v, onto = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    v[0, 0, 0, 0] = math.nan
    out = parallel_rescale(v, onto)
    assert out[0].isnan().any() and out[1].isfinite().all()
    onto[0] = math.nan  # a NaN direction is not taken for a zero one
    assert consistency_ratio(v, onto)[0].isnan().all()


@given(predictions(2))
def test_what_the_ratio_options_do(vs):
    g_cons, g_text = vs
    p, (par, orth) = consistency_ratio(g_cons, g_text), project(g_cons, g_text)
    mean, std = p.mean((1, 2, 3), keepdim=True), p.std((1, 2, 3), keepdim=True, unbiased=False)
    assert torch.equal(parallel_rescale(g_cons, g_text, "raw"), g_cons)
    size = 1e-5 * (g_cons.abs().max() + (p * g_text).abs().max())
    for ratio, p_hat in dict(none=0 * p, center=p - mean, scale=p / std, normalize=(p - mean) / std).items():
        expected = p_hat * g_text + orth
        assert (parallel_rescale(g_cons, g_text, ratio) - expected).abs().max() <= size + 1e-4 * expected.abs().max()
        twice = 2 * p_hat * g_text + orth
        assert (parallel_rescale(g_cons, g_text, ratio, gain=2.) - twice).abs().max() <= size + 1e-4 * twice.abs().max()
    close(parallel_rescale(g_cons, g_text, "normalize", gain=0.), parallel_rescale(g_cons, g_text, "none"))


@given(predictions(2))
def test_whole_latent_projection_uses_one_ratio_a_sample(vs):
    g_cons, g_text = vs
    assert consistency_ratio(g_cons, g_text, (1, 2, 3)).shape == (len(g_cons), 1, 1, 1)
    assert (parallel_rescale(g_cons, g_text, "none", whole=True) - project(g_cons, g_text, (1, 2, 3))[1]).abs().max() <= 1e-5 * g_cons.abs().max() + 1e-30
    # one number has no spread, so its normalised value is 0
    assert torch.equal(parallel_rescale(g_cons, g_text, whole=True), parallel_rescale(g_cons, g_text, "none", whole=True))


def test_ratio_summary():
    p = torch.arange(25.).reshape(1, 1, 5, 5).repeat(2, 1, 1, 1)
    s = ratio_summary(p)
    assert set(s) == {"mean", "std", "q05", "q25", "q50", "q75", "q95"} and all(v.shape == (2,) for v in s.values())
    assert s["mean"][0] == s["q50"][1] == 12 and s["q05"][0] == pytest.approx(1.2)

# ---------------------------------------------------------------- 3. limits of the rules


@given(predictions(3), weights, weights)
def test_raw_ratio_is_consistency_guidance_exactly(vs, text, cons):
    expected = ConsistencyGuidance(text, cons).combine(*vs)
    assert torch.equal(ParallelRescale(text, cons, "raw").combine(*vs), expected)
    assert torch.equal(consistency_guidance(*vs, text, cons), expected)


@given(predictions(3), weights, st.sampled_from(DTYPES))
def test_consistency_0_is_cfg_on_the_base_model_exactly(vs, text, dtype):
    vs = [v.to(dtype) for v in vs]
    expected = CFG(text, adapter=0).combine(*vs[:2])
    for c in THREE: assert torch.equal(c(text, 0.).combine(*vs), expected)


@given(predictions(3))
def test_unit_weights_give_the_subject_prediction(vs):
    size = max(v.abs().max() for v in vs)
    for r in (ConsistencyGuidance(1., 1.), ParallelRescale(1., 1., "raw")):
        assert (r.combine(*vs) - vs[2]).abs().max() <= 1e-6 * size


@given(predictions(3), weights, weights)
def test_orthogonal_only_is_the_ablation_none(vs, text, cons):
    a, b = OrthogonalOnly(text, cons).combine(*vs), ParallelRescale(text, cons, "none").combine(*vs)
    assert (a - b).abs().max() <= 1e-5 * max(v.abs().max() for v in vs) * (1 + cons)


@given(predictions(3))
def test_equal_models_and_prompts_need_no_rule(vs):
    "Where θ says what φ says, consistency guidance and its family are CFG on the base model."
    null, base, _ = vs
    for c in THREE: assert torch.equal(c(5., 3.).combine(null, base, base.clone()), cfg(null, base, 5.))

# ---------------------------------------------------------------- 4. parametrisation


def to_v(eps, x, alpha, sigma): return (eps - sigma * x) / alpha
def to_x0(eps, x, alpha, sigma): return (x - sigma * eps) / alpha
def to_flow(eps, x, alpha, sigma): return eps - to_x0(eps, x, alpha, sigma)


# these compare a prediction, not a difference of two, with another: which parametrisation they see matters to them
SEES_THE_PREDICTION = {"apg", "cfg_zero", "tangential"}


@pytest.mark.parametrize("convert", [to_v, to_x0, to_flow])
@pytest.mark.parametrize("r", [pytest.param(c(), id=n) for n, c in OWN.items() if n not in SEES_THE_PREDICTION])
@given(predictions(5), st.floats(.05, .999))
def test_the_parametrisation_does_not_matter(r, convert, vs, alpha):
    x, *eps = (v.double() for v in vs)
    eps, args = eps[:len(r.branches)], (x, alpha, math.sqrt(1 - alpha**2))
    converted = [convert(e, *args) for e in eps]
    size = 1e-9 * (1 + 20 * max(c.abs().max() for c in converted)) * 20
    assert (r.combine(*converted) - convert(r.combine(*eps), *args)).abs().max() <= size
    if len(eps) == 3:
        p, q = (consistency_ratio(c[2] - c[1], c[1] - c[0]) for c in (eps, converted))
        assert (p - q).abs().max() <= 1e-8 * (1 + p.abs().max())

# ---------------------------------------------------------------- 5. batches and half precision


@pytest.mark.parametrize("r", ALL + [pytest.param(ParallelRescale(ratio=k, whole=w), id=f"{k}-{w}") for k in RATIOS for w in (False, True)])
@given(predictions(4))
def test_samples_do_not_influence_one_another(r, vs):
    vs = vs[:len(r.branches)]
    together = r.combine(*vs)
    for i in range(len(together)):
        alone = r.combine(*(v[i:i + 1] for v in vs))
        assert (alone - together[i:i + 1]).abs().max() <= 1e-5 * together.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("r", ALL)
@given(predictions(4, scale=.3))
def test_half_in_half_out(r, dtype, vs):
    vs = [v.to(dtype) for v in vs[:len(r.branches)]]
    out = r.combine(*vs)
    assert out.dtype == dtype and out.isfinite().all()
    exact = r.combine(*(v.float() for v in vs))
    eps, amplify = torch.finfo(dtype).eps, 60  # weights of up to 7.5 and 3 enlarge the rounding of the inputs' differences
    assert (out.float() - exact).abs().max() <= amplify * eps * max(1, exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_statistics_of_half_inputs_are_float32(dtype):
    v, onto = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 4, 8, 8).to(dtype)
    assert consistency_ratio(v, onto).dtype == torch.float32
    assert torch.equal(consistency_ratio(v, onto), consistency_ratio(v.float(), onto.float()))
    assert normalize_ratio(consistency_ratio(v, onto).to(dtype)).dtype == torch.float32
    # squares of 300 overflow float16: they must never be formed there
    if dtype == torch.float16:
        assert parallel_rescale(300 * v, 300 * onto).isfinite().all() and project(300 * v, 300 * onto)[0].isfinite().all()


def test_rules_leave_their_inputs_alone():
    for c in OWN.values():
        r = c()
        vs = [torch.randn(1, 4, 4, 4) for _ in r.branches]
        kept = [v.clone() for v in vs]
        r.combine(*vs)
        assert all(map(torch.equal, vs, kept))

# ---------------------------------------------------------------- 6. CFG, autoguidance, personalization guidance


@given(predictions(2), st.floats(0, 15), st.sampled_from(DTYPES))
def test_cfg_is_diffusers_to_the_bit(vs, scale, dtype):
    from diffusers.guiders import ClassifierFreeGuidance
    null, cond = (v.to(dtype) for v in vs)
    if abs(scale - 1) > 1e-6 and scale > 1e-6:  # where diffusers' guider switches itself off it returns `cond`
        guider = ClassifierFreeGuidance(guidance_scale=scale)
        guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(999))
        expected = guider.forward(pred_cond=cond, pred_uncond=null)
        assert torch.equal(CFG(scale).combine(null, cond), getattr(expected, "pred", expected))
    assert torch.equal(CFG(scale).combine(null, cond), null + scale * (cond - null))  # as in the pipelines


@given(predictions(2), weights)
def test_cfg_limits(vs, scale):
    assert torch.equal(cfg(*vs, 0.), vs[0])
    assert (cfg(*vs, 1.) - vs[1]).abs().max() <= 1e-6 * max(v.abs().max() for v in vs)
    assert torch.equal(cfg(vs[0], vs[0], scale), vs[0])


@given(predictions(2), weights)
def test_personalization_guidance_at_omega_1_is_cfg_on_theta(vs, scale):
    assert PersonalizationGuidance(scale, 1.).branches == CFG(scale).branches
    assert torch.equal(PersonalizationGuidance(scale, 1.).combine(*vs), CFG(scale).combine(*vs))
    assert PersonalizationGuidance(scale, 0.).branches[0] == Branch("null", 0.)


def test_autoguidance_branches():
    assert AutoGuidance(weak=.3).branches == (Branch("subject", .3), Branch("subject", 1.))
    assert AutoGuidance(weak="early", adapter="late").branches == (Branch("subject", {"early": 1.}), Branch("subject", {"late": 1.}))
    assert AutoGuidance(weak={"a": .2, "b": 0}).branches[0].adapter == {"a": .2, "b": 0.}


def test_branches_of_the_rules():
    three = (Branch("null"), Branch("base"), Branch("subject", 1.))
    for c in THREE: assert c().branches == three
    assert CFG().branches == (Branch("null", 1.), Branch("subject", 1.))
    assert CFG(adapter=0).branches == (Branch("null"), Branch("base"))
    assert CFG(adapter={"dog": .5}).branches == (Branch("null", {"dog": .5}), Branch("subject", {"dog": .5}))
    assert CFG(adapter={"dog": 0.}).branches[1].prompt == "base"

# ---------------------------------------------------------------- every rule


def test_registry():
    assert list(RULES)[:6] == ["cfg", "consistency", "parallel_rescale", "orthogonal_only", "autoguidance", "personalization"]
    assert all(c.name == n and issubclass(c, Guidance) for n, c in RULES.items())
    assert (CFG().scale, ConsistencyGuidance().text, ConsistencyGuidance().consistency) == (5., 7.5, 3.)
    assert (ParallelRescale().text, ParallelRescale().consistency, ParallelRescale().ratio) == (7.5, 3., "normalize")


@pytest.mark.parametrize("r", ALL + [pytest.param(interval(ParallelRescale(), .1, .9), id="interval"), pytest.param(every(CFG(), 3), id="every")])
def test_a_rule_is_a_value(r):
    import parallel_rescale as g
    assert r == copy.deepcopy(r) and hash(r) == hash(copy.deepcopy(r)) and pickle.loads(pickle.dumps(r)) == r
    assert eval(repr(r), {**{n: getattr(g, n) for n in g.__all__}, type(r).__name__: type(r)}) == r
    assert label(r) == r.label and 0 < len(r.label) < 60
    assert r.needs_subject
    with pytest.raises(Exception): r.name2 = 1
    assert r.at(.5) == r
    out = r.combine(*(torch.randn(2, 4, 5, 5) for _ in r.branches))
    assert out.shape == (2, 4, 5, 5)


@pytest.mark.parametrize("r", ALL)
@given(predictions(3))
def test_equal_predictions_stay_as_they_are(r, vs):
    "Nothing to guide along: g_text = g_cons = 0."
    assert torch.equal(r.combine(*[vs[0]] * len(r.branches)), vs[0])


def test_base_cfg_needs_no_subject():
    assert not CFG(adapter=0).needs_subject and label(CFG(adapter=0)) == "base CFG 5"


def scale_names(c): return [f.name for f in fields(c) if f.type in (Scale, Adapter) and f.name != "adapter"]
NAMED = [(n, s) for n, c in OWN.items() for s in scale_names(c)]


@pytest.mark.parametrize("name,scale", NAMED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "much", None, True, [1.]])
def test_bad_scales_are_refused_by_name(name, scale, bad):
    c = RULES[name]
    if (scale, bad) == ("weak", "much"): return  # an adapter's name
    with pytest.raises(ValueError, match=f"{c.__name__}.*{scale}|Branch"): c(**{scale: bad})
    with pytest.raises(ValueError, match=f"{c.__name__}.*{scale}|Branch"): c(**{scale: lambda progress: bad}).at(.5)


@pytest.mark.parametrize("name,scale", NAMED)
def test_every_scale_may_be_a_function_of_the_progress(name, scale):
    c = RULES[name]
    moving = c(**{scale: lambda progress: 1 - progress})
    seen = []
    for i in range(5):
        branches, combine = moving.step(i, 5, {})
        fixed = c(**{scale: 1 - i / 4})
        vs = [torch.randn(1, 4, 3, 3) for _ in branches]
        assert branches == fixed.branches and torch.equal(combine(*vs), fixed.combine(*vs))
        seen.append(getattr(moving.at(i / 4), scale))
    assert seen == [1., .75, .5, .25, 0.] and "ƒ" in label(moving)


def test_a_moving_omega_moves_the_weak_branch():
    r = PersonalizationGuidance(5., lambda progress: progress)
    assert [r.step(i, 3, {})[0][0].adapter for i in range(3)] == [0., .5, 1.]
    with pytest.raises(ValueError, match="omega"): PersonalizationGuidance(omega=1.5)
    with pytest.raises(ValueError, match="omega"): PersonalizationGuidance(omega=lambda progress: 2.).at(0)
    with pytest.raises(ValueError, match="adapter"): CFG(adapter=lambda progress: progress)


def test_one_step_run_has_progress_0():
    assert ParallelRescale(lambda progress: 2 + progress).step(0, 1, {})[1].__self__.text == 2


def test_branch():
    assert hash(Branch("subject", {"a": 1, "b": .5})) == hash(Branch("subject", {"b": .5, "a": 1}))
    assert Branch("x").adapter == 0 and not Branch("x").adapted and Branch("x", {"a": .1}).adapted and not Branch("x", {"a": 0}).adapted
    for bad in ("", None, 3):
        with pytest.raises(ValueError, match="prompt"): Branch(bad)
    for bad in (math.nan, {"a": math.inf}, None):
        with pytest.raises(ValueError, match="adapter"): Branch("x", bad)


@pytest.mark.parametrize("bad", ["mean", None, "Normalize"])
def test_unknown_ratio(bad):
    with pytest.raises(ValueError, match="ratio"): ParallelRescale(ratio=bad)
    with pytest.raises(ValueError, match="ratio"): parallel_rescale(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2), bad)
    with pytest.raises(ValueError, match="whole"): ParallelRescale(whole=1)

# ---------------------------------------------------------------- from text


def test_rule_from_text():
    assert rule("cfg") == CFG() and rule("cfg", scale=3) == CFG(3) and rule("consistency", text=3) == ConsistencyGuidance(3)
    assert rule("parallel_rescale:text=3,consistency=2") == ParallelRescale(3, 2) == rule(" parallel-rescale : text = 3 , consistency=2 ")
    assert rule("parallel_rescale:ratio=center,whole=true,gain=0.5") == ParallelRescale(ratio="center", whole=True, gain=.5)
    assert rule("autoguidance:weak=early,scale=2") == AutoGuidance(2., "early") and rule("autoguidance:weak=.25").weak == .25
    assert rule("personalization:omega=1", omega=.5) == PersonalizationGuidance(omega=.5)
    assert rule("consistency:every=2,start=0.2") == every(interval(ConsistencyGuidance(), .2, 1.), 2)


@pytest.mark.parametrize("text,says", [("paralel_rescale", "parallel_rescale"), ("CFG", "cfg"), ("", "guidance rule"), ("cfg:skale=3", "scale"), ("cfg:3", "argument=value"),
                                       ("cfg:scale=nan", "CFG: scale"), ("cfg:scale=x", "CFG: scale"), ("cfg:every=1.5", "every: k"), ("cfg:start=.9,stop=.1", "start < stop")])
def test_bad_text(text, says):
    with pytest.raises(ValueError, match=says): rule(text)

# ---------------------------------------------------------------- wrappers


def fake_run(r, n, seed=0, start=0):
    "A little sampling run on a linear stand-in for a model: (final x, names of the branches evaluated at each step)."
    g = torch.Generator().manual_seed(seed)
    target = {}
    x, memory, calls = torch.randn(2, 4, 3, 3, generator=g), {}, []
    for b in r.branches: target[b] = torch.randn(4, 3, 3, generator=g)
    for i in range(start, n):
        branches, combine = r.step(i, n, memory)
        calls.append([(b.prompt, b.adapter) for b in branches])
        x = x - .1 * combine(*(x - target[b] for b in branches))
    return x, calls


@pytest.mark.parametrize("r", ALL)
@pytest.mark.parametrize("wrap", [lambda r: interval(r, 0, 1), lambda r: every(r, 1), lambda r: every(interval(r, 0, 1), 1), lambda r: interval(every(r, 1), 0, 1)])
def test_wrappers_that_change_nothing(r, wrap):
    a, b = fake_run(r, 7), fake_run(wrap(r), 7)
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert wrap(r).branches == r.branches and wrap(r).needs_subject == r.needs_subject


@pytest.mark.parametrize("r", ALL)
def test_interval(r):
    last = [(r.branches[-1].prompt, r.branches[-1].adapter)]
    _, calls = fake_run(interval(r, .2, .6), 10)
    assert [len(c) > 1 for c in calls] == [False] * 2 + [True] * 4 + [False] * 4
    assert all(c == last for c in calls[:2] + calls[6:])
    # outside, the prediction itself
    x = torch.randn(1, 4, 2, 2)
    assert interval(r, .5, 1.).step(0, 10, {})[1](x) is x


@pytest.mark.parametrize("start,stop", [(-.1, 1), (0, 1.1), (.5, .5), (.6, .4), (math.nan, 1), (0, "x")])
def test_bad_interval(start, stop):
    with pytest.raises(ValueError, match="interval"): interval(CFG(), start, stop)


@pytest.mark.parametrize("r", ALL)
@pytest.mark.parametrize("k", [2, 3])
def test_every_evaluates_one_branch_in_between(r, k):
    _, calls = fake_run(every(r, k), 7)
    assert [len(c) for c in calls] == [len(r.branches) if i % k == 0 else 1 for i in range(7)]
    anchor = r.branches[1 if Branch("base") in r.branches else -1]
    anchor = anchor.prompt, anchor.adapter
    assert all(c == [anchor] for c in calls if len(c) == 1)


@given(predictions(5), st.sampled_from(list(OWN)))
def test_every_keeps_the_offset_from_the_anchor(vs, name):
    r, memory = RULES[name](), {}
    w, first, now = every(r, 2), vs[:len(r.branches)], vs[4]
    branches, combine = w.step(0, 10, memory)
    guided = combine(*first)
    assert branches == r.branches and torch.equal(guided, r.combine(*first))
    (anchor,), between = w.step(1, 10, memory)
    assert torch.equal(between(now), now + (guided - first[r.anchor])) and anchor == r.branches[r.anchor]


def test_every_starts_with_a_full_step_wherever_the_run_starts():
    _, calls = fake_run(every(ParallelRescale(), 2), 10, start=3)  # image-to-image enters late
    assert [len(c) for c in calls] == [3, 1, 3, 1, 3, 1, 3]


def test_every_evaluates_both_stages_of_a_full_step():
    "A second-order solver calls twice with one index."
    w, memory, lengths = every(CFG(), 2), {}, []
    for i in (0, 0, 1, 1, 2, 2):
        branches, combine = w.step(i, 3, memory)
        combine(*(torch.randn(1, 2, 2, 2) for _ in branches))
        lengths.append(len(branches))
    assert lengths == [2, 2, 1, 1, 2, 2]


def test_wrappers_nest():
    for r in (every(interval(ParallelRescale(), .3, .8), 2), interval(every(ParallelRescale(), 2), .3, .8)):
        _, calls = fake_run(r, 10)
        assert [len(c) for c in calls] == [1, 1, 1, 3, 1, 3, 1, 3, 1, 1]
        assert calls[0] == calls[-1] == [("subject", 1.)] and calls[4] == [("base", 0.)]
    x, calls = fake_run(every(every(ParallelRescale(), 2), 3), 7)
    assert x.isfinite().all() and len(calls[0]) == 3


def test_every_keeps_nothing_between_runs():
    r = every(ParallelRescale(), 3)
    assert torch.equal(fake_run(r, 8)[0], fake_run(r, 8)[0])


def test_wrapped_schedules_resolve():
    r = every(interval(CFG(lambda progress: 4 - progress), 0, 1), 2)
    assert r.at(1.).rule.rule.scale == 3 and "ƒ" in label(r) and r.name == "cfg"


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2", None])
def test_bad_every(k):
    with pytest.raises(ValueError, match="every: k"): every(CFG(), k)
    with pytest.raises(ValueError, match="rule"): every("cfg", 2)
    with pytest.raises(ValueError, match="rule"): interval("cfg", 0, 1)


# ---------------------------------------------------------------- pictures of rules


def test_colors_and_grid():
    import numpy as np
    from PIL import Image
    from parallel_rescale import RULES     # with those of all chapters
    from parallel_rescale.tools.plot import image_grid, rule_color
    assert len({rule_color(name) for name in RULES}) == len({c.title for c in RULES.values()}) == len(RULES)
    assert rule_color(every(ParallelRescale(), 2)) == rule_color("parallel_rescale") == ParallelRescale.color
    with pytest.raises(ValueError, match="Did you mean"): rule_color("paralel_rescale")
    black, grey = np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8)
    grid = image_grid([[black, grey], [Image.new("RGB", (8, 8), "red"), None]], ["one", "two words"], ["a", "b"], title="T", scale=4)
    assert grid.mode == "RGB" and grid.width >= 64 and grid.height >= 64
    colors = {c for _, c in grid.getcolors(100_000)}
    assert {(0, 0, 0), (128, 128, 128), (255, 0, 0), (255, 255, 255)} <= colors
    for bad in (dict(row_labels=["one"]), dict(column_labels=["a"]), dict(images=[])):
        with pytest.raises(ValueError, match="image_grid"): image_grid(**{**dict(images=[[black, grey]] * 2, row_labels="12", column_labels="ab"), **bad})
    with pytest.raises(ValueError, match="int64"): image_grid([[np.zeros((8, 8, 3), np.int64)]], ["r"], ["c"])


def test_plot_ratio():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from parallel_rescale.tools.plot import plot_ratio
    run = [dict(t=t, p=ratio_summary(torch.randn(2, 1, 4, 4))) for t in (900, 500, 100)]
    ax = plot_ratio({"photo": run, "sketch": run})
    assert ax.xaxis_inverted() and len(ax.get_legend().get_texts()) == 2
    assert len(plot_ratio(run).lines) == 2
    with pytest.raises(ValueError, match="no records"): plot_ratio([])

# ---------------------------------------------------------------- 12. a rule in a file of its own

FOREIGN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
import parallel_rescale.method.guidance as g
from parallel_rescale.method.guidance import Adapter, Scale
from parallel_rescale.method.rules import ConsistencyGuidance
if TYPE_CHECKING: from nowhere import Unknown

@dataclass(frozen=True, repr=False)
class Foreign(ConsistencyGuidance):
    name = "foreign_{name}"
    share: g.Scale = .5
    other: Adapter = 1.
    note: Unknown = None
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    (tmp_path / "foreign_rule.py").write_text(FOREIGN.replace("{name}", "file"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules["parallel_rescale.method.guidance"], "RULES", dict(RULES))
    yield importlib.import_module("foreign_rule").Foreign
    sys.modules.pop("foreign_rule")


def test_annotations_that_are_texts_lose_nothing(foreign):
    with pytest.raises(ValueError, match="Foreign: share"): foreign(share=math.nan)
    with pytest.raises(ValueError, match="Foreign: text"): foreign(text="much")
    with pytest.raises(ValueError, match=r"Foreign: other\['a'\]"): foreign(other={"a": math.inf})
    moving = foreign(lambda u: 2 * u, share=lambda u: u, other=lambda u: 1 - u, note="any")
    assert (moving.at(.5).text, moving.at(.5).share, moving.at(.25).other, moving.at(.5).note) == (1., .5, .75, "any")
    assert label(foreign(5, 3, .2)) == "consistency 5/3/0.2"
    assert repr(foreign()) == "Foreign(text=7.5, consistency=3.0, share=0.5, other=1.0)"


def signature_from_json(r): return json.loads(json.dumps(r.signature()))


@pytest.mark.parametrize("r", ALL)
def test_a_signature_is_json_and_tells_rules_apart(r):
    assert signature_from_json(r) == r.signature() == copy.deepcopy(r).signature() and r.signature()["class"].endswith(type(r).__name__)
    for name in scale_names(type(r)):
        made = [type(r)(**{name: scale}).signature() for scale in (.5, .25, lambda u: .5 * u, lambda u: .25 * u, lambda u: u / 2)]
        assert made[2] == made[4] and made[0] != made[1] != made[2] != made[3]


def test_a_signature_includes_the_rule_inside():
    lambdas = [(lambda k: lambda u: k * u)(k) for k in (1, 2)]
    one, two = (CFG(scale) for scale in lambdas)
    assert one.signature() != two.signature() and one.signature() == CFG(lambda u: u).signature()
    for wrap in (lambda r: every(r, 2), lambda r: interval(r, 0, .5), lambda r: every(interval(r, 0, .5), 3)):
        assert signature_from_json(wrap(one)) != signature_from_json(wrap(two)) != wrap(CFG()).signature()
    assert every(CFG(), 2).signature() != every(CFG(), 3).signature() != interval(CFG(), 0, .5).signature() != interval(CFG(), 0, .6).signature()
    assert signature_from_json(AutoGuidance(weak={"a": .2})) != signature_from_json(AutoGuidance(weak={"a": .3}))


def test_names_are_registered_where_the_class_is_made(monkeypatch):
    monkeypatch.setattr(sys.modules["parallel_rescale.method.guidance"], "RULES", dict(known_rules()))
    def made(qualname, module=__name__, **more):
        return type(qualname, (CFG,), dict(__module__=module, __qualname__=qualname, **more))
    first = made("Mine", name="mine")
    assert rule("mine") == first()
    assert type(rule("mine")) is not type(made("Mine", name="mine")()) is not first              # made again: the newer one
    with pytest.raises(ValueError, match=r"'mine': .*Yours would take the name of .*Mine"): made("Yours", name="mine")
    with pytest.raises(ValueError, match="CFG"): made("CFG", name="cfg", module="elsewhere")
    notebook = made("Mine", name="mine", module="__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Mine", notebook, raising=False)
    made("Mine", name="mine")
    assert type(rule("mine")) is notebook
    monkeypatch.delattr(sys.modules["__main__"], "Mine")                                         # the notebook is gone
    assert rule("mine").__class__.__module__ == __name__
    made("_Hidden", name="hidden"), made("Nameless")
    with pytest.raises(ValueError, match="unknown"): rule("hidden")


@pytest.mark.parametrize("code", ["from parallel_rescale.method.registry import rule; from parallel_rescale.method.guidance import RULES; print(rule('focus').name, rule('several').name, len(RULES))",
                                  "import parallel_rescale as p; print(p.rule('focus').name, p.rule('several').name, len(p.RULES))",
                                  "from parallel_rescale import RULES; print('focus', 'several', len(RULES))"])
def test_every_rule_is_known_whatever_was_imported(code):
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.split() == ["focus", "several", str(len(OWN))], said.stderr

# ---------------------------------------------------------------- 13. half precision, at every size

HALF = ALL + [pytest.param(ParallelRescale(ratio=k, whole=w), id=f"{k}-{w}") for k in RATIOS for w in (False, True)] + [
    pytest.param(every(ParallelRescale(), 1), id="every"), pytest.param(rule("style_contrast:whole=false"), id="contrast-each"),
    pytest.param(rule("style_contrast:ratio=normalize"), id="contrast-normalize"), pytest.param(rule("several:subjects=a+b,against=each other"), id="each-other")]


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1., 30., 300.])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("r", HALF)
def test_half_precision_is_float32_rounded(r, dtype, size):
    """Predictions that differ as little or as much as half precision can say; 300 squared is beyond float16.

    Every prediction carries a rounding of eps/2 of its size, so a direction is off by eps of it. Weights of up to 7.5 and 3, and a p̂
    that rarely exceeds 4, enlarge that to some (7.5 + 3·(1 + 4))·eps; a few more roundings follow. Where a direction is divided
    by its own length, the error is relative to the predictions no more than that."""
    g = torch.Generator().manual_seed(0)
    vs = [(size * torch.randn(2, 4, 8, 8, generator=g)).to(dtype) for _ in r.branches]
    out, exact = r.combine(*vs), r.combine(*(v.float() for v in vs))
    assert out.dtype == dtype and exact.isfinite().all() and out.isfinite().all()
    where = exact.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps                 # the step of float16 near 0
    assert ((out.float() - exact).abs() <= 25 * torch.finfo(dtype).eps * where + 50 * smallest).all()


PLUGIN = """
from dataclasses import dataclass
from parallel_rescale.method.rules import SubjectGuidance
@dataclass(frozen=True, repr=False)
class Late(SubjectGuidance):
    name = "late_plugin"
    def direction(self, null, base, subject): return subject - base
"""


@pytest.mark.parametrize("module, said", [("late_rules", None), ("not_there", "not_there")])
def test_an_installed_package_adds_rules_by_its_entry_point(tmp_path, module, said):
    "What an installed wheel leaves behind: a module, and metadata that name it."
    (tmp_path / "late_rules.py").write_text(PLUGIN, encoding="utf-8")
    info = tmp_path / "late-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[parallel_rescale.rules]\nmine = {module}\n", encoding="utf-8")
    code = "from parallel_rescale.method.registry import rule; print(rule('late_plugin:text=3').label if 'late_plugin' in __import__('parallel_rescale').RULES else rule('focus').label)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 0, done.stderr
    if said is None: assert done.stdout.strip() == "late plugin 3/3"
    else: assert done.stdout.strip() == "focus 7.5/3/0.5" and said in done.stderr and "were not loaded" in done.stderr
