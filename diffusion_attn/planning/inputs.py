"""What a denoiser is called with in one step of a run: everything on the meta device but what code has to read."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.session import FLUX_UNIT
from diffusion_attn.core.unet_layout import trace_sizes, transformers

Size = tuple[int, int]


def call_of(denoiser: Any, size: Size, batch: int, text_tokens: int, timestep: float) -> dict[str, Any]:
    """The arguments of one forward pass.

    Args:
        denoiser: on the meta device.
        size: ``(height, width)`` in latent cells.
        batch: pictures times guidance branches.
        text_tokens: of each prompt.
        timestep: as the scheduler has it, 0 to 1000.

    Raises:
        UnsupportedModelError: no model of a family that is known.
    """
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    config = denoiser.config

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(batch, *shape, device="meta", dtype=denoiser.dtype)

    if isinstance(denoiser, UNet2DConditionModel):
        added = {}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"added_cond_kwargs": {"text_embeds": empty(pooled), "time_ids": empty(6)}}
        return {
            "sample": empty(config.in_channels, *size),
            "timestep": torch.tensor(timestep),
            "encoder_hidden_states": empty(text_tokens, config.cross_attention_dim),
            **added,
        }
    if not isinstance(denoiser, (FluxTransformer2DModel, SD3Transformer2DModel)):
        raise UnsupportedModelError(
            f"the denoiser is a {type(denoiser).__name__}; plans are made for UNet2DConditionModel, "
            "FluxTransformer2DModel and SD3Transformer2DModel."
        )
    text = {
        "encoder_hidden_states": empty(text_tokens, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
    }
    if isinstance(denoiser, SD3Transformer2DModel):
        timesteps = torch.full((batch,), timestep)
        return {"hidden_states": empty(config.in_channels, *size), "timestep": timesteps, **text}
    [(height, width)] = token_grids(denoiser, size)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "hidden_states": empty(height * width, config.in_channels),
        "timestep": torch.full((batch,), timestep / FLUX_UNIT),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float(),
        "txt_ids": torch.zeros(text_tokens, 3),
        "guidance": empty() if config.guidance_embeds else None,
        **text,
    }


def token_grids(denoiser: Any, size: Size) -> list[Size]:
    """``(height, width)`` in image tokens of each level that has attention, finest first.

    Args:
        denoiser: of a family that `call_of` knows.
        size: ``(height, width)`` in latent cells.
    """
    if hasattr(denoiser, "down_blocks"):
        sizes = trace_sizes(denoiser, size)
        grids = {sizes.grids.get(name, sizes.mid) for name, _, _ in transformers(denoiser)}
        return sorted(grids, reverse=True)
    # FLUX's pipeline makes a token of two by two cells, its transformer takes tokens.
    patch = 2 if "axes_dims_rope" in denoiser.config else denoiser.config.patch_size
    return [(size[0] // patch, size[1] // patch)]
