"""Universal guidance around any rule: other schedulers and models, batches, errors, and nothing left behind."""
import pytest
import torch
from diffusers import (
    DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
    HeunDiscreteScheduler, UniPCMultistepScheduler)

from parallel_rescale import CFG, ParallelRescale, SubjectPipeline, every, guide
from parallel_rescale.machine.universal import noise_levels, universal
from parallel_rescale.tools.embedded import load_tiny_sdxl
from parallel_rescale.tools.util import PACKAGE

QUICK = dict(num_inference_steps=4, output_type="latent")
def noise(seed=0): return torch.Generator().manual_seed(seed)
def dark(pictures): return (1 - pictures).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe(): return load_tiny_sdxl(SubjectPipeline).load_subject(PACKAGE / "data" / "subject_pixel")


def run(pipe, rule=ParallelRescale(3., 2.), loss=dark, seeds=(0,), **how):
    with universal(pipe, loss, **how):
        return pipe(["a photo of a <pixel>"] * len(seeds), guidance=rule, generator=[noise(s) for s in seeds], **QUICK).images


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler,
                                  UniPCMultistepScheduler])
def test_each_scheduler_is_steered_and_repeated(pipe, kind):
    own = pipe.scheduler
    pipe.scheduler = kind.from_config(own.config)
    step = pipe.scheduler.step
    try:
        plain = run(pipe)
        assert torch.equal(run(pipe, forward=0., backward=0, repeats=1), plain)
        def brightness(x): return dark(pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample).item()
        with torch.no_grad():
            assert brightness(run(pipe, backward=3, rate=60.)) < brightness(plain)
            again = run(pipe, repeats=2, generator=noise(7))
        assert again.isfinite().all() and 0 < (again - plain).abs().max() and again.std() < 2 * plain.std()
        assert pipe.scheduler.step == step
    finally: pipe.scheduler = own


def test_pictures_of_a_batch_do_not_influence_one_another_and_calls_may_be_split(pipe):
    both = run(pipe, seeds=(0, 1), forward=30.)
    assert torch.allclose(both[:1], run(pipe, forward=30.), atol=2e-3)
    with universal(pipe, dark, forward=30.):
        split = pipe(["a photo of a <pixel>"] * 2, guidance=ParallelRescale(3., 2.), generator=[noise(0), noise(1)], max_rows=1, **QUICK).images
    assert torch.allclose(split, both, atol=2e-3)


def test_whichever_context_is_entered_first(pipe):
    def drawn(generate): return generate(generator=noise(), **QUICK).images
    with guide(pipe, ParallelRescale(3., 2.), "a photo of a {subject}") as generate, universal(pipe, dark, forward=30.): inner = drawn(generate)
    with universal(pipe, dark, forward=30.), guide(pipe, ParallelRescale(3., 2.), "a photo of a {subject}") as generate: outer = drawn(generate)
    assert torch.equal(inner, outer)


def test_with_a_schedule_and_a_wrapper(pipe):
    late = run(pipe, rule=every(ParallelRescale(3., 2.), 2), forward=lambda u: 30. * (u > .5))
    assert late.isfinite().all() and not torch.equal(late, run(pipe, rule=every(ParallelRescale(3., 2.), 2)))


def test_everything_is_as_before_even_after_an_error(pipe):
    before, hooks = run(pipe), (len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks))
    grads = [p.requires_grad for p in pipe.unet.parameters()]
    def broken(pictures): raise RuntimeError("no judge today")
    with pytest.raises(RuntimeError, match="no judge today"): run(pipe, loss=broken, forward=1., repeats=2)
    inside = pipe.unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): run(pipe, forward=1.)
    inside.remove()
    assert torch.is_grad_enabled() and grads == [p.requires_grad for p in pipe.unet.parameters()]
    assert (len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)) == hooks and torch.equal(run(pipe), before)


@pytest.mark.parametrize("wrong, said", [
    (dict(loss=3), "loss must be a function"), (dict(backward=1.5), "backward must be a whole number"), (dict(repeats=0), "repeats must be a whole number"),
    (dict(forward=float("nan")), "forward must be a finite"), (dict(loss=lambda p: p.mean(), backward=1), "one number for each picture"),
    (dict(loss=lambda p: p.detach().mean((1, 2, 3)), backward=1), "differentiable")])
def test_what_cannot_be_is_said(pipe, wrong, said):
    with pytest.raises(ValueError, match=said): run(pipe, **wrong)


def test_levels_of_two_stage_schedulers_are_those_of_their_steps(pipe):
    heun = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    heun.set_timesteps(4)
    a, b = noise_levels(heun)
    assert len(a) == 5 and torch.allclose(a**2 + b**2, torch.ones(5)) and b[-1] == 0 and (b.diff() < 0).all()


def test_a_flow_model_is_steered():
    from tiny_pipelines import tiny
    sd3 = tiny("sd3", adapter=None).pipe
    def drawn(**how):
        with guide(sd3, CFG(3., adapter=0), "a cat", base_prompt="a cat") as generate, universal(sd3, lambda x: x.square().mean((1, 2, 3)), decode=False, **how):
            return generate(generator=noise(), **QUICK).images
    plain = drawn()
    assert drawn(backward=2, rate=20.).square().mean() < plain.square().mean() and drawn(forward=5.).isfinite().all()
    assert drawn(repeats=2, generator=noise(3)).isfinite().all()


def test_a_step_of_two_stages_is_not_repeated(pipe):
    own = pipe.scheduler
    pipe.scheduler = HeunDiscreteScheduler.from_config(own.config)
    try:
        assert run(pipe, forward=1.).isfinite().all()
        with pytest.raises(ValueError, match="two stages"): run(pipe, repeats=2)
    finally: pipe.scheduler = own
