"""The processor of a CLEAR layer: local attention, with the layer's own projections if there are any."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_attn.core.errors import GridError, UnsupportedModelError
from diffusion_attn.methods.clear.layers import ClearLayer
from diffusion_attn.methods.clear.tokens import TokenReader, Tokens, cells
from diffusion_attn.methods.stand_in import StandIn
from diffusion_attn.ops.local_attention import Backend, local_attention
from diffusion_attn.ops.local_rule import Disc
from diffusion_attn.processors.joint import JointAttnProcessor

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


class ClearProcessor(StandIn, JointAttnProcessor):
    """Local attention after ``rule`` over the tokens that ``reader`` has read.

    Loaders that rebuild processors from their class make one without arguments; `enable` keeps the real one in place.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        reader: TokenReader | None = None,
        layer: ClearLayer | None = None,
        pinned: bool = False,
        parked: bool = False,
    ) -> None:
        super().__init__()
        self.rule, self.reader, self.has_layer = rule, reader, layer is not None
        self.stand_in(layer, "Clear", pinned, parked)

    def project_hidden(self, attn: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value of the main stream by the layer's projections, or the model's."""
        if not self.has_layer:
            return super().project_hidden(attn, hidden)
        layer = self.ready(hidden)
        pairs = ((getattr(attn, name), getattr(layer, name)) for name in ("to_q", "to_k", "to_v"))
        return tuple(self.through(outer, own, hidden) for outer, own in pairs)

    def project_out(self, attn: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The output projection of the main stream by the layer, or the model."""
        if not self.has_layer or getattr(attn, "to_out", None) is None:
            return super().project_out(attn, hidden)
        return attn.to_out[1](self.through(attn.to_out[0], self.ready(hidden).to_out[0], hidden))

    def attend(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Local attention; exact by the backend that is set where the disc covers the image."""
        if self.rule is None or self.reader is None:
            raise UnsupportedModelError(
                "a Clear processor without its rule was called: it was made by hand or by a loader after disable(); "
                "enable Clear again, or set the stock processor."
            )
        if self._parallel_config is not None:
            raise UnsupportedModelError(
                "context parallelism gives each device a part of the tokens, and local attention needs the whole grid; "
                "disable Clear, or run the model without enable_parallelism."
            )
        if attention_mask is not None:
            raise UnsupportedModelError(
                "an attention mask arrived at a layer of local attention, which knows no masks; drop it, or disable "
                "Clear."
            )
        rule, now = self.rule, self.reader.now
        text = query.shape[1] - now.grid[0] * now.grid[1]
        if text not in (0, now.text):
            raise GridError(
                f"the layer has {query.shape[1]} tokens, and the call has {now.text} of text and a grid of "
                f"{now.grid[0]} x {now.grid[1]}; pass txt_ids and img_ids of all tokens, or disable Clear."
            )
        scale = rule.scale(query.shape[-1], query.shape[1])
        if rule.down_factor == 1 and Disc(now.grid, rule.radius).covers:
            return self.attend_exactly(query, key, value, None, scale=scale)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        pooled_key, pooled_value = self._pool(key, value, text, now)
        out = local_attention(
            query,
            key,
            value,
            grid=now.grid,
            radius=rule.radius,
            text_tokens=text,
            pooled_key=pooled_key,
            pooled_value=pooled_value,
            scale=scale,
            backend=rule.backend,
            tiled=now.tiled,
        )
        return out.transpose(1, 2)

    def _pool(
        self, key: torch.Tensor, value: torch.Tensor, text: int, now: Tokens
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weighted sums of the image's keys and values over cells, ``(batch, heads, cells, head_dim)``."""
        assert self.rule is not None
        factor = self.rule.down_factor
        if factor == 1:
            return None, None
        index = cells(now, factor, key.device) + text
        weight = key.new_full((factor * factor,), factor**-2.0)
        if self.has_layer:
            weight = self.ready(key).spatial_weight.flatten()
        in_cells = (x.index_select(2, index.flatten()).unflatten(2, index.shape) for x in (key, value))
        pooled_key, pooled_value = (torch.einsum("bhcwd,w->bhcd", x, weight.to(x.dtype)) for x in in_cells)
        return pooled_key, pooled_value
