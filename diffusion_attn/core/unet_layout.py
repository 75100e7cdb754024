"""How a Stable Diffusion UNet is laid out, and how large each of its feature maps is in a given call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """``(height, width)`` of the feature maps of one call, as `trace_sizes` finds them.

    Attributes:
        skips: of each skip connection, in the order in which the down path records them.
        mid: of the middle block.
        adapters: of the place in each down block where a T2I-Adapter's feature is added.
        grids: of the token grid of each transformer, by module name.
        upsampled: of what each upsampler has to deliver, by module name.
        restored: of what the pooled pair has to be restored to, where one is pooled.
    """

    skips: tuple[Size, ...]
    mid: Size
    adapters: tuple[Size, ...]
    grids: dict[str, Size] = field(default_factory=dict)
    upsampled: dict[str, Size] = field(default_factory=dict)
    restored: Size = (0, 0)


def attention_levels(unet: Any) -> list[int]:
    """The indices of the down blocks that have transformers."""
    return [index for index, block in enumerate(unet.down_blocks) if getattr(block, "attentions", None)]


def mirror(unet: Any, level: int) -> int:
    """The index of the up block that works at the resolution of down block ``level``."""
    return len(unet.up_blocks) - 1 - level


def self_attentions(unet: Any, level: int) -> Iterator[tuple[str, str, nn.Module]]:
    """``(transformer name, block name, attn1)`` for each transformer block of a level, in execution order."""
    for side in (f"down_blocks.{level}", f"up_blocks.{mirror(unet, level)}"):
        for index, transformer in enumerate(unet.get_submodule(side).attentions):
            name = f"{side}.attentions.{index}"
            for depth, block in enumerate(transformer.transformer_blocks):
                yield name, f"{name}.transformer_blocks.{depth}", block.attn1


def transformers(unet: Any) -> Iterator[tuple[str, int, nn.Module]]:
    """``(name, factor, transformer)`` of each transformer: down blocks, middle, up blocks, as they are executed.

    ``factor`` is by how much the UNet has reduced each side where the transformer works.
    """
    last = len(unet.down_blocks) - 1
    levels = {f"down_blocks.{index}": index for index in range(last + 1)}
    levels |= {"mid_block": last} | {f"up_blocks.{index}": mirror(unet, index) for index in range(last + 1)}
    for side, level in levels.items():
        part = getattr(unet, side) if side == "mid_block" else unet.get_submodule(side)
        for index, transformer in enumerate(getattr(part, "attentions", None) or ()):
            if hasattr(transformer, "transformer_blocks"):
                yield f"{side}.attentions.{index}", 2**level, transformer


def spatial_self_attentions(unet: Any) -> Iterator[tuple[str, nn.Module]]:
    """``(name, attn1)`` of every transformer block of the UNet: down blocks, up blocks, then the middle.

    Motion modules, which attend over time, are not among them, nor are blocks that attend to the prompt only.
    """
    sides = {f"down_blocks.{index}": block for index, block in enumerate(unet.down_blocks)}
    sides |= {f"up_blocks.{index}": block for index, block in enumerate(unet.up_blocks)}
    for side, part in {**sides, "mid_block": unet.mid_block}.items():
        for index, transformer in enumerate(getattr(part, "attentions", None) or ()):
            for depth, block in enumerate(getattr(transformer, "transformer_blocks", ())):
                if not block.only_cross_attention:
                    yield f"{side}.attentions.{index}.transformer_blocks.{depth}.attn1", block.attn1


def trace_sizes(unet: Any, size: Size, dilated: int | None = None, pooled: int | None = None) -> Sizes:
    """Walk the UNet's levels without computing anything.

    Args:
        unet: a ``UNet2DConditionModel`` with down and up blocks that mirror each other.
        size: ``(height, width)`` of the input in latent cells.
        dilated: level whose downsampler runs with twice its stride.
        pooled: level that is pooled after its first pair and restored before the last pair of its mirror.
    """
    skips, adapters = [size], []
    grids: dict[str, Size] = {}
    upsampled: dict[str, Size] = {}
    restored = (0, 0)
    for level, block in enumerate(unet.down_blocks):
        has_attention = bool(getattr(block, "attentions", None))
        for pair in range(len(block.resnets)):
            if has_attention:
                grids[f"down_blocks.{level}.attentions.{pair}"] = size
            if level == pooled and pair == 0:
                restored, size = size, halve(size)
            skips.append(size)
        before = size
        if block.downsamplers is not None:
            size = halve(halve(size)) if level == dilated else halve(size)
            skips.append(size)
        adapters.append(before if has_attention else size)
    mid = size
    left = list(skips)
    for level, block in enumerate(unet.up_blocks):
        pairs = len(block.resnets)
        for pair in range(pairs):
            if getattr(block, "attentions", None):
                grids[f"up_blocks.{level}.attentions.{pair}"] = size
            if pooled is not None and level == mirror(unet, pooled) and pair == pairs - 2:
                size = restored
        del left[-pairs:]
        if block.upsamplers is not None:
            size = upsampled[f"up_blocks.{level}.upsamplers.0"] = left[-1]
    return Sizes(tuple(skips), mid, tuple(adapters), grids, upsampled, restored)


def halve(size: Size) -> Size:
    """What a stride of two leaves: half of each side, rounded up."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2
