"""What a `Clear` says about attention, and the scale of its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusion_attn.ops.local_attention import Backend

TRAINED_TOKENS = 64 * 64 + 512
"""The length of FLUX's training sequences, to which the proportional scale is relative."""

POOLED_LENGTH_FACTOR = 10
"""The official pooled processor takes the sequence for ten times as long in the proportional scale."""


@dataclass(frozen=True)
class Rule:
    """What `Clear` says about attention; see there."""

    radius: int
    down_factor: int
    proportional: bool
    backend: Backend

    def scale(self, head_dim: int, tokens: int) -> float:
        """Of the scores of a sequence of ``tokens``, pooled ones not counted."""
        if not self.proportional:
            return head_dim**-0.5
        length = tokens * (POOLED_LENGTH_FACTOR if self.down_factor > 1 else 1)
        return math.sqrt(math.log(length, TRAINED_TOKENS) / head_dim)
