"""Which image tokens see each other: the rule that all backends of local attention share."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
