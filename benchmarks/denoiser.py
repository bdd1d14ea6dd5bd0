"""Time guided sampling: one UNet call a step against two and three, and what is spent outside the UNet.

    python benchmarks/denoiser.py                                         # the embedded model
    python benchmarks/denoiser.py --base random-sdxl --device cuda --dtype bfloat16 [--compile whole]
    python benchmarks/denoiser.py --base random-sdxl --size small         # a small copy, for a CPU
    python benchmarks/denoiser.py --base path/to/sdxl --device cuda

The ways of sampling take turns, and each ratio is a median over the turns. Writes benchmarks/denoiser[-…].md.
"""
import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from peft import LoraConfig

from parallel_rescale import CFG, TINY_SDXL, ConsistencyGuidance, ParallelRescale, every
from parallel_rescale.machine.denoiser import guided
from parallel_rescale.machine.prompts import PromptEmbeds

SDXL = dict(block_out_channels=(320, 640, 1280), layers_per_block=2, transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), sample_size=128,
            cross_attention_dim=2048, addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
SMALL = SDXL | dict(block_out_channels=(32, 64, 128), transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 4), sample_size=32,
                    cross_attention_dim=128, addition_time_embed_dim=8, projection_class_embeddings_input_dim=112, norm_num_groups=16)


def load_unet(base, size, device, dtype, rank):
    if base == "random-sdxl":
        with torch.device(device):
            unet = UNet2DConditionModel(**(SMALL if size == "small" else SDXL), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                                        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time", use_linear_projection=True)
        unet.to(dtype)
    else: unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype).to(device)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"))
    for name, p in unet.named_parameters():
        if "lora_" in name: p.data = p.data.to(dtype) if "lora_A" in name else torch.randn_like(p, dtype=dtype) * .01
    return unet.eval().requires_grad_(False)


class Timer:
    "Adds up the time spent in `forward` of a module."
    def __init__(self, unet): self.unet, self.forward, self.device, self.seconds = unet, unet.forward, unet.device, 0.

    def __call__(self, *args, **kwargs):
        start = now(self.device)
        try: return self.forward(*args, **kwargs)
        finally: self.seconds += now(self.device) - start

    def __enter__(self): self.unet.forward = self; return self
    def __exit__(self, *_): del self.unet.forward


def now(device):
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def sample(ask, scheduler, batch, side, steps, like):
    "A sampling loop as the pipelines have it: scale, predict, step. Seconds for each step."
    scheduler.set_timesteps(steps, device=like.device)
    x = torch.randn(batch, 4, side, side, device=like.device, dtype=like.dtype) * scheduler.init_noise_sigma
    start = now(like.device)
    for t in scheduler.timesteps: x = scheduler.step(ask(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return (now(like.device) - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=TINY_SDXL, help="a diffusers folder or hub name, or random-sdxl (default: the embedded model)")
    parser.add_argument("--size", choices=["sdxl", "small"], default="sdxl", help="of random-sdxl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", choices=["no", "whole", "regional"], default="no", help="torch.compile of the UNet, in place")
    parser.add_argument("--output", type=Path, help="default: a file beside this script")
    a = parser.parse_args()
    unet = load_unet(a.base, a.size, a.device, getattr(torch, a.dtype), a.rank)
    if a.compile == "whole": unet.compile()
    if a.compile == "regional": unet.compile_repeated_blocks()
    like, side, scheduler = next(unet.parameters()), unet.config.sample_size, EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
    tokens = 32 if a.base == TINY_SDXL else 77      # a prompt's, as the tokenizer pads it
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    def random(*shape): return torch.randn(*shape, device=like.device, dtype=like.dtype)
    prompts = {name: PromptEmbeds(random(1, tokens, unet.config.cross_attention_dim), random(1, pooled)) for name in ("null", "base", "subject")}
    ids = torch.tensor([[8. * side] * 2 + [0.] * 2 + [8. * side] * 2], device=like.device, dtype=like.dtype)

    def call(x, t, *names, **kwargs):
        hidden, text = (torch.cat([getattr(prompts[n], k).expand(len(x), *getattr(prompts[n], k).shape[1:]) for n in names]) for k in ("hidden", "pooled"))
        return unet(torch.cat([x] * len(names)), t, hidden, added_cond_kwargs=dict(text_embeds=text, time_ids=ids.expand(len(text), -1)), return_dict=False, **kwargs)[0]

    def two_calls(x, t, rule=ConsistencyGuidance()):
        "As the DCO authors sample: null and base with the LoRA at scale 0, then the subject's row."
        null, base = call(x, t, "null", "base", cross_attention_kwargs={"scale": 0.}).chunk(2)
        return rule.combine(null, base, call(x, t, "subject"))

    def with_rule(rule, one_branch_a_call=False):
        def run(batch):
            with guided(unet, rule, prompts, scheduler=scheduler, max_rows=batch if one_branch_a_call else None): return sample(lambda x, t: call(x, t, "null"), scheduler, batch, side, a.steps, like)
        return run

    ways = {"one": with_rule(ParallelRescale()), "two": lambda batch: sample(two_calls, scheduler, batch, side, a.steps, like),
            "three": with_rule(ParallelRescale(), one_branch_a_call=True), "every": with_rule(every(ParallelRescale(), 2)), "cfg": with_rule(CFG())}
    device = torch.cuda.get_device_name() if like.device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    base = "the embedded model" if a.base == TINY_SDXL else f"random-sdxl ({a.size})" if a.base == "random-sdxl" else a.base
    lines = [f"# Guided sampling: {base}", "", f"{device}, {a.dtype}, {dict(no='eager').get(a.compile, f'compiled ({a.compile})')}, latents {side}×{side}, {tokens} tokens, LoRA rank {a.rank}, torch {torch.__version__}; {a.steps} steps, medians of {a.repeats} turns. "
             "One call: `ParallelRescale` through `guided`; two calls: null and base with the LoRA at scale 0, then the subject (the DCO authors' sampler); "
             "three calls: `max_rows=` the number of pictures; `every`: `every(ParallelRescale(), 2)`. Ratios are of times in the same turn.", "",
             "| batch | one call, ms a step | two calls / one | three calls / one | outside the UNet | every / CFG | one call / CFG |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for batch in a.batches:
        for way in ways.values(): way(batch)      # warm up
        turns, outside = [], []
        for _ in range(a.repeats):
            turns.append({name: way(batch) for name, way in ways.items()})
            if a.compile == "no":                 # a timer in a compiled network would be compiled too
                with Timer(unet) as timer: outside.append(share(ways["one"], batch, timer, a.steps))
        def ratio(over, under): return f"{statistics.median(t[over] / t[under] for t in turns):.2f}"
        lines.append(f"| {batch} | {1e3 * statistics.median(t['one'] for t in turns):.1f} | {ratio('two', 'one')} | {ratio('three', 'one')} | "
                     f"{f'{statistics.median(outside):.1%}' if outside else '–'} | {ratio('every', 'cfg')} | {ratio('one', 'cfg')} |")
        print(lines[-1], flush=True)
    name = "denoiser" if a.base == TINY_SDXL else f"denoiser-{Path(a.base).name}{'-small' if a.size == 'small' else ''}"
    if a.compile != "no": name += f"-{a.compile}"
    output = a.output or Path(__file__).with_name(f"{name}.md")
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {output}")


def share(way, batch, timer, steps):
    "The share of a step that is not spent in the UNet."
    timer.seconds = 0.
    total = way(batch) * steps
    return 1 - timer.seconds / total


if __name__ == "__main__": main()
