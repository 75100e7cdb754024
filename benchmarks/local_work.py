"""The work of local attention: the pairs that the rule asks for, and those that each way to compute it visits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_attn.ops.local_flex import plan_blocks
from diffusion_attn.ops.local_rule import TILE, Disc
from diffusion_attn.ops.local_tiles import plan_tiles, window_of

FULL, DENSE, RASTER = "full SDPA", "dense mask", "flex, raster"
TILES, FLEX, SORTED = "tiles", "flex", "flex, sorted once"
VARIANTS = (FULL, DENSE, RASTER, TILES, FLEX, SORTED)
"""What is compared: full attention, which computes something else, the rule by others' means, and by ours."""

BLOCK = 128
"""Queries and keys of one block, in raster order and in ours."""


@dataclass(frozen=True)
class Case:
    """One attention call: ``text`` tokens, then a grid of image tokens; keys pooled over cells come after them.

    Attributes:
        grid: ``(height, width)`` in image tokens.
        radius: of the disc.
        text: how many tokens of text there are.
        down_factor: side of the cells that are pooled, 1 for none.
    """

    grid: tuple[int, int]
    radius: int
    text: int = 512
    down_factor: int = 1

    @property
    def tokens(self) -> int:
        """Of the image."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """Of the sequence, pooled keys not counted."""
        return self.text + self.tokens

    @property
    def pooled(self) -> int:
        """How many pooled keys there are."""
        return math.prod(side // self.down_factor for side in self.grid) if self.down_factor > 1 else 0

    @property
    def disc(self) -> Disc:
        """The rule among image tokens."""
        return Disc(self.grid, self.radius)


def disc_pairs(disc: Disc) -> int:
    """Pairs of image tokens that see each other."""
    (dy, count_y), (dx, count_x) = ((away := torch.arange(1 - side, side), side - away.abs()) for side in disc.grid)
    return int((disc.sees(dy[:, None], dx) * count_y[:, None] * count_x).sum())


def ideal_pairs(case: Case) -> int:
    """What the rule asks for and no exact computation can go below."""
    return case.text * case.length + case.tokens * (case.text + case.pooled) + disc_pairs(case.disc)


def visited_pairs(name: str, case: Case) -> int:
    """What one of `VARIANTS` computes, seen or masked."""
    if name == FULL:
        return case.length**2
    if name == DENSE:
        return case.length * (case.length + case.pooled)
    if name == RASTER:
        return int(raster_blocks(case)[0].sum()) * BLOCK**2
    seen, text = case.text + case.pooled, case.text * case.length
    if case.disc.covers or (name == TILES and window_of(case.disc) == case.grid):
        return text + case.tokens * (case.tokens + seen)
    if name == TILES:
        groups, *_ = plan_tiles(case.disc, torch.device("cpu"))
        return text + sum(group.queries.numel() * (seen + len(group.offsets)) for group in groups)
    return text + sum(blocks_per_query(case.disc, seen)) * math.prod(TILE) ** 2


def blocks_per_query(disc: Disc, seen: int = 0) -> list[int]:
    """Key blocks that our layout visits for each block of queries, among image tokens and ``seen`` further keys."""
    mask = plan_blocks(disc, seen, torch.device("cpu")).mask
    return (mask.kv_num_blocks + mask.full_kv_num_blocks).flatten().tolist()


def raster_blocks(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of the sequence in raster order see each other, and which see each other whole.

    The keys of one query lie in a run on each row of the grid. Runs are marked where they begin and where they have
    ended; what is visited is then the sum up to a block. It never takes tokens times tokens.

    Returns:
        Two tensors ``(query blocks, key blocks)``, bool.
    """
    (height, width), text, length, keys = case.grid, case.text, case.length, case.length + case.pooled
    rows, columns = -(-length // BLOCK), -(-keys // BLOCK)
    index = torch.arange(case.tokens)
    y, x = index // width, index % width
    ends = torch.zeros(rows, columns + 1, dtype=torch.int32)
    reach = min(case.radius, height) - 1
    for dy in range(-reach, reach + 1):
        half = math.isqrt(case.radius**2 - dy**2 - 1)
        inside = (y + dy >= 0) & (y + dy < height)
        row, query = (text + (y + dy) * width)[inside], (text + index)[inside] // BLOCK
        for place, mark in ((x - half).clamp(min=0), 1), ((x + half).clamp(max=width - 1), -1):
            column = (row + place[inside]) // BLOCK + (mark < 0)
            ends.index_put_((query, column), torch.tensor(mark, dtype=torch.int32), accumulate=True)
    disc = ends.cumsum(1)[:, :-1] > 0

    first_query, first_key = (torch.arange(count) * BLOCK for count in (rows, columns))
    last_query, last_key = first_query[:, None] + BLOCK - 1, first_key + BLOCK - 1
    first_query = first_query[:, None]
    visited = disc | (first_query < text) & (first_key < length) | (first_key < text)
    visited |= (last_query >= text) & (last_key >= length) & (case.pooled > 0)
    whole = (last_query < text) & (last_key < length) | (last_key < text)
    whole |= (first_query >= text) & (first_key >= length) & (last_key < keys)
    return visited, whole


def sees(case: Case) -> Callable[..., torch.Tensor]:
    """The rule on positions of the sequence, as FlexAttention asks for it: ``(batch, head, query, key)`` to bool."""
    width, text, length, square = case.grid[1], case.text, case.length, case.radius**2

    def visible(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        dy = (query - text) // width - (key - text) // width
        dx = (query - text) % width - (key - text) % width
        return (query < text) | (key < text) | (dy * dy + dx * dx < square)

    def visible_with_pooled(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.where(key < length, visible(batch, head, query, key), query >= text)

    return visible_with_pooled if case.pooled else visible


def raster_mask(case: Case, device: str) -> Any:
    """FlexAttention's block mask as the published code has it: one sequence, text and then the image row by row."""
    from torch.nn.attention.flex_attention import BlockMask

    visited, whole = raster_blocks(case)
    listed = []
    for blocks in (visited & ~whole, whole):
        counts = blocks.sum(1, dtype=torch.int32)
        order = blocks.int().argsort(dim=1, descending=True, stable=True).int()
        listed += [x[None, None].to(device) for x in (counts, order)]
    lengths = (case.length, case.length + case.pooled)
    return BlockMask.from_kv_blocks(*listed, BLOCK_SIZE=BLOCK, mask_mod=sees(case), seq_lengths=lengths)


def dense_mask(case: Case, device: str) -> torch.Tensor:
    """``(queries, keys)`` bool: who sees whom; made by stretches of queries, or the indices would outgrow it."""
    query, key = (torch.arange(count, device=device) for count in (case.length, case.length + case.pooled))
    return torch.cat([sees(case)(None, None, rows[:, None], key) for rows in query.split(1024)])
