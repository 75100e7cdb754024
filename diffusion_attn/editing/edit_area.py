"""Where a picture is edited: word maps of a run, summed over its steps and spread over what belongs together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.attention import MapRecorder
from diffusion_attn.editing.grounding import propagate, union_mask


class EditArea:
    """Grounds the words of pairs of prompts while they are drawn.

    Keeps one map for each row, of a word's attention averaged over heads and layers. Source: ViMAEdit, editing area
    grounding; arXiv 2410.10496.

    Args:
        tokens: of the words of each row, all sources, then all targets; empty for pairs that have none.
        words: ``(height, width)`` of the cross-attention that words are looked for in.
        size: ``(height, width)`` of the self-attention that they are spread by.
        gamma, iterations: as in `propagate`.

    Attributes:
        recorders: have to see the forward passes.
        maps: ``(rows, 1, height, width)`` float32, the sum of the steps so far.
    """

    def __init__(self, tokens: Sequence[list[int]], words: Size, size: Size, gamma: float, iterations: int) -> None:
        self.tokens, self.size, self.gamma, self.iterations = tokens, size, gamma, iterations
        self._words = MapRecorder("cross", words)
        self._affinity = MapRecorder("self", size) if iterations and gamma < 1 else None
        self.maps: torch.Tensor | None = None

    @property
    def recorders(self) -> list[MapRecorder]:  # noqa: D102
        return [self._words] if self._affinity is None else [self._words, self._affinity]

    def update(self) -> None:
        """Add what the recorders have seen since the last time."""
        rows = zip(self._words.take(), self.tokens, strict=True)
        maps = torch.stack([row[..., tokens].sum(-1) for row, tokens in rows])[:, None]
        maps = F.interpolate(maps, self.size)
        if self._affinity is not None:
            maps = propagate(maps, self._affinity.take().flatten(1, 2), self.gamma, self.iterations)
        self.maps = maps if self.maps is None else self.maps + maps

    def mask(self, threshold: float, size: Size) -> torch.Tensor:
        """``(pairs, 1, *size)`` bool: where the words of source or target are seen, as in `union_mask`."""
        assert self.maps is not None
        source, target = self.maps.chunk(2)
        return union_mask(source, target, threshold, size)
