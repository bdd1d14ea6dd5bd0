"""Go on with painter and judge on one GPU and many cores, for as long as there is time.

    python training/on_gpu.py render FOLDER --seconds 500 --processes 14 &
    python training/on_gpu.py judge FOLDER --seconds 200 &
    python training/on_gpu.py painter FOLDER --seconds 400; wait

The losses are those of `train-tiny`. What differs is what a GPU needs: fresh pictures come in all the time, everything that a step draws is drawn on the
device, and a whole step is one CUDA graph (on a CPU, for a test, plain steps). The learning rate follows the clock. FOLDER gets
painter.safetensors and judge.safetensors (moving averages; the judge not yet calibrated) and a log of each.
"""
import argparse
import json
import math
import multiprocessing
import os
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from parallel_rescale.tools.embedded import load_tiny_sdxl
from parallel_rescale.tools.util import computes_bf16
from parallel_rescale.world.captions import MAX_TOKENS
from parallel_rescale.world.judge import Judge, load_judge, supervised_contrastive
from parallel_rescale.world.painter import Painter
from parallel_rescale.world.pictures import _render_one
from parallel_rescale.world.scenes import ATTRIBUTES
from parallel_rescale.world.training import as_tensor, min_snr_mse, save_weights, signal_to_noise

SHARD, EACH = 250, 4                          # individuals in a shard, pictures of each


def numbered(tokenizer, texts): return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="np").input_ids.astype(np.int16)


def render_shards(job):
    "Shards number `first`, `first` + `every`, … until `until`."
    folder, seed, first, every, until, most = job
    from transformers import CLIPTokenizer
    from parallel_rescale import TINY_SDXL
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SDXL, subfolder="tokenizer")
    for k in range(first, most, every):
        if time.time() > until: return
        made = [_render_one((seed, k * SHARD + i, EACH)) for i in range(SHARD)]
        part = folder / f"part{k}.npz"
        np.savez(part, images=np.concatenate([m[0] for m in made]), labels=np.concatenate([m[1] for m in made]),
                 tokens=numbered(tokenizer, [text for m in made for texts in m[2] for text in texts]).reshape(SHARD * EACH, 3, MAX_TOKENS),
                 vector=np.stack([m[3] for m in made]))
        part.rename(folder / f"shard{k:05d}.npz")


def render(folder, seed, seconds, processes, most):
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, seed, i, processes, time.time() + seconds, most) for i in range(processes)]
    # the steps of the networks come first
    with multiprocessing.get_context("spawn").Pool(processes, os.nice, (10,)) as pool: pool.map(render_shards, jobs, 1)


class Shards:
    "Hands out shards as they appear."
    def __init__(self, folder): self.folder, self.seen = folder, set()

    def new(self, most=8):
        found = [f for f in sorted(self.folder.glob("shard*.npz")) if f not in self.seen][:most]
        for file in found:
            self.seen.add(file)
            yield dict(np.load(file))


def captured(whole, optimizer):
    "A step as one CUDA graph: a function without arguments."
    side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph): whole()
    return graph.replay


def compiled(network, wanted=True):
    "Let torch.compile fuse `network`, in place and under its own names, or leave it as it was."
    if wanted: network.compile()
    else: network._compiled_call_impl = None


def follow(step, model, average, optimizer, rate, loss_sum, *, seconds, peak, absorb, look, file, fused=()):
    "Repeat `step` (a function without arguments) for `seconds`; a learning rate over the clock, a log, a file now and then."
    device = rate.device
    def whole():
        optimizer.zero_grad(set_to_none=True)
        loss = step(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step(); loss_sum.add_(loss.detach())
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), .001)
            for a, b in zip(average.buffers(), model.buffers()): a.copy_(b)
    kept = [p.detach().clone() for p in [*model.parameters(), *average.parameters()]]
    run, start = whole, time.time()
    rate.fill_(1e-6)
    for fuse in (True, False) if device.type == "cuda" else ():
        for part in fused: compiled(part, fuse)
        try: run = captured(whole, optimizer); break
        except Exception as error:
            print("no CUDA graph of", "compiled steps:" if fuse else "steps:", repr(error)[:2000], flush=True); torch.cuda.synchronize()
    print(file.stem, "begins", "with" if run is not whole else "without", "a CUDA graph", flush=True)
    steps, log, noted, saved, scale = 0, [], (0, start), start, 1.
    loss_sum.zero_()
    while (gone := time.time() - start) < seconds:
        part = gone / seconds
        rate.fill_(peak * scale * min(1., (steps + 1) / 300) * (.01 + .99 * .5 * (1 + math.cos(math.pi * part))))
        for _ in range(20): run()
        steps += 20
        if steps % 100 == 0 or device.type == "cpu":
            value, since = loss_sum.item() / max(steps - noted[0], 1), time.time() - noted[1]
            if not math.isfinite(value) or (log and value > 3 * log[-1]["loss"]):          # back to where it was, and slower
                print("diverged at step", steps, value, flush=True)
                with torch.no_grad():
                    for p, q in zip([*model.parameters(), *average.parameters()], kept): p.copy_(q)
                    for state in optimizer.state.values():
                        for k in ("exp_avg", "exp_avg_sq"): state[k].zero_()
                scale *= .6; loss_sum.zero_(); noted = (steps, time.time())
            elif since > 5:
                log.append(dict(step=steps, seconds=round(time.time() - start, 1), loss=round(value, 5), steps_a_second=round((steps - noted[0]) / since, 1)))
                loss_sum.zero_(); noted = (steps, time.time())
                if len(log) % 3 == 0:
                    kept = [p.detach().clone() for p in [*model.parameters(), *average.parameters()]]
                    log[-1] |= look(); print(file.stem, log[-1], flush=True)
            absorb()
            if time.time() - saved > 60: save_weights(average, file); saved = time.time()
    if device.type == "cuda": torch.cuda.synchronize()
    save_weights(average, file)
    (file.parent / f"{file.stem}.json").write_text(json.dumps([*log, dict(step=steps, seconds=round(time.time() - start, 1)) | look()], indent=0))
    print(file.stem, "ends after", steps, "steps", flush=True)


def begin(model, device, peak):
    rate = torch.tensor(peak, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), rate if device != "cpu" else peak, betas=(.9, .99), weight_decay=1e-2, fused=True, capturable=device != "cpu")
    if device == "cpu":
        class Rate:                           # a CPU's fused AdamW takes numbers
            device = torch.device("cpu")
            def fill_(self, value):
                for group in optimizer.param_groups: group["lr"] = value
        rate = Rate()
    return deepcopy(model).requires_grad_(False), optimizer, rate, torch.zeros((), device=device)


def painter(folder, seconds, device, room, batch, peak):
    pipe = load_tiny_sdxl(device=device)
    vae, scale = pipe.vae.float().eval(), pipe.vae.config.scaling_factor
    model = Painter(pipe.tokenizer, pipe.unet.config.block_out_channels, pipe.unet.config.in_channels)
    for part in ("text_encoder", "text_encoder_2", "unet"): setattr(model, part, getattr(pipe, part))
    model.float().train().requires_grad_(True)
    average, optimizer, rate, loss_sum = begin(model, device, peak)
    channels = pipe.unet.config.in_channels
    latents = torch.zeros(room, channels, 16, 16, dtype=torch.float16, device=device)
    tokens = torch.zeros(room, 3, MAX_TOKENS, dtype=torch.int16, device=device)
    empty = torch.from_numpy(numbered(pipe.tokenizer, [""])).to(device)
    count, shards, held = torch.zeros((), device=device), Shards(folder), {}
    snr = signal_to_noise().to(device).float(); ramp = torch.arange(batch, device=device) / batch

    @torch.no_grad()
    def absorb(most=8):
        for shard in shards.new(most):
            found = torch.cat([vae.encode(p).latent_dist.mean * scale for p in as_tensor(shard["images"], device).split(500)])
            if not held: held.update(latents=found, tokens=torch.from_numpy(shard["tokens"]).to(device)); continue
            n = int(count.item())
            if n + len(found) > room: return
            latents[n:n + len(found)] = found.half(); tokens[n:n + len(found)] = torch.from_numpy(shard["tokens"]).to(device)
            count.add_(len(found))

    def loss_of(network, clean, words, t, noise):
        a = (snr[t] / (1 + snr[t])).view(-1, 1, 1, 1)
        with torch.autocast(torch.device(device).type, torch.bfloat16, computes_bf16(device), cache_enabled=False): prediction = network(a.sqrt() * clean + (1 - a).sqrt() * noise, t, words)
        return min_snr_mse(prediction, noise, snr[t])[0]

    def step():
        rows = (torch.rand(batch, device=device) * count).long()
        t = (((torch.rand((), device=device) + ramp) % 1) * 1000).long().clamp(max=999)
        noise = torch.randn(batch, channels, 16, 16, device=device)
        words = tokens[rows, torch.randint(3, (batch,), device=device)]
        words = torch.where(torch.rand(batch, 1, device=device) < 1 / 12, empty, words).long()
        return loss_of(model, latents[rows].float(), words, t, noise)

    @torch.no_grad()
    def look():
        generator = torch.Generator(device).manual_seed(0); clean = held["latents"][:512]
        noise = torch.randn(clean.shape, device=device, generator=generator)
        t = (torch.arange(len(clean), device=device) * 1000 // len(clean)).long()
        return dict(held_out=round(loss_of(average, clean, held["tokens"][:len(clean), 0].long(), t, noise).item(), 5), pictures=int(count.item()))

    while count.item() < min(4000, room // 2): absorb(64); time.sleep(.2)
    follow(step, model, average, optimizer, rate, loss_sum, seconds=seconds, peak=peak, absorb=absorb, look=look, file=folder / "painter.safetensors", fused=[model.unet])


def judge(folder, seconds, device, room, batch, peak):
    model = Judge().to(device)
    model.load_state_dict(load_judge().state_dict()); model.temperature.fill_(1.); model.train().requires_grad_(True)
    average, optimizer, rate, loss_sum = begin(model, device, peak)
    people, k = room // EACH, batch // EACH
    pictures = torch.zeros(people, EACH, 64, 64, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(people, EACH, len(ATTRIBUTES), dtype=torch.int16, device=device)
    count, shards, held = torch.zeros((), device=device), Shards(folder), {}
    kinds = len(ATTRIBUTES["cls"])
    state = {}

    def absorb(most=8):
        for shard in shards.new(most):
            if not held: held.update(images=as_tensor(shard["images"], device), labels=torch.from_numpy(shard["labels"]).to(device).long()); continue
            n = int(count.item())
            if n + SHARD > people: return
            if not state:
                state.update(vector=torch.zeros(people, shard["vector"].shape[1], device=device), cls=torch.full((people,), -1, device=device))
            now = slice(n, n + SHARD)
            pictures[now] = torch.from_numpy(shard["images"]).to(device).view(SHARD, EACH, 64, 64, 3)
            found = torch.from_numpy(shard["labels"]).to(device).view(SHARD, EACH, -1)
            labels[now] = found; state["vector"][now] = torch.from_numpy(shard["vector"]).to(device); state["cls"][now] = found[:, 0, 0].long()
            count.add_(SHARD)

    def step():
        two = torch.rand(kinds, device=device).topk(2).indices                  # classmates are hard to tell apart
        fits = (state["cls"] == two[0]) | (state["cls"] == two[1])
        who = (torch.rand(people, device=device) * fits).topk(k).indices
        seen = pictures[who].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
        truth = labels[who].flatten(0, 1).long()
        level = torch.rand(len(seen), 1, 1, 1, device=device) * .08
        with torch.autocast(torch.device(device).type, torch.bfloat16, computes_bf16(device), cache_enabled=False): answers = model(seen + level * torch.randn(seen.shape, device=device))
        heads = [F.cross_entropy(answers[name].float(), truth[:, i], ignore_index=-1, reduction="sum") / (truth[:, i] >= 0).sum().clamp(min=1) for i, name in enumerate(ATTRIBUTES)]
        target = state["vector"][who].repeat_interleave(EACH, 0)
        return sum(heads) + 2 * F.mse_loss(answers["vector"].float(), target) + supervised_contrastive(answers["identity"].float(), who.repeat_interleave(EACH))

    @torch.no_grad()
    def look():
        average.eval(); answers = average(held["images"]); average.train()
        def right(i, name):
            known = held["labels"][:, i] >= 0
            return round((answers[name].argmax(1) == held["labels"][:, i])[known].float().mean().item(), 3)
        return dict(pictures=int(count.item()) * EACH, accuracy={name: right(i, name) for i, name in enumerate(ATTRIBUTES)})

    while count.item() < min(1000, people // 2): absorb(64); time.sleep(.2)
    follow(step, model, average, optimizer, rate, loss_sum, seconds=seconds, peak=peak, absorb=absorb, look=look, file=folder / "judge.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["render", "painter", "judge"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--room", type=int, default=1_000_000, help="how many pictures are held at the most")
    parser.add_argument("--batch", type=int, default=None, help="default: 256 for the painter, 128 for the judge")
    parser.add_argument("--peak", type=float, default=None, help="learning rate; default: 1.5e-3 for the painter, 2e-3 for the judge")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=2026, help="another one for a second run, which then sees other pictures")
    a = parser.parse_args()
    torch.manual_seed(a.seed); torch.backends.cudnn.benchmark = True
    if a.what == "render": render(a.folder, a.seed, a.seconds, a.processes, a.room // (SHARD * EACH))
    if a.what == "painter": painter(a.folder, a.seconds, a.device, a.room, a.batch or 256, a.peak or 1.5e-3)
    if a.what == "judge": judge(a.folder, a.seconds, a.device, a.room, a.batch or 128, a.peak or 2e-3)
