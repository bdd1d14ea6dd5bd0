"Rules whose weight or question depends on what the model says (1_method/10_focus)."
import math
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st

from parallel_rescale import ConsistencyGuidance, Focus, FocusedContrast, OwnWords, SubjectPipeline, TINY_SDXL, TextFloor, every
from parallel_rescale.method.focus import bearable, strongest
from parallel_rescale.method.guidance import Branch
from parallel_rescale.method.registry import label, rule
from parallel_rescale.method.projection import coefficient


def triple(seed, rows=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, 4, 4, generator=g) for _ in range(3)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(.1, 10), st.floats(0, 10), st.floats(1e-3, 1e3))
def test_the_text_keeps_its_share_and_no_weight_is_wasted(seed, keep, text, consistency, size):
    null, base, subject = (size * v for v in triple(seed))
    g_text, g_cons = base - null, subject - base
    weight = bearable(g_cons, g_text, text, consistency, keep)
    assert weight.shape == (3, 1, 1, 1) and (weight >= 0).all() and (weight <= consistency).all()
    speed = text + weight * coefficient(g_cons, g_text, (1, 2, 3))
    slack = 1e-4 * (text + consistency)
    assert (speed >= keep * text - slack).all()
    assert ((weight == consistency) | (speed <= keep * text + slack)).all()      # the largest that is allowed
    out = TextFloor(text, consistency, keep).combine(null, base, subject)
    assert torch.allclose(out, null + text * g_text + weight * g_cons, rtol=1e-4, atol=1e-3 * size * (text + consistency))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([(4, 4), (16, 16), (8, 20)]), st.floats(1e-3, 1e3))
def test_the_mask_takes_its_share_of_each_sample(seed, share, side, size):
    g = size * torch.randn(3, 4, *side, generator=torch.Generator().manual_seed(seed))
    mask = strongest(g, share)
    n = side[0] * side[1]
    assert mask.shape == (3, 1, *side) and mask.dtype == torch.bool
    assert ((mask.flatten(1).sum(1) / n - share).abs() <= 1.5 / n).all()
    assert torch.equal(strongest(g[1:2], share), mask[1:2])                     # each sample by itself
    assert torch.equal(strongest(7 * g, share), mask)                           # lengths only by comparison


def test_the_mask_where_nothing_stands_out():
    assert strongest(torch.zeros(2, 4, 8, 8), .3).all()                                # ties are taken, too
    assert strongest(torch.randn(1, 4, 16, 16).bfloat16(), .5).dtype == torch.bool


def test_a_share_of_nothing_is_nothing_and_of_1_everything():
    for g in (torch.randn(2, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 1, 1)):
        assert not strongest(g, 0.).any() and strongest(g, 1.).all()
    null, base, subject = triple(0)
    assert torch.equal(Focus(5., 2., 0.).combine(null, base, subject), null + 5 * (base - null))
    out = FocusedContrast(5., 2., share=0.).combine(null, base, null, subject)
    assert torch.equal(out, null + 5 * (base - null))


def test_limits():
    null, base, subject = triple(0)
    plain = ConsistencyGuidance(5., 2.).combine(null, base, subject)
    assert torch.allclose(TextFloor(5., 2., 0.).combine(null, base, null + (base - null) * .9), ConsistencyGuidance(5., 2.).combine(null, base, null + (base - null) * .9))
    friendly = base + (base - null) + .1 * subject                              # a subject that speaks for the text
    assert torch.equal(TextFloor(5., 2., 1.).combine(null, base, friendly), ConsistencyGuidance(5., 2.).combine(null, base, friendly))
    assert torch.allclose(OwnWords(5., 2.).combine(null, base, base, subject), plain, atol=1e-5)
    assert torch.allclose(OwnWords(5., 2.).combine(null, base, subject, subject), null + 5 * (base - null), atol=1e-5)
    assert torch.allclose(Focus(5., 2., 1.).combine(null, base, subject), plain, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        assert Focus().combine(*(v.to(dtype) for v in triple(1))).dtype == dtype
        assert TextFloor().combine(*(v.to(dtype) for v in triple(1))).dtype == dtype
    assert TextFloor().combine(null, base, subject * math.nan).isnan().all()      # NaN is passed on, for the denoiser to name


@pytest.mark.parametrize("bad,says", [(dict(keep=-.1), "keep must be in"), (dict(keep=math.nan), "keep"), (dict(text="a"), "TextFloor: text")])
def test_bad_arguments(bad, says):
    with pytest.raises(ValueError, match=says): TextFloor(**bad)


@pytest.mark.parametrize("share", [-.1, 1.1, math.nan])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="Focus: share"): Focus(share=share)


def test_names_and_branches():
    assert rule("text_floor:keep=0.5,every=2") == every(TextFloor(keep=.5), 2) and label(OwnWords(5., 2.)) == "own words 5/2"
    assert OwnWords().needs_subject and OwnWords().branches[-1] == Branch("subject_reference", 1.) and TextFloor().branches == ConsistencyGuidance().branches


def test_the_pipeline_knows_the_references_words():
    pipe = SubjectPipeline.from_pretrained(TINY_SDXL).load_subject(Path(TINY_SDXL).parent / "data" / "subject_pixel")
    pipe.set_progress_bar_config(disable=True)
    def draw(**kwargs): return pipe("a pencil sketch of a <pixel>", guidance=OwnWords(5., 2.), num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0), **kwargs).images
    default = draw()
    for same in ("a photo of a <pixel>", "a photo of a {subject}"): assert torch.equal(draw(prompts={"subject_reference": same}), default)
    assert torch.equal(draw(prompts={"reference": "a photo of a cat"}), default)
    assert not torch.allclose(draw(prompts={"subject_reference": "a <pixel> in the snow"}), default, atol=1e-3)
