"""Time a fine-tuning step against a straightforward loop, and measure the memory of a step at SDXL's size.

    python benchmarks/finetune.py                                # the embedded model → finetune.md
    python benchmarks/finetune.py --size sdxl                    # random weights, bf16, 1024², rank 32, batch 1 → finetune-sdxl.md; needs a GPU
    python benchmarks/finetune.py --size sdxl --device cpu       # the same code at a reduced size → finetune-sdxl-small.md

The ways of taking a step take turns, and each ratio is a median over the turns.
"""
import argparse
import gc
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer

from denoiser import SDXL, SMALL
from parallel_rescale import TINY_SDXL
from parallel_rescale.machine.adapter_rows import adapter_rows
from parallel_rescale.machine.prompts import PromptEmbeds
from parallel_rescale.machine.prompts import base_prompt, subject_prompt
from parallel_rescale.subject.adapters import ATTENTION, DTYPES, add_lora, add_token, embed, flatten, load_base, rows_of
from parallel_rescale.subject.defaults import recommended
from parallel_rescale.subject.finetuning import prepared_run
from parallel_rescale.subject.losses import dco_loss, mse, predict
from parallel_rescale.subject.preparing import make_optimizer
from parallel_rescale.subject.references import as_references
from parallel_rescale.subject.step import Run, autocast, step_batches, subject_text, train_step
from parallel_rescale.world.pictures import reference_set


CAT = dict(class_noun="cat", token="<pixel>")


def straightforward(references, base=TINY_SDXL, **changed):
    "A step as the DCO authors' script takes it: pictures and prompts are encoded every time, then comes φ (the LoRA at scale 0), then θ."
    pipe, s = load_base(base), SimpleNamespace(**recommended(base) | CAT | changed)
    for pair in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)): add_token(*pair, s.token, s.class_noun)
    params = add_lora(pipe.unet, s.rank, s.target_modules)
    optimizer, scheduler, unet = torch.optim.AdamW(params, lr=s.learning_rate), DDPMScheduler.from_config(pipe.scheduler.config), pipe.unet
    ids = torch.tensor([[64., 64, 0, 0, 64, 64]])

    def step(_):
        which = torch.randint(len(references), (s.train_batch_size,)).tolist()
        with torch.no_grad():
            pixels = torch.stack([torch.from_numpy(np.array(references[i].image)).permute(2, 0, 1) / 127.5 - 1 for i in which])
            clean = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
            captions = [references[i].caption for i in which]
            subject, base = (embed(pipe, [fill(c, w) for c in captions]) for fill, w in ((subject_prompt, s.token), (base_prompt, s.class_noun)))
        noise, t = torch.randn_like(clean), torch.randint(1000, (len(which),))
        x_t, time_ids = scheduler.add_noise(clean, noise, t), ids.expand(len(which), -1)
        with torch.no_grad():
            added = dict(text_embeds=base.pooled, time_ids=time_ids)
            reference = mse(unet(x_t, t, base.hidden, added_cond_kwargs=added, cross_attention_kwargs={"scale": 0.0}).sample, noise)
        loss = dco_loss(mse(predict(unet, x_t, t, subject, time_ids), noise), reference, s.beta)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def bare(run):
    "Forward and backward of φ and θ on one batch and nothing else: what a DCO step cannot do without."
    unet, (batch, _) = run.pipe.unet, step_batches(run, 0)[0]
    layers = [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]
    subject, base = subject_text(run, batch), rows_of(run.text.base, batch.source)

    def switch_off(value):
        for layer in layers: layer._disable_adapters = value

    def step(_):
        with autocast(run):
            switch_off(True)
            with torch.no_grad(): phi = predict(unet, batch.x_t, batch.t, base, batch.time_ids)
            switch_off(False)
            theta = predict(unet, batch.x_t, batch.t, subject, batch.time_ids)
            loss = dco_loss(mse(theta, batch.target), mse(phi, batch.target), run.settings.beta)
        loss.backward()
    return step


def switching(run):
    "The LoRA switched off and on again for φ, without a step."
    def step(_):
        with adapter_rows(run.pipe.unet, 0.0): pass
    return step


def tiny(a):
    "Rows of the table for the embedded model."
    references = as_references(reference_set("pixel_the_cat", "{subject}"))
    head = ["straightforward, ms a step", "finetune, ms a step", "straightforward / finetune", "φ and θ in one call / in two", "with a learned token / without",
            "outside forward and backward, % of a step", "of it the LoRA's switch, %"]
    for batch in a.batches:
        runs = dict(two={}, one=dict(batched=True), token=dict(train_text_encoder_ti=True))
        ways = {name: lambda n, run=prepared_run(references, **CAT, train_batch_size=batch, **more): train_step(run, n) for name, more in runs.items()}
        ways["plain"] = straightforward(references, train_batch_size=batch)
        own = prepared_run(references, **CAT, train_batch_size=batch)
        ways |= dict(bare=bare(own), switch=switching(own))
        turns = take_turns(ways, a.repeats, "cpu")
        median = lambda of: statistics.median(map(of, turns))
        yield head, [batch, f"{1e3 * median(lambda t: t['plain']):.0f}", f"{1e3 * median(lambda t: t['two']):.0f}", f"{median(lambda t: t['plain'] / t['two']):.2f}",
                     f"{median(lambda t: t['one'] / t['two']):.2f}", f"{median(lambda t: t['token'] / t['two']):.2f}",
                     f"{100 * median(lambda t: 1 - t['bare'] / t['two']):.1f}", f"{100 * median(lambda t: t['switch'] / t['two']):.1f}"]


def take_turns(ways, repeats, device):
    "Seconds of one step in each way, turn by turn."
    for way in ways.values(): way(0); way(1)
    turns = []
    for n in range(2, repeats + 2):
        turns.append({})
        for name, way in ways.items():
            start = now(device)
            way(n)
            turns[-1][name] = now(device) - start
    return turns


def now(device):
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def random_run(a, **changed):
    "A run over a UNet of SDXL's shape with random weights: what is on the device while `finetune` trains, and nothing else."
    small = a.device == "cpu"
    shape = SMALL if small else SDXL
    with torch.device(a.device):
        unet = UNet2DConditionModel(**shape, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), addition_embed_type="text_time",
                                    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True)
    dtype = DTYPES[a.precision]
    unet.to(dtype).requires_grad_(False)
    s = SimpleNamespace(**dict(loss="dco", rank=32, train_batch_size=1, gradient_accumulation_steps=1, mixed_precision=a.precision, beta=1000.0, max_grad_norm=1.0, seed=0,
                               train_text_encoder_ti=False, gradient_checkpointing=False, batched=False, timestep_density=None) | changed)
    params = [flatten(add_lora(unet, s.rank, ATTENTION))]
    if s.gradient_checkpointing: unet.enable_gradient_checkpointing(); unet.train()
    side, pooled = shape["sample_size"], shape["projection_class_embeddings_input_dim"] - 6 * shape["addition_time_embed_dim"]
    text = PromptEmbeds(torch.randn(4, 77, shape["cross_attention_dim"], device=a.device, dtype=dtype), torch.randn(4, pooled, device=a.device, dtype=dtype))
    data = SimpleNamespace(moments=torch.randn(4, 2, 4, side, side).abs(), time_ids=torch.tensor([[8. * side, 8 * side, 0, 0, 8 * side, 8 * side]] * 4), source=torch.arange(4))
    pipe = SimpleNamespace(unet=unet, vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=0.13)))
    run = Run(s, Accelerator(cpu=small), pipe, DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear"), {}, [dict(params=params, lr=5e-5)],
                  [], data=data, text=SimpleNamespace(subject=text, base=text))
    run.optimizer = make_optimizer(run.params)
    run.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer, 1.0)
    run.scaler = torch.amp.GradScaler(a.device, init_scale=2.0**10, enabled=a.precision == "fp16")
    return run


def timed(run, changed, a):
    "(names of the ways, seconds of each turn) of a run; nothing of it stays behind."
    if a.device == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()       # not of the UNet's making, in float32
    ways = {"step": lambda n: train_step(run, n)} | ({} if changed.get("batched") else dict(bare=bare(run), switch=switching(run)))
    return list(ways), take_turns(ways, a.repeats, a.device)


def sdxl(a):
    "Rows of the table at SDXL's size: time and peak memory of a DCO step."
    head = ["ms a step", "peak GPU memory, GB", "outside forward and backward, % of a step", "of it the LoRA's switch, %"]
    options = {"gradient checkpointing": dict(gradient_checkpointing=True), "none": dict(), "φ and θ in one call": dict(batched=True)}
    for name, changed in options.items():
        gc.collect()                                     # the run before is gone, or its UNet would stand beside this one
        try: ways, turns = timed(random_run(a, **changed), changed, a)
        except torch.OutOfMemoryError: yield head, [name, "does not fit", "–", "–", "–"]; continue
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if a.device == "cuda" else "–"
        outside = [f"{100 * statistics.median(of(t) for t in turns):.1f}" for of in (lambda t: 1 - t["bare"] / t["step"], lambda t: t["switch"] / t["step"])] if "bare" in ways else ["–", "–"]
        yield head, [name, f"{1e3 * statistics.median(t['step'] for t in turns):.0f}", peak, *outside]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "sdxl"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="of --size sdxl; on a CPU it runs at a reduced size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="of --size tiny")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", choices=["bf16", "fp16"], default="bf16", help="of --size sdxl")
    parser.add_argument("--output", type=Path, help="default: a file beside this script")
    a = parser.parse_args()
    small = a.size == "sdxl" and a.device == "cpu"
    device = torch.cuda.get_device_name() if a.size == "sdxl" and not small else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    what = "the embedded model, float32" if a.size == "tiny" else f"SDXL's shape{' (reduced)' if small else ''} with random weights, {a.precision}, {256 if small else 1024}², LoRA rank 32, batch 1"
    lines = [f"# A fine-tuning step: {what}", "", f"{device}, torch {torch.__version__}; medians of {a.repeats} turns, ratios are of times in the same turn. The loss is DCO.", ""]
    for head, row in (tiny if a.size == "tiny" else sdxl)(a):
        if len(lines) == 4:
            first = "batch" if a.size == "tiny" else "option"
            lines += [f"| {' | '.join([first, *head])} |", "| --- " * (len(head) + 1) + "|"]
        lines.append(f"| {' | '.join(map(str, row))} |")
        print(lines[-1], flush=True)
        if a.output: a.output.write_text("\n".join(lines) + "\n", encoding="utf-8")      # a row that is known stays known
    output = a.output or Path(__file__).with_name(f"finetune{'' if a.size == 'tiny' else '-sdxl-small' if small else '-sdxl'}.md")
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {output}")


if __name__ == "__main__": main()
