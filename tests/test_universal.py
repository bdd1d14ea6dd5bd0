"""Universal guidance around any rule: other schedulers and models, batches, errors, and nothing left behind."""
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import (
    DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
    HeunDiscreteScheduler, UniPCMultistepScheduler)
from test_borders import further, made
from tiny_pipelines import tiny

from parallel_rescale import APG, CFG, ParallelRescale, Record, SubjectPipeline, every, guide
from parallel_rescale.machine.universal import noise_levels, universal
from parallel_rescale.method.registry import known_rules
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


def test_every_rule_is_steered():
    "The gradient goes through what each of them makes of its predictions, and stays finite."
    model = tiny("sd15")
    def drawn(name, **how):
        rule = made(name)
        with universal(model.pipe, dark, **how), guide(model.pipe, rule, "a cat", **further(rule)) as generate:
            return generate(generator=noise(), num_inference_steps=2, output_type="latent").images
    for name in known_rules():
        plain, steered = drawn(name), drawn(name, forward=50.)
        assert steered.isfinite().all() and not torch.allclose(steered, plain, atol=1e-3), name


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


def test_half_precision_loses_no_small_gradient(pipe):
    half = load_tiny_sdxl(SubjectPipeline).load_subject(PACKAGE / "data" / "subject_pixel").to(torch.float16)
    half.vae.register_to_config(force_upcast=False)
    def slight(pictures): return 1e-3 * dark(pictures)         # of whose gradient float16 keeps nothing
    for how in (dict(forward=6e4), dict(backward=2, rate=3e4)):
        found = [(run(p, loss=slight, **how) - run(p)).float().flatten() for p in (pipe, half)]
        assert torch.cosine_similarity(*found, dim=0) > .9 and .7 < found[1].norm() / found[0].norm() < 1.4, how
    assert half.vae.dtype == half.unet.dtype == torch.float16


@pytest.mark.parametrize("name", ["flux1", "flux2_klein", "qwen_image", "sana"])
def test_each_model_tells_the_step_in_its_own_way(name):
    made, seen = tiny(name, adapter=None), []
    def small(x): return x.square().flatten(1).mean(1)
    def drawn(**how):
        with guide(made.pipe, CFG(3., adapter=0), "a cat", base_prompt="a cat", **made.encoding) as generate, universal(made.pipe, small, decode=False, **how):
            return generate(generator=noise(), **QUICK, **made.size).images
    plain = drawn(forward=lambda u: seen.append(u) or 0.)
    assert seen[-3:] == [1 / 3, 2 / 3, 1.]                     # flow models' first step is pure noise
    assert small(drawn(backward=2, rate=20.)) < small(plain) and not torch.equal(drawn(forward=5.), plain)


def test_models_that_cannot_be_steered_are_named_before_any_work():
    for name, decode, said in (("z_image", False, "Z-Image"), ("flux1", True, "decode=False")):
        with pytest.raises(ValueError, match=said), universal(tiny(name, adapter=None).pipe, dark, backward=1, decode=decode): pass


def test_forward_guidance_and_offloading(pipe, monkeypatch):
    monkeypatch.setattr(pipe.unet, "_hf_hook", CpuOffload("cpu"), raising=False)
    with pytest.raises(ValueError, match="without cpu offload"): run(pipe, forward=1.)
    assert run(pipe, backward=1).isfinite().all() and run(pipe, loss=lambda x: x.square().mean((1, 2, 3)), forward=1., decode=False).isfinite().all()


def test_a_step_that_another_has_put_there_stays(pipe):
    own, scheduler = pipe.scheduler.step, pipe.scheduler
    def others(*args, **kwargs): return own(*args, **kwargs)
    scheduler.step = others
    try:
        with universal(pipe, dark, repeats=2): assert scheduler.step is not others
        assert scheduler.step is others
        with universal(pipe, dark, repeats=2): del scheduler.step             # another that clears up too much
        assert scheduler.step is others
    finally: vars(scheduler).pop("step", None)


@pytest.mark.parametrize("rule", [ParallelRescale(3., 2.), every(ParallelRescale(3., 2.), 2), APG(3., momentum=-.5)])
def test_no_graph_outlives_its_step(pipe, rule):
    record, seen = Record(maps=True) if "Parallel" in repr(rule) else None, []
    def keep(i, n, t, predictions, combined): seen.extend([combined, *predictions.values()])
    with universal(pipe, dark, forward=30.):
        images = pipe("a photo of a <pixel>", guidance=rule, record=record, generator=noise(), **QUICK).images
    assert images.isfinite().all() and (record is None or "p_map" in record[0])
    from parallel_rescale.machine.denoiser import guided
    from parallel_rescale.machine.guide import encode_named, named_texts
    told = encode_named(pipe, rule, dict(prompt="a <pixel>"), named_texts(pipe, rule, "a <pixel>"))
    memory, x = {}, torch.randn(len(rule.branches), 1, 4, 8, 8, requires_grad=True)
    _, combine = rule.step(0, 4, memory)
    assert combine(*x).requires_grad and not any(torch.is_tensor(v) and v.requires_grad for v in memory.values())
    with guided(pipe.unet, rule, told, scheduler=pipe.scheduler, on_step=keep):
        call = dict(encoder_hidden_states=told["subject"].hidden, added_cond_kwargs=dict(
            text_embeds=told["subject"].pooled, time_ids=torch.tensor([[64., 64, 0, 0, 64, 64]])))
        out = pipe.unet(torch.randn(1, pipe.unet.config.in_channels, 16, 16, requires_grad=True), pipe.scheduler.timesteps[0], **call).sample
    assert out.requires_grad and seen and not any(p.requires_grad for p in seen)


def test_checkpointing_of_the_decoder_but_not_of_the_denoiser(pipe):
    steered = run(pipe, forward=30.)
    pipe.unet.enable_gradient_checkpointing()
    try:
        with pytest.raises(ValueError, match="gradient checkpointing"): run(pipe, forward=30.)
        assert torch.is_grad_enabled() and not pipe.unet._forward_pre_hooks
        assert run(pipe, rule=CFG(3.), forward=30.).isfinite().all()          # all rows as the model is
    finally: pipe.unet.disable_gradient_checkpointing()
    pipe.vae.enable_gradient_checkpointing()
    try: assert torch.allclose(run(pipe, forward=30.), steered, atol=1e-4)
    finally: pipe.vae.disable_gradient_checkpointing()


def test_a_network_compiled_in_place_is_compiled_once():
    pipe, compiled = tiny("sd15", adapter=None).pipe, []
    def backend(graph, inputs): compiled.append(graph); return graph.forward
    def drawn(steps):
        with guide(pipe, CFG(3., adapter=0), "a cat", base_prompt="a cat") as generate, universal(pipe, dark, forward=30.):
            return generate(generator=noise(), output_type="latent", num_inference_steps=steps).images
    plain = drawn(4)
    pipe.unet.compile(backend=backend)
    drawn(2)
    once = len(compiled)
    assert torch.allclose(drawn(4), plain, atol=1e-3) and 0 < once == len(compiled)
