"""How much memory does a rule take at SDXL's size? Counted without a GPU and without weights, on torch's `meta` device.

    python benchmarks/memory.py          # writes benchmarks/memory.md, two minutes on one core

Every tensor that a forward pass makes on `meta` has a size and no storage. A dispatch mode adds up the bytes that are alive at
once. What a kernel borrows for itself (cuDNN's workspaces, attention's blocks) and what the allocator keeps is not in it: a card
needs one or two GiB beside the sums."""
import sys
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
GIB = 2**30
UNET = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048, addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, sample_size=128)
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
           block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024)
TEXTS = 123_060_480 + 694_659_840            # parameters of SDXL's two text encoders


class Alive(TorchDispatchMode):
    "Adds up the bytes of the storages that are made inside and alive at once; `peak` is the most."
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in inputs: self.add(x.untyped_storage())
        return out

    def add(self, storage):
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size): self.now -= size


class _Fused(torch.autograd.Function):
    "What a fused attention keeps for its gradient: what it was given, what it made, and a number for each query and head."
    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad): return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def attention_in_blocks():
    "Attention as the fused kernels do it: its matrix is never in memory as a whole."
    whole = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **kwargs: _Fused.apply(q, k, v)
    try: yield
    finally: F.scaled_dot_product_attention = whole


def peak(call):
    "The most bytes alive at once in `call()`, beside what was there."
    with torch.no_grad(), attention_in_blocks(), Alive() as alive: call()
    return alive.peak


def weights(model): return sum(p.numel() * p.element_size() for p in model.parameters())


def unet_rows(unet, rows, side):
    "A forward pass of `rows` rows for pictures of `side` pixels."
    x = torch.empty(rows, 4, side // 8, side // 8, dtype=unet.dtype, device="meta")
    text = torch.empty(rows, 77, 2048, dtype=unet.dtype, device="meta")
    more = dict(text_embeds=torch.empty(rows, 1280, dtype=unet.dtype, device="meta"), time_ids=torch.empty(rows, 6, dtype=unet.dtype, device="meta"))
    return lambda: unet(x, torch.empty((), device="meta"), text, added_cond_kwargs=more)


def decoding(vae, pictures, side):
    "Decoding `pictures` of `side` pixels."
    latents = torch.empty(pictures, 4, side // 8, side // 8, dtype=vae.dtype, device="meta")
    return lambda: vae.decode(latents)


def trained(checkpointing):
    "A DCO step at 1024², batch 1, LoRA rank 32 on the attention, bf16: (bytes that stay, most bytes alive beside them)."
    from parallel_rescale.subject.adapters import ATTENTION, add_lora
    with torch.device("meta"): unet = UNet2DConditionModel(**UNET).to(torch.bfloat16).requires_grad_(False)
    lora = sum(p.numel() for p in add_lora(unet, 32, ATTENTION))
    unet.train(checkpointing)
    if checkpointing: unet.enable_gradient_checkpointing()
    with attention_in_blocks(), Alive() as alive: unet_rows(unet, 1, 1024)().sample.float().square().mean().backward()
    # the LoRA in float32 is among the weights, its gradient in the pass; AdamW keeps two averages of it
    return weights(unet) + 8 * lora, alive.peak


def named_prompts(rule):
    "Prompts of SDXL's shape for all that a rule asks."
    from parallel_rescale.machine.prompts import PromptEmbeds
    return {b.prompt: PromptEmbeds(torch.empty(1, 77, 2048, dtype=torch.float16, device="meta"), torch.empty(1, 1280, dtype=torch.float16, device="meta"))
            for b in rule.branches}


def guided_step(unet, rule, max_rows=None, around=nullcontext(), side=1024):
    "One step of a rule for one picture of `side` pixels, as `guided` does it: (calls of the UNet, most bytes alive at once)."
    from parallel_rescale.machine import denoiser
    check, denoiser._check_finite = denoiser._check_finite, lambda *_: None     # nothing can be read on `meta`
    calls, one = [], dict(sample=torch.empty(1, 4, side // 8, side // 8, dtype=unet.dtype, device="meta"), timestep=500, encoder_hidden_states=None,
                          added_cond_kwargs=dict(time_ids=torch.empty(1, 6, dtype=unet.dtype, device="meta")))
    counting = unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    try:
        with denoiser.guided(unet, rule, named_prompts(rule), max_rows=max_rows), around: most = peak(lambda: unet(**one))
    finally:
        counting.remove()
        denoiser._check_finite = check
    return len(calls), most


def rule_steps(unet):
    "Of each rule of the package, in its default scales: name, calls and most bytes alive; the same with a call for each row."
    from peft import LoraConfig
    from parallel_rescale.method.registry import known_rules
    from parallel_rescale.subject.adapters import ATTENTION
    unet.add_adapter(LoraConfig(r=32, target_modules=list(ATTENTION)), adapter_name="subject")
    unet.half().requires_grad_(False)
    for name, kind in known_rules().items():
        if kind.__module__.startswith("parallel_rescale."):
            yield name, *guided_step(unet, kind()), *guided_step(unet, kind(), max_rows=1)


def steered(unet, vae, side, checkpointing=False, **how):
    "A step of parallel rescaling under universal guidance, a loss of the decoded picture: most bytes alive at once."
    from parallel_rescale.machine.universal import universal
    from parallel_rescale.method.rules import ParallelRescale
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    (vae.enable_gradient_checkpointing if checkpointing else vae.disable_gradient_checkpointing)()
    pipe = SimpleNamespace(unet=unet, vae=vae, scheduler=scheduler)
    return guided_step(unet, ParallelRescale(), around=universal(pipe, lambda x: x.square().mean((1, 2, 3)), **how), side=side)[1]


STEERING = {"the rule alone": {}, "backward": dict(backward=1), "backward, decoder checkpointed": dict(backward=1, checkpointing=True),
            "forward": dict(forward=1.), "forward, decoder checkpointed": dict(forward=1., checkpointing=True),
            "forward, loss of latents": dict(forward=1., decode=False)}


def table(head, rows): return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]])


def measure():
    "The page, as Markdown."
    with torch.device("meta"): unet, vae = UNet2DConditionModel(**UNET).half().eval(), AutoencoderKL(**VAE).eval()
    own, decoder = weights(unet), weights(vae)                # before rules give the UNet a LoRA
    base = own + decoder + 2 * TEXTS
    unet_table = [[rows, *(f"{peak(unet_rows(unet, rows, side)) / GIB:.2f}" for side in (512, 768, 1024))] for rows in (1, 2, 3, 4, 8, 12, 16, 48)]
    def decoded(pictures, side, *how):
        vae.disable_slicing(), vae.disable_tiling()
        for switch in how: getattr(vae, f"enable_{switch}")()
        return f"{peak(decoding(vae, pictures, side)) / GIB:.2f}"
    vae_table = [[f"{n} of {side}²", decoded(n, side), decoded(n, side, "slicing"), decoded(n, side, "slicing", "tiling")] for n, side in ((1, 1024), (4, 1024), (1, 1536))]
    steps = [[name, *(f"{b / GIB:.2f}" for b in (stays, beside, stays + beside))]
             for name, (stays, beside) in {"gradient checkpointing": trained(True), "none": trained(False)}.items()]
    rules = [[f"`{name}`", calls, f"{most / GIB:.2f}", apart, f"{one / GIB:.2f}"] for name, calls, most, apart, one in rule_steps(unet)]
    steering = [[name, *(f"{steered(unet, vae, side, **how) / GIB:.2f}" for side in (512, 1024))] for name, how in STEERING.items()]
    return f"""# Memory at SDXL's size

Counted on torch {torch.__version__}'s `meta` device (`python benchmarks/memory.py`): bytes of all tensors alive at once, in GiB. What kernels
borrow and allocators keep is not in it; reckon with one or two GiB more on a card.

Weights: UNet {own / GIB:.2f} (fp16), VAE {decoder / GIB:.2f} (float32), text encoders {2 * TEXTS / GIB:.2f} (fp16), together {base / GIB:.2f}.

## Activations of one UNet call, fp16

{table(["rows (pictures × branches)", "512²", "768²", "1024²"], unet_table)}

## A step of each rule, fp16

One picture of 1024² under `guided`, a LoRA of rank 32 on the attention, each rule in its default scales: what its branches ask of attention
and adapters and its own arithmetic are in it. `max_rows=1` gives every prediction a call of its own.

{table(["rule", "calls", "GiB", "calls, `max_rows=1`", "GiB, `max_rows=1`"], rules)}

## A step under universal guidance

Parallel rescaling (three rows, fp16) for one picture, steered by a loss of the decoded picture (VAE in float32), the loss's own memory left out.

{table(["", "512²", "1024²"], steering)}

## Decoding, float32

{table(["pictures", "as it is", "slicing", "slicing and tiling"], vae_table)}

## A fine-tuning step: DCO, 1024², batch 1, LoRA rank 32 on the attention, bf16

Latents and prompts are cached; VAE and text encoders have left the card. What stays: the UNet, the LoRA in float32 and AdamW's averages.

{table(["", "what stays", "beside it, at most", "together"], steps)}

On an NVIDIA H200 the step without checkpointing took 14.0 GB at its peak, 13.0 GiB ([finetune-sdxl.md](finetune-sdxl.md)).
"""


if __name__ == "__main__":
    page = measure()
    (Path(__file__).parent / "memory.md").write_text(page, encoding="utf-8")
    print(page)
