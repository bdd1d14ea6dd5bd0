"One picture, several subjects (05e): what holds for every sum of pushes, and two adapters in one pipeline."
import math
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st

from parallel_rescale import CFG, ConsistencyGuidance, ParallelRescale, SeveralSubjects, SubjectPipeline, TINY_SDXL, every, interval, rule
from parallel_rescale.method.guidance import Branch
from parallel_rescale.method.registry import label
from parallel_rescale.method.parallel_rescaling import RATIOS
from parallel_rescale.method.projection import coefficient, project
from parallel_rescale.method.several import AGAINST, REGIONS, region_mask, without_conflict
from test_subject_folder import make_subject

settings.register_profile("several", deadline=None, max_examples=40)
settings.load_profile("several")
seeds, shares = st.integers(0, 10**6), st.floats(-3, 3, allow_subnormal=False)
EVERY = [dict(ratio=ratio, against=against) for ratio in RATIOS for against in AGAINST]


def random(seed, n, rows=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, 4, 6, generator=g, dtype=torch.float64).to(dtype) for _ in range(n)]


def close(a, b, rel=1e-9): assert a.dtype == b.dtype and (a - b).abs().max() <= rel * max(a.abs().max(), b.abs().max(), 1e-30)


@given(seeds, shares, st.floats(1e-3, 1e3))
def test_of_two_neither_pushes_against_the_other(seed, share, size):
    g_text, first, second = random(seed, 3)
    first, second = size * first, size * share * second
    for yielded, own, other in zip(without_conflict([first, second], g_text), (first, second), (second, first)):
        beside = [project(d, g_text)[1] for d in (yielded, own, other)]
        assert ((beside[0] * beside[2]).sum(1) >= -1e-9 * size**2 * (1 + abs(share))).all()
        assert (beside[0].norm(dim=1) <= beside[1].norm(dim=1) * (1 + 1e-9)).all()               # taken from, never added to
        close(coefficient(yielded, g_text), coefficient(own, g_text), 1e-8)
        friends = (beside[1] * beside[2]).sum(1, keepdim=True) >= 0
        assert torch.equal(torch.where(friends, yielded, 0), torch.where(friends, own, 0))


@given(seeds)
def test_at_a_tie_the_sum_does_not_turn(seed):
    "Eq. (4)."
    g_text, *pushes = random(seed, 3)
    first, second = (torch.nn.functional.normalize(project(d, g_text)[1], dim=1) for d in pushes)
    cosine = (first * second).sum(1, keepdim=True)
    close(sum(without_conflict([first, second], g_text)), (1 - cosine.clamp(max=0)) * (first + second), 1e-7)


@given(seeds, st.permutations(range(3)), st.tuples(shares, shares, shares), st.sampled_from(EVERY), st.booleans())
def test_the_order_does_not_matter_and_votes_add_up(seed, order, weights, options, placed):
    null, base, *subjects = random(seed, 5)
    places = ("left", "all", "bottom") if placed else ()
    def combine(which, shares, places): return SeveralSubjects(5., 3., tuple("abc"[i] for i in which), shares, regions=places, **options).combine(null, base, *(subjects[i] for i in which))
    expected = combine(range(3), weights, places)
    close(combine(order, tuple(weights[i] for i in order), tuple(places[i] for i in order) if placed else ()), expected)
    halves = tuple(w / 2 for w in weights)
    close(combine((0, 1, 2, 0, 1, 2), halves * 2, places * 2), expected)


@given(seeds, st.sampled_from(EVERY), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_alone_silent_and_off(seed, options, dtype):
    null, base, first, second = random(seed, 4, dtype=dtype)
    alone = ParallelRescale(5., 3., options["ratio"]).combine(null, base, first)
    assert alone.dtype == dtype
    assert torch.equal(SeveralSubjects(5., 3., ("a",), **options).combine(null, base, first), alone)
    for names, given_, weights in (("a+b", (first, second), (1, 0)), ("b+a", (second, first), (0, 1))):
        assert torch.equal(SeveralSubjects(5., 3., names, weights, **options).combine(null, base, *given_), alone)
    assert torch.equal(SeveralSubjects(5., 0., "a+b", **options).combine(null, base, first, second), CFG(5., adapter=0).combine(null, base))
    both = SeveralSubjects(5., 3., "a+b", **options).combine(null, base, first, second)
    assert both.dtype == dtype and both.isfinite().all()


@given(seeds, st.floats(0, 1))
def test_weights_that_add_up_to_one_ask_for_the_mean_prediction(seed, t):
    null, base, first, second = random(seed, 4)
    close(SeveralSubjects(1., 1., "a+b", (t, 1 - t), "raw").combine(null, base, first, second), t * first + (1 - t) * second)


@given(seeds, st.sampled_from(EVERY))
def test_places_and_samples_are_apart(seed, options):
    null, base, first, second = random(seed, 4)
    def alone(d, **more): return SeveralSubjects(5., 3., "a", **options, **more).combine(null, base, d)
    for a, b in (("left", "right"), ("top", "bottom")):
        mask = region_mask(REGIONS[a], base)
        both = SeveralSubjects(5., 3., "a+b", regions=(a, b), **options).combine(null, base, first, second)
        assert torch.equal(both, torch.where(mask.bool(), alone(first), alone(second)))
    two = SeveralSubjects(5., 3., "a+b", **options)
    whole = two.combine(null, base, first, second)
    for i in range(2): close(two.combine(*(v[i:i + 1] for v in (null, base, first, second))), whole[i:i + 1])
    assert two.combine(null, base, first, second * math.nan)[0].isnan().all()                       # passed on, for the denoiser to name


def test_the_parametrisation_does_not_matter():
    x, *eps = random(0, 5)
    alpha, sigma = .6, .8
    def to_v(e): return (e - sigma * x) / alpha
    for options in EVERY:
        r = SeveralSubjects(5., 3., "a+b", (1., -.5), **options)
        close(r.combine(*map(to_v, eps)), to_v(r.combine(*eps)), 1e-8)


def test_names_and_text():
    r = SeveralSubjects(3., 2., ["dog", "cat"], [1, .5], regions=["left", (.5, 0, 1, 1)])
    assert r == rule("several:text=3,consistency=2,subjects=dog+cat,shares=1+0.5,regions=left+right") and hash(r) == hash(eval(repr(r)))
    assert r.branches == (Branch("null"), Branch("base"), Branch("dog", "dog"), Branch("cat", "cat")) and r.needs_subject and every(r, 2).needs_subject
    assert label(r) == "several subjects 3/2" and SeveralSubjects().branches[-1] == Branch("subject", "subject")
    assert rule("several:subjects=dog,shares=2,every=2") == every(SeveralSubjects(subjects="dog", shares=(2.,)), 2)
    moving = SeveralSubjects(consistency=lambda progress: 2 * progress, subjects="dog+cat", shares=(1, 3))
    assert moving.at(.5).weights(None) == [1., 3.]


@pytest.mark.parametrize("bad,says", [
    (dict(subjects=()), "names of adapters"), (dict(subjects=(1, 2)), "names of adapters"), (dict(subjects="dog+"), "names of adapters"), (dict(subjects="dog+null"), "'null' is a prompt"),
    (dict(subjects="a+b", shares=(1,)), "each of 2"), (dict(subjects="a+b", shares=(1, math.nan)), "each of 2"), (dict(subjects="a+b", shares="1+x"), "each of 2"),
    (dict(subjects="a+b", regions="left"), "each of 2"), (dict(regions="west"), "unknown region"), (dict(regions=((0, 0, 0, 1),)), "left, top, right, bottom"),
    (dict(regions=(3,)), "left, top, right, bottom"), (dict(regions=((0, 0, 1),)), "left, top, right, bottom"), (dict(against="others"), "unknown against"), (dict(ratio="mean"), "ratio"),
    (dict(consistency=(1., 2.)), "SeveralSubjects: consistency")])
def test_bad_arguments(bad, says):
    with pytest.raises(ValueError, match=says): SeveralSubjects(**bad)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    made = SubjectPipeline.from_pretrained(TINY_SDXL).load_subject(Path(TINY_SDXL).parent / "data" / "subject_pixel", "pixel")
    made.load_subject(make_subject(tmp_path_factory.mktemp("milo"), "<milo>", "cat", seed=5).folder, "milo")
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, guidance, prompt="a sketch of a <pixel> and a <milo>", **kwargs):
    own = dict(pixel="a sketch of a <pixel> and a cat", milo="a sketch of a cat and a <milo>") | kwargs.pop("own", {})
    own = {name: own[name] for name in dict.fromkeys(b.prompt for b in guidance.branches if b.prompt in own)}
    return pipe(prompt, guidance=guidance, prompts=own or None, generator=torch.Generator().manual_seed(0), **dict(num_inference_steps=2, output_type="latent") | kwargs).images


def near(a, b, rel=1e-4): return (a - b).abs().max() <= rel * b.abs().max()


def test_two_adapters_in_one_pipeline(pipe):
    both = draw(pipe, SeveralSubjects(3., 2., "pixel+milo"))
    assert near(draw(pipe, SeveralSubjects(3., 2., "milo+pixel")), both)
    assert near(draw(pipe, SeveralSubjects(3., 2., "pixel+milo"), batched=False), both, 1e-2)
    for same in (dict(prompt="a sketch of a <pixel> and a cat"), dict(base_prompt="a sketch of a cat and a cat")): assert near(draw(pipe, SeveralSubjects(3., 2., "pixel+milo"), **same), both)
    only = draw(pipe, SeveralSubjects(3., 2., "pixel"))
    assert near(draw(pipe, SeveralSubjects(3., 2., "pixel+milo", (1, 0))), only) and not near(both, only, 1e-2)
    assert near(draw(pipe, SeveralSubjects(3., 1., "pixel+pixel")), only)                          # one branch, two votes
    one_step = [draw(pipe, SeveralSubjects(3., 2., *r), num_inference_steps=1) for r in (("pixel+milo", (), "normalize", "text", "left+right"), ("pixel",), ("milo",))]
    assert near(one_step[0][..., :8], one_step[1][..., :8]) and near(one_step[0][..., 8:], one_step[2][..., 8:])
    for wrapped in (every(SeveralSubjects(subjects="pixel+milo"), 2), interval(SeveralSubjects(subjects="pixel+milo", against="each other"), 0, .5)):
        assert draw(pipe, wrapped).isfinite().all()


def test_one_subject_is_parallel_rescaling_whatever_else_is_loaded(pipe):
    from parallel_rescale.tools.embedded import load_tiny_sdxl
    lonely = load_tiny_sdxl(SubjectPipeline, device="cpu").load_subject(Path(TINY_SDXL).parent / "data" / "subject_pixel")
    prompt = "a sketch of a <pixel>"
    for one, plain in ((dict(), ParallelRescale(3., 2.)), (dict(ratio="raw"), ConsistencyGuidance(3., 2.))):
        expected = draw(lonely, plain, prompt)
        assert near(draw(lonely, SeveralSubjects(3., 2., **one), prompt), expected)                # load_subject's own name for it is the rule's default
        assert near(draw(pipe, SeveralSubjects(3., 2., "pixel", **one), prompt, own=dict(pixel=prompt)), expected)


def test_what_is_missing_is_named(pipe):
    r = SeveralSubjects(3., 2., "pixel+milo")
    with pytest.raises(ValueError, match="asks for 'milo'"): pipe("a <pixel>", guidance=r, prompts=dict(pixel="a <pixel>"))
    with pytest.raises(ValueError, match="does not take 'inky'"): pipe("a <pixel>", guidance=r, prompts=dict(pixel="a <pixel>", milo="a <milo>", inky="an octopus"))
    with pytest.raises(ValueError, match="adapter 'inky'"): pipe("a <pixel>", guidance=SeveralSubjects(subjects="pixel+inky"), prompts=dict(pixel="a <pixel>", inky="an octopus"))
    pipe.set_adapters(["pixel"])
    try:
        with pytest.raises(ValueError, match="adapter 'milo'"): draw(pipe, r)
    finally: pipe.set_adapters(["pixel", "milo"])
