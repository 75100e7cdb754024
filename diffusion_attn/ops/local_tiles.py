"""Local attention tile by tile: a few queries that lie together over the keys around them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from diffusion_attn.ops.local_rule import Disc

QUERIES = (12, 16)
"""Rows and columns of the queries of one tile. From 192 queries on, torch's attention on CPUs takes 64 of them at a
time, else 32; larger tiles have more keys that most of their queries do not see."""

_ROWS_AT_ONCE = 1024
"""Queries of one call where windows are the whole grid."""

_ELEMENTS_AT_ONCE = {"cpu": 2**20, "cuda": 2**28}
"""Most numbers of gathered keys: on a CPU what a tile or two have, so that they stay in its cache."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of one shape whose keys lie around them in the same way, so that one mask serves them all.

    Attributes:
        queries: ``(tiles, queries)`` long, positions in raster order.
        starts: ``(tiles,)`` long, position of the first token of the window around each tile.
        offsets: ``(keys,)`` long, what to add to a start for the keys that any query of the tile sees.
        mask: ``(queries, keys)`` bool, or ``None`` where all is seen.
    """

    queries: torch.Tensor
    starts: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor | None


@torch.compiler.disable
@lru_cache(maxsize=32)
@torch.inference_mode(False)  # or no gradient could ever pass through a plan that was made inside it
def plan_tiles(
    disc: Disc, device: torch.device, tile: tuple[int, int] = QUERIES
) -> tuple[list[Tiles], torch.Tensor, torch.Tensor]:
    """The tiles of a grid, ``(tokens,)`` their queries in order, and ``(tokens,)`` where each token is among these."""
    (height, width), reach = disc.grid, disc.radius - 1
    window = window_of(disc, tile)
    alike: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for top in range(0, height, tile[0]):
        for left in range(0, width, tile[1]):
            shape = min(tile[0], height - top), min(tile[1], width - left)
            first = [
                max(0, min(start - reach, side - span))
                for start, side, span in zip((top, left), disc.grid, window, strict=True)
            ]
            alike[(*shape, top - first[0], left - first[1])].append((top, left))
    groups = [_group(disc, key, places, window) for key, places in alike.items()]
    order = torch.cat([group.queries.flatten() for group in groups])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    moved = [
        Tiles(
            group.queries.to(device),
            group.starts.to(device),
            group.offsets.to(device),
            None if group.mask is None else group.mask.to(device),
        )
        for group in groups
    ]
    return moved, order.to(device), place.to(device)


def _group(disc: Disc, key: tuple[int, ...], places: list[tuple[int, int]], window: tuple[int, ...]) -> Tiles:
    rows, columns, down, right = key  # the tile's shape, and where it is in its window
    width = disc.grid[1]
    y, x = _lattice(rows, columns)
    key_y, key_x = _lattice(*window)
    mask = disc.sees((y + down)[:, None] - key_y, (x + right)[:, None] - key_x)
    kept = mask.any(dim=0)  # the corners of the window are out of reach
    starts = torch.tensor([top * width + left for top, left in places])
    return Tiles(
        starts[:, None] + y * width + x,
        starts - (down * width + right),
        (key_y * width + key_x)[kept],
        None if mask[:, kept].all() else mask[:, kept],
    )


def _lattice(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.arange(rows * columns)
    return index // columns, index % columns


def attend_tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: int, disc: Disc, scale: float | None = None
) -> torch.Tensor:
    """Attention of image queries over keys that all of them see, and over the image keys of their disc.

    Args:
        q: ``(batch, heads, height * width, head_dim)`` in raster order.
        k, v: ``(batch, heads, seen + height * width, head_dim)``: what all see, then the image's in raster order.
        seen: how many keys all see.
        disc: the rule.
        scale: of the scores; by default ``head_dim ** -0.5``.

    Returns:
        As ``q``.
    """
    attend = _attend_recomputed if torch.is_grad_enabled() else _attend
    if window_of(disc) == disc.grid:
        rows = torch.arange(q.shape[2], device=q.device).split(_ROWS_AT_ONCE)
        return torch.cat([attend(_rows, q, k, v, index, disc, scale) for index in rows], dim=2)
    groups, order, place = plan_tiles(disc, q.device)
    q, k, v = q.index_select(2, order), k.contiguous(), v.contiguous()
    budget = _ELEMENTS_AT_ONCE.get(q.device.type, _ELEMENTS_AT_ONCE["cpu"])
    if torch.is_grad_enabled():
        budget *= 4  # each call's backward pass makes a gradient of all keys
    parts, start = [], 0
    for group in groups:
        offsets = F.pad(group.offsets + seen, (seen, 0))
        bias = None if group.mask is None else F.pad(group.mask, (seen, 0), value=True)
        if bias is not None and not torch.is_grad_enabled():  # else it would be kept, at four times the size
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -math.inf)  # once for several calls
        count = max(1, budget // (k[:, :, 0].numel() * len(offsets)))
        for starts in group.starts.split(count):
            keys = starts[:, None] + offsets
            keys[:, :seen] = torch.arange(seen, device=q.device)
            end = start + len(starts) * group.queries.shape[1]
            parts.append(attend(_tiles, q[:, :, start:end], k, v, keys, bias, scale))
            start = end
    return torch.cat(parts, dim=2).index_select(2, place)


def _attend(attend: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return attend(*args)


def _attend_recomputed(attend: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Without keeping what was gathered for the backward pass: that is many times the keys and values themselves."""
    return cast(torch.Tensor, checkpoint(attend, *args, use_reentrant=False))


def _tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """The queries of a few tiles, one after the other; ``keys``, ``(tiles, tokens)``, are the positions in ``k``."""
    tiled = q.unflatten(2, (len(keys), -1)).flatten(0, 1)
    out = F.scaled_dot_product_attention(tiled, _gather(k, keys), _gather(v, keys), attn_mask=bias, scale=scale)
    return out.flatten(1, 2).unflatten(0, q.shape[:2])


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, disc: Disc, scale: float | None
) -> torch.Tensor:
    """Queries ``index`` where every tile's window is the whole grid: nothing to gather, and a mask of their own."""
    height, width = disc.grid
    dy = index[:, None] // width - torch.arange(height, device=q.device)
    dx = index[:, None] % width - torch.arange(width, device=q.device)
    mask = disc.sees(dy[:, :, None].int(), dx[:, None, :].int()).flatten(1)
    mask = F.pad(mask, (k.shape[2] - height * width, 0), value=True)
    return F.scaled_dot_product_attention(q[:, :, index], k, v, attn_mask=mask, scale=scale)


def window_of(disc: Disc, tile: tuple[int, int] = QUERIES) -> tuple[int, int]:
    """Height and width of the window of keys around a tile, in tokens."""
    height, width = (min(side, span + 2 * (disc.radius - 1)) for side, span in zip(disc.grid, tile, strict=True))
    return height, width


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``(batch * heads, tiles, tokens, head_dim)`` of the tokens ``index``, ``(tiles, tokens)``.

    Rows of a matrix are copied about twice as fast as slices of the third dimension.
    """
    first = torch.arange(0, x[..., 0].numel(), x.shape[2], device=x.device)
    rows = first[:, None, None] + index
    return x.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, rows.shape)
