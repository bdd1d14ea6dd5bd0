"""Stock pipelines of every architecture that has a border, a few thousand random weights each, made without a download: for tests.

The networks are those of diffusers' own tests; words are cut into letters, so that no tokenizer has to be fetched."""
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import (
    AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, ChromaPipeline, ChromaTransformer2DModel, DDIMScheduler,
    FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel, FluxPipeline, FluxTransformer2DModel,
    QwenImagePipeline, QwenImageTransformer2DModel, SanaPipeline, SanaTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline,
    StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel, ZImagePipeline, ZImageTransformer2DModel)
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast, Qwen3Config,
    Qwen3Model, T5Config, T5EncoderModel)

from parallel_rescale.machine.architectures import border_of, denoiser_of
from parallel_rescale.tools.embedded import TINY_SDXL, load_tiny_sdxl


@dataclass
class Tiny:
    "A pipeline, what it is called with here, and how its own CFG is asked for: `stock(scale, negative)` are arguments."
    pipe: object
    stock: Callable
    encoding: dict = field(default_factory=dict)          # for `guide` and for the pipeline
    size: dict = field(default_factory=dict)              # for the pipeline alone

    def __post_init__(self):
        self.pipe.set_progress_bar_config(disable=True)
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module): part.eval()

    def __call__(self, prompt, steps=3, seed=0, **arguments):
        "Latents of the pipeline itself, not guided by a rule."
        return self.pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=steps, output_type="latent",
                         **self.encoding | self.size | arguments).images

    @property
    def model(self): return denoiser_of(self.pipe)

    @property
    def border(self): return border_of(self.model)


def vae(latent_channels=4, **more):
    return AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=latent_channels,
                         up_block_types=("UpDecoderBlock2D",) * 2, **more)


def clip(kind, **more):
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SDXL, subfolder="tokenizer")
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                            max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **more)
    return kind(config).eval(), tokenizer


CHAT = "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}>"


def letters():
    "A tokenizer whose words are letters; every text ends with </s>."
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {w: i for i, w in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = CHAT
    return made


def t5(width=32): return T5EncoderModel(T5Config(vocab_size=300, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)).eval()


def qwen3(width=16):
    return Qwen3Model(Qwen3Config(vocab_size=300, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                  num_key_value_heads=2, head_dim=8, max_position_embeddings=512)).eval()


def guidance_scale(scale, negative): return dict(guidance_scale=scale, negative_prompt=negative)
def true_cfg_scale(scale, negative): return dict(true_cfg_scale=scale, negative_prompt=negative or "")


def sd15(in_channels=4):
    "With 9 channels it is one of those that were trained to inpaint."
    unet = UNet2DConditionModel(sample_size=16, in_channels=in_channels, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    encoder, tokenizer = clip(CLIPTextModel)
    return Tiny(StableDiffusionPipeline(unet=unet, vae=vae(), text_encoder=encoder, tokenizer=tokenizer, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
                                        safety_checker=None, feature_extractor=None, requires_safety_checker=False), guidance_scale)


def sd3():
    """SD3.5's blocks: normed queries, and in the first a second attention of the picture alone; SD3 is the same without. With no T5, as
    people run it on small cards: the pipeline puts zeros in its place. Its pipeline for inpainting insists on 16 channels."""
    transformer = SD3Transformer2DModel(sample_size=16, patch_size=1, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
                                        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
                                        qk_norm="rms_norm", dual_attention_layers=(0,))
    (first, tokenizer), (second, _) = [clip(CLIPTextModelWithProjection, projection_dim=32) for _ in range(2)]
    return Tiny(StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(16, shift_factor=.1), text_encoder=first,
                                         tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer, text_encoder_3=None,
                                         tokenizer_3=None), guidance_scale)


WIDE = dict(height=16, width=24)


def flux1(guidance_embeds=True):
    "As FLUX.1-dev: it takes a distilled guidance besides."
    transformer = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                         joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=guidance_embeds)
    encoder, tokenizer = clip(CLIPTextModel)
    return Tiny(FluxPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=.1), text_encoder=encoder, tokenizer=tokenizer,
                             text_encoder_2=t5(), tokenizer_2=letters()), true_cfg_scale, dict(max_sequence_length=12), WIDE)


def chroma():
    transformer = ChromaTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                           joint_attention_dim=32, axes_dims_rope=[4, 4, 8], approximator_hidden_dim=32, approximator_layers=1,
                                           approximator_num_channels=16)
    transformer.register_to_config(guidance_embeds=False)      # its inpainting pipeline reads FLUX.1's setting (diffusers 0.42)
    return Tiny(ChromaPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=.1), text_encoder=t5(), tokenizer=letters()),
                guidance_scale, dict(max_sequence_length=12), WIDE)


def qwen_image():
    transformer = QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=3,
                                              joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    encoder = AutoencoderKLQwenImage(base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
                                     latents_mean=[0.] * 4, latents_std=[1.] * 4)
    pipe = QwenImagePipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=encoder, text_encoder=qwen3(), tokenizer=letters())
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "draw: {}.", 6
    return Tiny(pipe, true_cfg_scale, size=dict(height=32, width=48))


def z_image():
    transformer = ZImageTransformer2DModel(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
                                           axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    with torch.no_grad():                                 # made with torch.empty
        for token in (transformer.x_pad_token, transformer.cap_pad_token): token.fill_(1.)
    # its pipeline says c + s·(c − n) where CFG says n + (1 + s)·(c − n)
    return Tiny(ZImagePipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=.1), text_encoder=qwen3(), tokenizer=letters()),
                lambda scale, negative: guidance_scale(scale - 1, negative), dict(max_sequence_length=12), WIDE)


def sana():
    transformer = SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
                                         num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=32)
    encoder = AutoencoderDC(latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2,
                            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), ()),
                            decoder_qkv_multiscales=((), ()), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
                            downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu")
    text = Gemma2Model(Gemma2Config(vocab_size=300, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                    num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=1))
    return Tiny(SanaPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=encoder, text_encoder=text, tokenizer=letters()),
                lambda scale, negative: guidance_scale(scale, negative or ""), dict(max_sequence_length=12, complex_human_instruction=["Draw: "]),
                dict(height=32, width=64, use_resolution_binning=False))


def _flux2(kind, guidance_embeds, stock):
    transformer = Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                          joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=[4, 4, 4, 4],
                                          guidance_embeds=guidance_embeds)
    encoder = AutoencoderKLFlux2(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                                 latent_channels=4)
    pipe = kind(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=encoder, text_encoder=qwen3(), tokenizer=letters())
    pipe.system_message = ""
    return Tiny(pipe, stock and stock(pipe), dict(max_sequence_length=12, text_encoder_out_layers=(1, 2)), WIDE)


def flux2_dev():
    "It has no CFG of its own: there is no stock to compare with."
    return _flux2(Flux2Pipeline, True, None)


def flux2_klein():
    def stock(pipe):
        def arguments(scale, negative):
            if not negative: return dict(guidance_scale=scale)
            embeds, _ = pipe.encode_prompt(negative, max_sequence_length=12, text_encoder_out_layers=(1, 2))
            return dict(guidance_scale=scale, negative_prompt_embeds=embeds)
        return arguments
    return _flux2(Flux2KleinPipeline, False, stock)


def sdxl():
    """SDXL with the embedded model's text encoders, and a UNet and a VAE of random weights: diffusers' pipeline for inpainting takes 4 channels or 9, and the
    embedded model has more. It has tests of its own, so it is not among `MODELS`."""
    pipe = load_tiny_sdxl(StableDiffusionXLPipeline)
    unet = UNet2DConditionModel.from_config(dict(pipe.unet.config) | dict(in_channels=4, out_channels=4, block_out_channels=(32, 64, 64)))
    four = StableDiffusionXLPipeline(**{**pipe.components, "unet": unet, "vae": vae()}, force_zeros_for_empty_prompt=False, add_watermarker=False)
    return Tiny(four, guidance_scale, size=dict(height=32, width=32))


MODELS = {f.__name__: f for f in (sd15, sd3, flux1, chroma, qwen_image, z_image, sana, flux2_dev, flux2_klein)}


def tiny(name, adapter="subject") -> Tiny:
    "The tiny pipeline of a name in `MODELS`, or sdxl, the same at every call, with a random LoRA."
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    made = (MODELS | dict(sdxl=sdxl))[name]()
    torch.manual_seed(1)
    if adapter: made.model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=adapter)
    return made
