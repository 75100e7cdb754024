"""The attention layers of a denoiser, as editing speaks of them: by kind, place and resolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from diffusion_attn.core.errors import GridError
from diffusion_attn.core.joint_layout import attentions
from diffusion_attn.core.unet_layout import Size, halve, transformers

Kind = Literal["cross", "self", "image", "joint"]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer.

    Attributes:
        name: of the module, inside the denoiser.
        attn: the module.
        kind: what it attends to: the prompt, the picture itself, an image adapter's tokens, or prompt and picture.
        place: ``"down"``, ``"mid"``, ``"up"``, or ``"joint"`` in transformers.
        factor: by how much each side is smaller than the latent's.
    """

    name: str
    attn: Any
    kind: Kind
    place: str
    factor: int


def attention_layers(denoiser: nn.Module) -> Iterator[AttentionLayer]:
    """The layers of a UNet's transformers as they are executed, or those of FLUX and SD3 that text takes part in."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    if not hasattr(denoiser, "down_blocks"):
        for name, attn in attentions(denoiser):
            if not name.endswith("attn2"):
                yield AttentionLayer(name, attn, "joint", "joint", 1)
        return
    for path, factor, transformer in transformers(denoiser):
        for depth, block in enumerate(cast(Any, transformer).transformer_blocks):
            for name in ("attn1", "attn2"):
                layer = getattr(block, name, None)
                if layer is not None:
                    kind: Kind = "cross" if layer.is_cross_attention else "self"
                    full_name = f"{path}.transformer_blocks.{depth}.{name}"
                    yield AttentionLayer(full_name, layer, kind, path.split("_")[0], factor)


def reduced(size: Size, factor: int) -> Size:
    """A latent's ``(height, width)`` where each side is ``factor`` times smaller, a power of two."""
    while factor > 1:
        size, factor = halve(size), factor // 2
    return size


def size_of(latents: torch.Tensor) -> Size:
    """``(height, width)`` of latents ``(rows, C, height, width)``."""
    return latents.shape[-2], latents.shape[-1]


def map_grid(size: Size, map_size: int | Size | None) -> Size:
    """``(height, width)`` of the maps that are asked for, a quarter of the latent's ``size`` by default."""
    if map_size is None:
        return reduced(size, 4)
    return (map_size, map_size) if isinstance(map_size, int) else (map_size[0], map_size[1])


def grid_of(tokens: int, size: Size) -> Size:
    """The ``(height, width)`` of a sequence of ``tokens``, in a network that halves its input ``size``.

    Raises:
        GridError: there is no such level.
    """
    grid = size
    while grid[0] * grid[1] > tokens:
        grid = halve(grid)
    if grid[0] * grid[1] != tokens:
        raise GridError(
            f"an attention layer has {tokens} tokens, which is not a level of the latent size {size}; methods that "
            "merge tokens cannot be read or edited: disable them."
        )
    return grid
