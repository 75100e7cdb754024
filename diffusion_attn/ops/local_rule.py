"""Which image tokens see each other: the rule that all backends of local attention share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

TILE = (8, 16)
"""Rows and columns of tokens that follow each other in `tile_order`: queries, or keys, of one block of flex."""


@torch.compiler.disable
@lru_cache(maxsize=8)
@torch.inference_mode(False)  # or no gradient could ever pass through an order that was made inside it
def tile_order(grid: tuple[int, int], device: torch.device | str | None = None) -> torch.Tensor:
    """``(tokens,)`` long, the raster positions of a grid's tokens tile after tile, each tile row by row.

    Tiles at the lower and right border are cut off where the grid ends.
    """
    height, width = grid
    y, x = (index.flatten() for index in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    (rows, columns), across = TILE, -(-width // TILE[1])
    inside = y % rows * columns + x % columns
    key = (y // rows * across + x // columns) * rows * columns + inside
    return key.argsort().to(device)


def take_tokens(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The tokens ``index`` of ``(batch, heads, tokens, head_dim)``, all of them as they are for ``None``."""
    return x if index is None else x.index_select(2, index)


@dataclass(frozen=True)
class Disc:
    """A disc of ``radius`` tokens around each token of ``grid`` (height, width), without its edge."""

    grid: tuple[int, int]
    radius: int

    @property
    def covers(self) -> bool:
        """Whether every token sees every other."""
        height, width = self.grid
        return (height - 1) ** 2 + (width - 1) ** 2 < self.radius**2

    def sees(self, dy: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        """Whether tokens that are ``dy`` rows and ``dx`` columns apart see each other, bool."""
        return dy * dy + dx * dx < self.radius**2

    def mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """``(tokens, tokens)``, bool: who sees whom, in raster order."""
        height, width = self.grid
        index = torch.arange(height * width, device=device)
        y, x = index // width, index % width
        return self.sees(y[:, None] - y, x[:, None] - x)
