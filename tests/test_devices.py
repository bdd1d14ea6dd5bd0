"""A CPU tensor that meets a tensor on an accelerator, caught where there is no accelerator.

Two ways, which see different things. `Accelerator` runs real code with tensors on the meta device (shapes without
numbers) and raises at every operation that takes a CPU tensor besides: what CUDA would refuse. It sees all that the
code computes on tensors, in hooks, rules and diffusers' own modules; it does not see code that runs on CUDA alone
(`if x.is_cuda`), nor code that reads numbers back. For rules there are FakeTensorMode's tensors too, which say `cuda`.
`test_factories…` reads the source: a factory without `device=` makes a CPU tensor, and each such place needs a reason.
"""
import ast
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parallel_rescale.machine.denoiser as denoiser
from parallel_rescale.machine.adapter_rows import adapter_rows
from parallel_rescale.machine.denoiser import guided
from parallel_rescale.machine.prompts import PromptEmbeds
from parallel_rescale.method.registry import known_rules
from parallel_rescale.method.rules import ConsistencyGuidance, ParallelRescale
from parallel_rescale.method.schedules import every, interval
from parallel_rescale.method.several import SeveralSubjects
from parallel_rescale.tools.embedded import TINY_SDXL

FACTORIES = set("arange as_tensor empty eye from_numpy full linspace logspace ones rand randint randn randperm tensor zeros".split())
DRAWN = "drawn by a CPU generator, so that a seed means the same on every device; moved afterwards"
PICTURES = "from a picture or table in the memory of the CPU; the caller moves it"
ON_CPU = "the toy lives on the CPU"
WITHOUT_DEVICE = {  # module.function → why its factories may stand without device=
    "consistency._noise": DRAWN, "data.random_choices": DRAWN,
    "data.crop_squares": PICTURES, "data.encode_images": PICTURES, "questions.through_vae": PICTURES,
    "step.subject_text": "an index of a handful of rows, which indexing takes from the CPU too",
    "adapter_rows._row_scale": "its numbers are read back to see whether the dtype holds them, then moved",
    "attention_rows._column": "a number for each row, then moved",
    "rivals.blur": "five numbers, then sent without a wait",
    "adapter_rows._placed": "stands for the device that offloading has moved the weights to: the CPU",
    "scorers._Encoder.to_references": "a table of numbers for the user, not an operand",
    "training": "the training of the embedded model draws on the CPU, so that a seed means the same on every device, and moves",
    "painter": "as training", "judge": "as training", "axes.decoder_metric": DRAWN,
    "model.paint": DRAWN,
    "toy": ON_CPU, "explainers": ON_CPU,
}


def places_without_device(path):
    "module.function of each factory call without device= in a module."
    def walk(node, name):
        for child in ast.iter_child_nodes(node):
            inside = f"{name}.{child.name}" if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else name
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and isinstance(child.func.value, ast.Name):
                if child.func.value.id == "torch" and child.func.attr in FACTORIES and "device" not in {k.arg for k in child.keywords}: yield inside
            yield from walk(child, inside)
    yield from walk(ast.parse(path.read_text(encoding="utf-8")), path.stem)


def test_factories_without_a_device_have_a_reason():
    found = {place for path in Path(denoiser.__file__).parents[1].rglob("*.py") for place in places_without_device(path)}
    def excuse(place): return next((key for key in WITHOUT_DEVICE if place == key or place.startswith(key + ".")), None)
    assert sorted(p for p in found if excuse(p) is None) == [], "give device=, or a reason above"
    assert sorted(set(WITHOUT_DEVICE) - {excuse(p) for p in found}) == [], "no longer needed above"


class Accelerator(TorchDispatchMode):
    "Raises where an operation takes tensors of two devices, as CUDA does; numbers (0-d) of the CPU and copies may."
    MOVES = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "set_"}     # an index may lie on the CPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim}
        if len(devices) > 1 and func.overloadpacket.__name__ not in self.MOVES: raise RuntimeError(f"{func} takes tensors on {sorted(devices)}")
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_cuda_refuses():
    far, near = torch.ones(3, device="meta"), torch.ones(3)
    with Accelerator():
        assert (far * 2 + torch.tensor(3.) + near.to("meta")).device.type == "meta"
        with pytest.raises(RuntimeError, match="takes tensors on"): far * near
        with pytest.raises(RuntimeError, match="takes tensors on"): torch.cat([far, near])


def all_rules():
    made = [cls() if cls is not SeveralSubjects else cls(subjects=("subject",)) for cls in known_rules().values()]
    return made + [every(ParallelRescale(), 2), interval(ConsistencyGuidance(), .2, .8), ParallelRescale(lambda p: 3 + p, lambda p: 2 + p),
                   ParallelRescale(whole=True), SeveralSubjects(3., 2., ("subject",), regions=("top",))]


@pytest.mark.parametrize("rule", all_rules(), ids=lambda v: getattr(v, "label", v) if not isinstance(v, int) else str(v))
def test_rules_stay_on_their_device(rule):
    own = getattr(rule, "regions", None) or rule.name == "frequency"              # to index or fill a fake CUDA tensor takes a build with CUDA
    devices = ["meta"] if own else ["cuda", "meta"]
    for device in devices:
        memory = {}
        with FakeTensorMode() if device == "cuda" else Accelerator():
            for i in range(3):                                          # a rule with a memory keeps it there as well
                branches, combine = rule.step(i, 3, memory)
                assert combine(*(torch.empty(2, 4, 16, 16, device=device) for _ in branches)).device.type == device


def far(*shape): return torch.empty(shape, device="meta")


@pytest.fixture(scope="module")
def unet():
    from peft import LoraConfig
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY_SDXL, subfolder="unet")).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "subject")
    assert {p.device.type for p in unet.parameters()} == {"meta"}
    return unet


def prompt(): return PromptEmbeds(far(1, 32, 128), far(1, 64))
CALL = dict(encoder_hidden_states=far(2, 32, 128), added_cond_kwargs=dict(text_embeds=far(2, 64), time_ids=far(2, 6)))


@pytest.mark.parametrize("rule, max_rows", [(r, None) for r in all_rules()] + [(ParallelRescale(), 1), (ParallelRescale(), 4)], ids=lambda v: getattr(v, "label", v) if not isinstance(v, int) else str(v))
def test_the_denoiser_stays_on_its_device(unet, rule, max_rows, monkeypatch):
    monkeypatch.setattr(denoiser, "_check_finite", lambda *_: None)     # it reads numbers, which meta tensors do not have
    scheduler = EulerDiscreteScheduler.from_pretrained(TINY_SDXL, subfolder="scheduler")
    scheduler.set_timesteps(2)
    prompts = {b.prompt: prompt() for b in rule.branches}
    with torch.no_grad(), guided(unet, rule, prompts, scheduler=scheduler, max_rows=max_rows), Accelerator():
        for t in scheduler.timesteps.tolist():
            assert unet(far(2, unet.config.in_channels, 16, 16), t, **CALL).sample.device.type == "meta"


def test_prompts_on_the_cpu_are_brought_to_the_latents(unet, monkeypatch):
    monkeypatch.setattr(denoiser, "_check_finite", lambda *_: None)
    here = {name: PromptEmbeds(torch.randn(1, 32, 128), torch.randn(1, 64)) for name in ("null", "base", "subject")}
    with torch.no_grad(), guided(unet, ParallelRescale(), here), Accelerator(): unet(far(2, unet.config.in_channels, 16, 16), 500, **CALL)


def test_scales_made_for_the_cpu_follow_the_batch(unet):
    with adapter_rows(unet, [0., 1.], like=torch.empty(0)):             # as under offloading
        with torch.no_grad(), Accelerator(): unet(far(2, unet.config.in_channels, 16, 16), 500, **CALL)
