"""Time a whole picture of SDXL's size under each rule, and measure its memory: prompts, 30 steps, decoding. The weights are random, so nothing is fetched.

    python benchmarks/picture.py --device cuda --dtype float16 [--compile] [--steps 30] [--rank 32]
    python benchmarks/picture.py --size small --steps 4          # a narrow copy of the same architecture, for a CPU

Writes benchmarks/picture.md.
"""
import argparse
import platform
import statistics
import warnings
from pathlib import Path

import torch
from denoiser import load_unet, now
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from parallel_rescale import CFG, TINY_SDXL, ConsistencyGuidance, FocusedContrast, ParallelRescale, StyleContrast, SubjectPipeline, every

VAE = dict(sdxl=dict(block_out_channels=(128, 256, 512, 512)), small=dict(block_out_channels=(32, 32, 32, 32)))
TEXTS = dict(sdxl=(dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
                   dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)),
             small=(dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, projection_dim=64),) * 2)
PROMPT, CLASS = "a watercolour of a sks dog wearing a hat in the jungle", "a watercolour of a dog wearing a hat in the jungle"
SHOWN = dict(prompts={"reference": "a photo of a dog"})     # what the contrasts ask beside


def random_sdxl(size, device, dtype, rank):
    "A SubjectPipeline with SDXL's architecture, random weights and a random LoRA; the embedded model's tokenizers."
    tokenizers = [CLIPTokenizer.from_pretrained(TINY_SDXL, subfolder=part) for part in ("tokenizer", "tokenizer_2")]
    words = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=tokenizers[0].bos_token_id, eos_token_id=tokenizers[0].eos_token_id, pad_token_id=tokenizers[0].pad_token_id)
    unet = load_unet("random-sdxl", size, device, dtype, rank)
    with torch.device(device):
        vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, scaling_factor=0.13025,
                            sample_size=8 * unet.config.sample_size, **VAE[size]).to(dtype)
        texts = [cls(CLIPTextConfig(**words, **sizes, hidden_act=act)).to(dtype) for cls, sizes, act in
                 zip((CLIPTextModel, CLIPTextModelWithProjection), TEXTS[size], ("quick_gelu", "gelu"))]
    pipe = SubjectPipeline(vae, *texts, *tokenizers, unet, EulerDiscreteScheduler.from_pretrained(TINY_SDXL, subfolder="scheduler"), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, rule, steps, **options):
    "Seconds for one picture, and the peak of the card's memory in GB."
    start = now(pipe.unet.device)
    if pipe.unet.device.type == "cuda": torch.cuda.reset_peak_memory_stats()
    pipe(PROMPT, guidance=rule, base_prompt=CLASS, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **options)
    return now(pipe.unet.device) - start, torch.cuda.max_memory_allocated() / 1e9 if pipe.unet.device.type == "cuda" else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["sdxl", "small"], default="sdxl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="once more with the UNet's repeated blocks compiled")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("picture.md"))
    a = parser.parse_args()
    warnings.simplefilter("ignore")       # random weights draw no numbers
    if a.device == "cpu": a.dtype = "float32" if a.dtype == "float16" else a.dtype
    pipe = random_sdxl(a.size, a.device, getattr(torch, a.dtype), a.rank)
    rules = {"CFG 5": (CFG(5.0), {}), "consistency 5/2": (ConsistencyGuidance(5.0, 2.0), {}), "parallel rescaling 5/2": (ParallelRescale(5.0, 2.0), {}),
             "parallel rescaling 5/2, every second step": (every(ParallelRescale(5.0, 2.0), 2), {}), "parallel rescaling 5/2, `max_rows=1`": (ParallelRescale(5.0, 2.0), dict(max_rows=1)),
             "style contrast 5/2": (StyleContrast(5.0, 2.0), SHOWN), "focused contrast 5/2": (FocusedContrast(5.0, 2.0), SHOWN)}
    side = 8 * pipe.unet.config.sample_size
    device = torch.cuda.get_device_name() if a.device.startswith("cuda") else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    lines = [f"# A whole picture of SDXL ({a.size}), {side}×{side}", "",
             f"{device}, {a.dtype}, LoRA rank {a.rank}, {a.steps} steps of Euler, one picture, torch {torch.__version__}; random weights; prompts and decoding (float32) are in it; "
             f"medians of {a.repeats}. Everything stays on the card: weights {sum(p.numel() * p.element_size() for m in pipe.components.values() if isinstance(m, torch.nn.Module) for p in m.parameters()) / 1e9:.2f} GB.", "",
             "| rule | seconds | of CFG's | peak GPU memory, GB |", "| --- | --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    base = None
    for compiled in (False, True)[:1 + a.compile]:
        if compiled: pipe.unet.compile_repeated_blocks()
        for name, (rule, options) in rules.items():
            if compiled and "," in name: continue
            picture(pipe, rule, a.steps if compiled else 2, **options)                      # warm up; compile
            found = [picture(pipe, rule, a.steps, **options) for _ in range(a.repeats)]
            seconds = statistics.median(s for s, _ in found)
            base = base or seconds
            peak = found[0][1]
            lines.append(f"| {name}{', compiled' if compiled else ''} | {seconds:.2f} | {seconds / base:.2f} | {'–' if peak is None else f'{peak:.1f}'} |")
            print(lines[-1], flush=True)
            a.output.write_text("\n".join(lines) + "\n", encoding="utf-8")                  # what is there stays, if the rest is cut off


if __name__ == "__main__": main()
