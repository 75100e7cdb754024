"""Tiny real pipelines with seeded weights: the layouts of SD 1.5, SDXL, FLUX and SD3, that run in milliseconds."""

from __future__ import annotations

import copy
import inspect
from functools import cache

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusion_attn.core.enable import resolve
from diffusion_attn.methods import Clear
from diffusion_attn.shapes.tokenizer import WORDS, build_tokenizer
from tests.golden.seeded import seed_parameters

SD = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 24, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
SDXL = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": [1, 2, 3],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
SD3 = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 48,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
PROMPT = "a red star above a blue ring on a white background"


def unet(config=SD, **changes):
    return seed_parameters(UNet2DConditionModel(**{**config, **changes}).eval())


def motion():
    """A UNet with motion modules, as AnimateDiff has them."""
    return seed_parameters(
        UNetMotionModel(
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=4,
        ).eval()
    )


def vae():
    return seed_parameters(
        AutoencoderKL(
            sample_size=64,
            block_out_channels=(4, 4, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=2,
            latent_channels=4,
        ).eval(),
        gain=0.5,
    )


def text_encoder(cls=CLIPTextModel):
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=12,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seed_parameters(cls(config).eval())


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(**changes):
    """A Stable Diffusion 1.5 pipeline of native size 64 pixels (16 latent cells)."""
    return quiet(
        StableDiffusionPipeline(
            vae(),
            text_encoder(),
            build_tokenizer(),
            unet(SD, **changes),
            DDIMScheduler(**SCHEDULE),
            None,
            None,
            requires_safety_checker=False,
        )
    )


def sdxl(**changes):
    """An SDXL pipeline of native size 64 pixels (16 latent cells)."""
    return quiet(
        StableDiffusionXLPipeline(
            vae(),
            text_encoder(),
            text_encoder(CLIPTextModelWithProjection),
            build_tokenizer(),
            build_tokenizer(),
            unet(SDXL, **changes),
            DDIMScheduler(**SCHEDULE),
            add_watermarker=False,
        )
    )


def transformer(config=FLUX, **changes):
    cls = FluxTransformer2DModel if config is FLUX else SD3Transformer2DModel
    return seed_parameters(cls(**{**config, **changes}).eval())


def t5(width):
    """A T5 encoder, and its tokenizer of the grammar's words."""
    tokenizer = T5Tokenizer(
        vocab=[(word, 0.0) for word in ("<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in WORDS))], extra_ids=0
    )
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    return seed_parameters(T5EncoderModel(config).eval()), tokenizer


def latents_around_zero():
    autoencoder = vae()
    autoencoder.register_to_config(shift_factor=0.0)
    return autoencoder


def flux(**changes):
    """A FLUX.1-dev pipeline with an autoencoder of 4x: a token is 8 pixels wide."""
    encoder, tokenizer = t5(12)
    return quiet(
        FluxPipeline(
            FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            latents_around_zero(),
            text_encoder(),
            build_tokenizer(),
            encoder,
            tokenizer,
            transformer(FLUX, **changes),
        )
    )


def sd3(**changes):
    """A Stable Diffusion 3.5 pipeline with an autoencoder of 4x: a token is 8 pixels wide."""
    encoder, tokenizer = t5(24)
    return quiet(
        StableDiffusion3Pipeline(
            transformer(SD3, **changes),
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            latents_around_zero(),
            text_encoder(CLIPTextModelWithProjection),
            build_tokenizer(),
            text_encoder(CLIPTextModelWithProjection),
            build_tokenizer(),
            encoder,
            tokenizer,
        )
    )


def denoiser(pipe):
    return resolve(pipe)[1]


def controlnet(of):
    # Two stages of the conditioning embedding make four times, as the autoencoder here has it.
    net = ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(4, 8, 8))
    return seed_parameters(net.eval())


def run(pipe, size=128, steps=5, **kwargs):
    """Final latents of a seeded run."""
    kwargs.setdefault("prompt", PROMPT)
    width, height = (size, size) if isinstance(size, int) else size
    if "image" not in kwargs or "control" in type(pipe).__name__.lower():
        kwargs.update(height=height, width=width)
    kwargs.setdefault("output_type", "latent")
    if hasattr(pipe, "tokenizer_2") and hasattr(pipe, "transformer"):
        kwargs.setdefault("max_sequence_length", 16)
    return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(3), **kwargs).images


def forward(unet, x, timestep=801, **kwargs):
    text = torch.randn(len(x), 5, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    if unet.config.addition_embed_type:
        ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(len(x), 1)
        kwargs["added_cond_kwargs"] = {"text_embeds": torch.ones(len(x), 12), "time_ids": ids}
    with torch.no_grad():
        return unet(x, timestep, text, **kwargs).sample


def image_ids(grid):
    """FLUX's ids of a grid of tokens."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)


def call_flux(model, grid, hidden=None, ids=None, **kwargs):
    """A forward pass of a FLUX model on a grid of tokens."""
    with torch.no_grad():
        return model(
            noise(1, grid[0] * grid[1], 16) if hidden is None else hidden,
            encoder_hidden_states=noise(1, 5, 12),
            pooled_projections=noise(1, 12),
            timestep=torch.tensor([0.9]),
            img_ids=image_ids(grid) if ids is None else ids,
            txt_ids=torch.zeros(5, 3),
            guidance=torch.tensor([3.5]),
            **kwargs,
        ).sample


@cache
def clear_weights(radius=4, down_factor=1):
    """CLEAR with weights that differ from the model's."""
    return seed_parameters(Clear.for_model(transformer(), radius, down_factor), 0.8)


def call(model):
    """A seeded call of any of these denoisers, with gradients."""
    if hasattr(model, "conv_in"):
        return model(noise(1, 4, 36, 44), 901, noise(1, 5, 12)).sample
    text = {"encoder_hidden_states": noise(2, 5, model.config.joint_attention_dim)}
    text["pooled_projections"] = noise(2, model.config.pooled_projection_dim)
    if hasattr(model, "pos_embed") and hasattr(model, "single_transformer_blocks"):
        text |= {"img_ids": image_ids((12, 10)), "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.5, 3.5])}
        return model(noise(2, 120, 16), timestep=torch.tensor([0.901, 0.901]), **text).sample
    return model(noise(2, 4, 24, 20), timestep=torch.tensor([901.0, 901.0]), **text).sample


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(size=128, mode="RGB"):
    return Image.effect_mandelbrot((size, size), (-2, -1.5, 1, 1.5), 20).convert(mode)


T2I_ADAPTERS = {
    sd: ("full_adapter", [8, 16, 24, 32], 4, diffusers.StableDiffusionAdapterPipeline),
    sdxl: ("full_adapter_xl", [8, 16, 24, 24], 8, diffusers.StableDiffusionXLAdapterPipeline),
}


def with_t2i_adapter(make):
    kind, channels, factor, cls = T2I_ADAPTERS[make]
    adapter = diffusers.T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
    accepted = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in make().components.items() if name in accepted}
    extra = {"requires_safety_checker": False} if make is sd else {}
    return quiet(cls(**parts, adapter=seed_parameters(adapter.eval()), **extra))


def trace_of(model):
    """Everything about a module tree that enabling could leave a mark on."""
    trace = {}
    for name, module in model.named_modules():
        trace[name] = (
            sorted(vars(module)),
            tuple(id(hook) for hook in module._forward_pre_hooks.values()),
            tuple(id(hook) for hook in module._forward_hooks.values()),
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_always_called,
            id(getattr(module, "processor", None)),
            module.__class__,
            getattr(module, "num_upsamplers", None),
        )
    return copy.copy(trace), list(model.state_dict())


def clip(folder):
    """Write a tiny CLIP model with its processor; returns the folder's name."""
    from transformers import CLIPImageProcessorPil  # older releases have none

    tokenizer = build_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.eos_token_id - 1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**layers, **text}, vision_config={**layers, **vision}, projection_dim=12)
    seed_parameters(CLIPModel(config)).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square), tokenizer).save_pretrained(
        folder
    )
    return str(folder)
