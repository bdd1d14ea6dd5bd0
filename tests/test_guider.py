"""Any rule in Modular Diffusers' SDXL pipeline, through a guider."""
import pytest
import torch
from diffusers import ClassifierFreeGuidance

from parallel_rescale import CFG, ParallelRescale, RuleGuider, every, guide
from parallel_rescale.machine.guide import load_subject
from parallel_rescale.method.attention import PerturbedAttention
from parallel_rescale.method.registry import known_rules
from parallel_rescale.tools.embedded import load_tiny_sdxl
from parallel_rescale.tools.util import PACKAGE
from parallel_rescale.use.guider import as_modular, guider_for, spec_of

PROMPT = "a photo of a <pixel> on the beach"
def noise(): return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def pipe(): return load_subject(load_tiny_sdxl(), PACKAGE / "data" / "subject_pixel")


@pytest.fixture(scope="module")
def blocks(pipe): return as_modular(pipe)


def run(blocks, guider, prompt=PROMPT, **how):
    blocks.update_components(guider=guider)
    return blocks(prompt=prompt, num_inference_steps=3, generator=noise(), output="latents", **how)


@pytest.mark.parametrize("how", [{}, dict(negative_prompt="a dog"), dict(num_images_per_prompt=2)], ids=["plain", "negative", "two"])
def test_cfg_is_diffusers_own_bit_for_bit(blocks, how):
    stock = run(blocks, ClassifierFreeGuidance(guidance_scale=4.), **how)
    assert torch.equal(run(blocks, RuleGuider(CFG(4.)), **how), stock)


@pytest.mark.parametrize("name", sorted(known_rules()))
def test_a_guider_is_the_rule(pipe, blocks, name):
    "Row by row in one, all rows in one call in the other: other sizes of matrix products, other rounding."
    same_as_guide(pipe, blocks, known_rules()[name]())


@pytest.mark.parametrize("rule", [every(ParallelRescale(3., 2.), 2), PerturbedAttention(3., 1., layers="block")], ids=lambda rule: rule.label)
def test_wrappers_and_layers_too(pipe, blocks, rule): same_as_guide(pipe, blocks, rule)


def same_as_guide(pipe, blocks, rule):
    ours = run(blocks, guider_for(pipe, rule, PROMPT))
    with guide(pipe, rule, PROMPT) as generate:
        same = generate(num_inference_steps=3, generator=noise(), output_type="latent").images
    assert torch.allclose(ours, same, atol=1e-3 * same.abs().max().item())


def test_texts_in_a_batch(pipe, blocks):
    prompts = [PROMPT, "a sketch of a <pixel> in the snow"]
    both = run(blocks, guider_for(pipe, ParallelRescale(3., 2.), prompts), prompts)
    first = run(blocks, guider_for(pipe, ParallelRescale(3., 2.), prompts[0]), prompts[0])
    assert both.shape[0] == 2 and torch.allclose(both[:1], first, atol=5e-3)


def test_texts_in_a_batch_with_two_pictures_each(pipe, blocks):
    prompts, rule = [PROMPT, "a sketch of a <pixel> in the snow"], ParallelRescale(3., 2.)
    def start(n): return torch.randn(n, pipe.unet.config.in_channels, 16, 16, generator=noise())
    four = run(blocks, guider_for(pipe, rule, prompts), prompts, num_images_per_prompt=2, latents=start(4))
    for i, prompt in enumerate(prompts):
        two = run(blocks, guider_for(pipe, rule, prompt), prompt, num_images_per_prompt=2, latents=start(4)[2 * i:2 * i + 2])
        assert torch.allclose(four[2 * i:2 * i + 2], two, atol=5e-3)
    with pytest.raises(ValueError, match="embeddings of 2 texts do not fit a batch of 3"):
        run(blocks, guider_for(pipe, rule, prompts), PROMPT, num_images_per_prompt=3)


def test_embeddings_come_to_where_the_batch_is():
    from parallel_rescale.machine.prompts import PromptEmbeds
    like = torch.zeros(2, 3, 4, dtype=torch.bfloat16, device="meta")
    guider = RuleGuider(ParallelRescale(), dict(base=PromptEmbeds(torch.ones(1, 3, 4), torch.ones(1, 5))))
    made = guider.prepare_inputs(dict(prompt_embeds=(like, like), text_embeds=(like[:, 0], like[:, 0])))
    assert len(made) == 3 and {(t.dtype, t.device.type) for b in made for t in (b.prompt_embeds, b.text_embeds)} == {(torch.bfloat16, "meta")}


def test_nothing_is_left_behind_even_after_an_error(pipe, blocks):
    before = run(blocks, ClassifierFreeGuidance(guidance_scale=4.))
    guider = guider_for(pipe, ParallelRescale(3., 2.), PROMPT)
    hook = pipe.unet.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): run(blocks, guider)
    hook.remove()
    guider.set_state(0, 1, None)
    assert torch.equal(run(blocks, ClassifierFreeGuidance(guidance_scale=4.)), before)


def test_what_cannot_be_is_said(pipe, blocks):
    with pytest.raises(ValueError, match="needs the prompt 'base'"): run(blocks, RuleGuider(ParallelRescale()))
    with pytest.raises(ValueError, match="rule must be a guidance rule"): RuleGuider(3)
    assert spec_of(every(CFG(), 2)) is None and spec_of(CFG(3.)) == "cfg:scale=3.0"


def test_a_guider_is_saved_and_loaded(tmp_path):
    RuleGuider("parallel_rescale:text=3,consistency=2").save_pretrained(tmp_path)
    assert RuleGuider.from_pretrained(tmp_path).rule == ParallelRescale(3., 2.)
