"""The same numbers on a GPU as on a CPU, up to rounding: every rule, alone, in the denoiser and in the pipeline, and the judge.

    pytest -m cuda

Without a GPU both sides are the CPU, which keeps this file itself from rotting. A GPU's own tolerance is `GPU_TOLERANCE`."""
import pytest
import torch
from peft import LoraConfig

from parallel_rescale import SubjectPipeline
from parallel_rescale.machine.denoiser import _counts_steps, guided
from parallel_rescale.machine.prompts import PromptEmbeds
from parallel_rescale.method.rules import CFG, ConsistencyGuidance, ParallelRescale
from parallel_rescale.method.schedules import every, interval
from parallel_rescale.world.judge import judge_images, load_judge
from parallel_rescale.tools.embedded import assert_near, chapter_device, load_tiny_sdxl
from test_devices import all_rules
from test_subject_folder import make_subject

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def device(): return chapter_device()         # in full float32: TF32 rounds to 10 bits


def randoms(n, *shape, seed=0): return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", all_rules(), ids=lambda v: getattr(v, "label", v) if not isinstance(v, int) else str(v))
@pytest.mark.parametrize("dtype, eps", [(torch.float32, 2e-4), (torch.float16, .2), (torch.bfloat16, 1.5)], ids=str)
def test_a_rule_alone(rule, dtype, eps, device):
    "Weights of up to 7.5 on numbers of size 1; a mask or a threshold may fall on the other side of a rounding at one location."
    branches, combine = rule.step(1, 3, {})
    predictions = (1 + .2 * randoms(len(branches), 2, 4, 16, 16)).to(dtype)
    here, there = combine(*predictions), combine(*predictions.to(device))
    assert there.device.type == device and there.dtype == here.dtype == dtype
    far = ((here.float() - there.cpu().float()).abs() > eps).float().mean()
    assert far <= .01, f"{far:.1%} of the numbers are further apart than {eps}"


@pytest.fixture(scope="module")
def unets(device):
    made = [load_tiny_sdxl(device="cpu").unet for _ in range(2)]
    for unet in made:
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "subject")
        g = torch.Generator().manual_seed(1)
        for name, p in unet.named_parameters():
            if "lora_" in name: p.data = .1 * torch.randn(p.shape, generator=g)
    return made[0].eval(), made[1].to(device).eval()


KNOWN = {"null", "base", "subject", "reference"}


@torch.no_grad()
@pytest.mark.parametrize("max_rows", [None, 2])
@pytest.mark.parametrize("rule", [r for r in all_rules() if {b.prompt for b in r.branches} <= KNOWN and not _counts_steps(r)], ids=lambda v: getattr(v, "label", v) if not isinstance(v, int) else str(v))
def test_the_denoiser(rule, max_rows, unets, device):
    prompts = {name: PromptEmbeds(h[None], p[None]) for name, h, p in
               zip(("null", "base", "subject", "reference"), randoms(4, 32, 128, seed=2), randoms(4, 64, seed=3))}
    x, sizes, out = randoms(2, unets[0].config.in_channels, 16, 16), torch.tensor([[64., 64, 0, 0, 64, 64]] * 2), []
    for unet, place in zip(unets, ("cpu", device)):
        call = dict(encoder_hidden_states=randoms(2, 32, 128).to(place), added_cond_kwargs=dict(text_embeds=randoms(2, 64).to(place), time_ids=sizes.to(place)))
        with guided(unet, rule, prompts, max_rows=max_rows): out.append(unet(x.to(place), 500, **call).sample)
    assert out[1].device.type == device
    assert ((out[0] - out[1].cpu()).abs() > .05).float().mean() <= .01


@pytest.mark.parametrize("rule", [CFG(3.), ConsistencyGuidance(3., 2.), ParallelRescale(3., lambda u: 2 - u), every(ParallelRescale(3., 2.), 2), interval(ParallelRescale(3., 2.), 0, .5)], ids=lambda v: getattr(v, "label", v) if not isinstance(v, int) else str(v))
def test_the_pipeline(rule, device, tmp_path):
    subject = make_subject(tmp_path / "dog")
    def generate(place):
        pipe = load_tiny_sdxl(SubjectPipeline, device=place).load_subject(tmp_path / "dog")
        return pipe("a <dog> on the beach", guidance=rule, generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="latent")[0]
    assert_near(generate("cpu"), generate(device), 2e-2)


def test_the_judge(device):
    pictures = randoms(4, 3, 64, 64).clamp(-1, 1)
    here, there = (judge_images(load_judge(device=place), pictures) for place in ("cpu", device))
    for name in here: assert_near(here[name], there[name], 1e-3)
