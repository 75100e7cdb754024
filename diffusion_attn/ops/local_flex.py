"""Local attention by compiled FlexAttention: tokens in tiles, and a block mask that is made from geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.ops.local_rule import TILE, Disc, take_tokens, tile_order

_FAR = 2**14  # rows that a slot without a token is away
_LIMITS = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")  # what torch raises, the second in older versions


@dataclass(frozen=True)
class Layout:
    """Where tokens go, and which blocks see each other.

    Attributes:
        order: ``(slots,)`` long, the image token in each slot, tile after tile; slots without one repeat token 0.
            ``None`` where tokens come in that order and fill all slots.
        place: ``(tokens,)`` long, the slot of each image token, or ``None`` as ``order``.
        seen: keys that all queries see, after the slots, filled up to whole blocks.
        mask: FlexAttention's block mask.
    """

    order: torch.Tensor | None
    place: torch.Tensor | None
    seen: int
    mask: Any


def attend_flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: int,
    disc: Disc,
    scale: float | None = None,
    tiled: bool = False,
) -> torch.Tensor:
    """Attention of image queries over keys that all of them see, and over the image keys of their disc.

    Args:
        q: ``(batch, heads, height * width, head_dim)`` in raster order, or in `tile_order`.
        k, v: ``(batch, heads, seen + height * width, head_dim)``: what all see, then the image's in the order of ``q``.
        seen: how many keys all see.
        disc: the rule.
        scale: of the scores; by default ``head_dim ** -0.5``.
        tiled: the image tokens come in `tile_order`.

    Returns:
        As ``q``.

    Raises:
        RuntimeError: gradients on a CPU, which has none of it.
        DiffusionAttnError: it has been compiled as often as torch allows.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError("backend='flex' has no gradients on a CPU; use backend='tiles', which does the same.")
    layout = plan_blocks(disc, seen, q.device, tiled)
    fill = (0, 0, 0, layout.seen - seen)
    keys, values = (
        torch.cat([take_tokens(x[:, :, seen:], layout.order), F.pad(x[:, :, :seen], fill)], dim=2) for x in (k, v)
    )
    try:
        out = _compiled()(take_tokens(q, layout.order), keys, values, layout.mask, scale)
    except Exception as error:
        if type(error).__name__ not in _LIMITS:
            raise
        raise DiffusionAttnError(
            "torch compiles backend='flex' for no more sizes, lengths of text and batches in this process than it has "
            "been; use backend='tiles', or call torch.compiler.reset() to begin again."
        ) from error
    return take_tokens(out, layout.place)


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    """One function for all layers; it is compiled again for other shapes, scales and dtypes.

    In full: past dynamo's limit of recompilations it raises rather than computing all pairs. Eight, the usual limit,
    are used up by a few sizes of pictures and lengths of prompts.
    """
    many: Any = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float | None) -> torch.Tensor:
        return cast(torch.Tensor, flex_attention(q, k, v, block_mask=mask, scale=scale))

    return torch.compile(attend, dynamic=False, fullgraph=True, **many)


@torch.compiler.disable
@lru_cache(maxsize=4)
@torch.inference_mode(False)  # or no gradient could ever pass through a layout that was made inside it
def plan_blocks(disc: Disc, seen: int, device: torch.device, tiled: bool = False) -> Layout:
    """The layout of a grid with ``seen`` keys for everybody; never looks at pairs of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    (height, width), (rows, columns) = disc.grid, TILE
    down, across = -(-height // rows), -(-width // columns)
    lattice = (
        torch.arange(down * rows * across * columns).reshape(down, rows, across, columns).transpose(1, 2).flatten()
    )
    y, x = lattice // (across * columns), lattice % (across * columns)
    real = (y < height) & (x < width)
    index = torch.arange(height * width)  # of each raster position among the tokens
    if tiled:
        index = tile_order(disc.grid).argsort()
    order = torch.where(real, index[torch.where(real, y * width + x, 0)], 0)
    place = torch.empty_like(index)
    place[order[real]] = torch.nonzero(real)[:, 0]
    sorted_already = tiled and bool(real.all())

    block = rows * columns
    padded = -(-seen // block) * block
    visited, full = visited_blocks(disc, down, across)
    in_reach = torch.arange(padded).reshape(-1, block) < seen
    whole = torch.ones(len(visited), 1, dtype=torch.bool)
    visited = torch.cat([visited, whole & in_reach.any(1)], dim=1)
    full = torch.cat([full, whole & in_reach.all(1)], dim=1)

    key_y = torch.cat([torch.where(real, y, _FAR), torch.full((padded,), _FAR)]).to(device, torch.int32)
    key_x = torch.cat([x, torch.zeros(padded, dtype=torch.long)]).to(device, torch.int32)
    query_y, query_x = y.to(device, torch.int32), x.to(device, torch.int32)
    everybody = torch.cat([torch.zeros(len(y), dtype=torch.bool), in_reach.flatten()]).to(device)
    square = torch.tensor(disc.radius**2, dtype=torch.int32, device=device)

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        dy, dx = query_y[query] - key_y[key], query_x[query] - key_x[key]
        return everybody[key] | (dy * dy + dx * dx < square)

    partial_blocks, full_blocks = (_as_blocks(x.to(device)) for x in (visited & ~full, full))
    lengths = (len(y), len(y) + padded)
    mask = BlockMask.from_kv_blocks(
        *partial_blocks, *full_blocks, BLOCK_SIZE=(block, block), mask_mod=sees, seq_lengths=lengths
    )
    if sorted_already:
        return Layout(None, None, padded, mask)
    return Layout(order.to(device), place.to(device), padded, mask)


def visited_blocks(disc: Disc, down: int, across: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles any query of a tile sees, and which all of them see whole: ``(query tiles, key tiles)`` bool.

    Args:
        disc: the rule.
        down, across: numbers of tiles, which may go beyond the grid.
    """
    axes = []
    for count, span, side in zip((down, across), TILE, disc.grid, strict=True):
        keys = torch.arange(0, count * span, span)
        starts = keys[:, None]
        last_query, last_key = starts + span - 1, (keys + span - 1).clamp(max=side - 1)
        gap = torch.maximum(keys - last_query, starts - last_key).clamp(min=0)
        farthest = torch.maximum(last_key - starts, last_query - keys)
        there = (keys < side).expand_as(gap)
        axes.append((gap, farthest, there, (keys + span <= side).expand_as(gap)))
    (gap_y, far_y, there_y, whole_y), (gap_x, far_x, there_x, whole_x) = axes

    def pair(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of tiles against columns of tiles."""
        return one[:, None, :, None], other[None, :, None, :]

    exists, is_whole = pair(there_y, there_x), pair(whole_y, whole_x)
    visited = disc.sees(*pair(gap_y, gap_x)) & exists[0] & exists[1]
    full = visited & disc.sees(*pair(far_y, far_x)) & is_whole[0] & is_whole[1]
    return visited.flatten(2).flatten(0, 1), full.flatten(2).flatten(0, 1)


def _as_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(query blocks, key blocks)`` bool as FlexAttention's counts and indices, for one batch and head."""
    counts = blocks.sum(dim=1, dtype=torch.int32)
    indices = torch.argsort(blocks.int(), dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]
