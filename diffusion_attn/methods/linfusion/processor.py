"""The processor of a LinFusion layer: the layer's own projections around linear attention."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_attn.methods.linfusion.layers import LinFusionLayer
from diffusion_attn.methods.stand_in import StandIn
from diffusion_attn.ops.linear_attention import attend_to_state, linear_attention, state_of
from diffusion_attn.processors.unet import UNetAttnProcessor, apply_op


class LinFusionProcessor(StandIn, UNetAttnProcessor):
    """Linear attention with the weights of ``layer``; group norm, residual and rescaling are the attention module's.

    The module's own projections are left alone, except that a LoRA around one of them adds to the layer's result (see
    `stand_in`). ``layer=None`` is what loaders make that rebuild processors from their class; `enable` keeps the real
    one in place.

    Args:
        layer: the weights.
        pinned: keep their dtype, whatever the UNet's is; else they follow it.
        parked: the module's own projections are not where the model is.
    """

    whole = 2**16
    """Tokens that are projected at a time: many enough that more at once would save no time."""

    def __init__(self, layer: LinFusionLayer | None = None, pinned: bool = False, parked: bool = False) -> None:
        super().__init__(linear_attention)
        self.stand_in(layer, "LinFusion", pinned, parked)

    def compute(
        self,
        attn: Any,
        hidden: torch.Tensor,
        context: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in `UNetAttnProcessor`; large pictures are never whole in queries, keys or values."""
        large = hidden.shape[1] > self.whole and context is None and attention_mask is None
        if not large or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().compute(attn, hidden, context, attention_mask, **kwargs)
        state: Any = 0
        for part in hidden.split(self.whole, dim=1):
            key, value = (x.transpose(1, 2) for x in self.keys_and_values(attn, part))
            state = state + state_of(key, value) * (part.shape[1] / hidden.shape[1])
        out = torch.empty_like(hidden)
        for part, place in zip(hidden.split(self.whole, dim=1), out.split(self.whole, dim=1), strict=True):
            attended = attend_to_state(self.queries(attn, part).transpose(1, 2), state).transpose(1, 2)
            place.copy_(self.project_out(attn, attended.flatten(2, 3)))
        return out

    def project(
        self, attn: Any, hidden: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each ``(batch, tokens, heads, head_dim)``."""
        return self.queries(attn, hidden), *self.keys_and_values(attn, hidden if context is None else context)

    def queries(self, attn: Any, hidden: torch.Tensor) -> torch.Tensor:
        """``W(x + P(x))`` as ``(batch, tokens, heads, head_dim)``."""
        layer = self.ready(hidden)
        return self.through(attn.to_q, layer.to_q, hidden + layer.to_q_(hidden)).unflatten(-1, (attn.heads, -1))

    def keys_and_values(self, attn: Any, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``W(x + P(x))`` and ``W(x)``, as the queries."""
        layer = self.ready(source)
        key = self.through(attn.to_k, layer.to_k, source + layer.to_k_(source))
        value = self.through(attn.to_v, layer.to_v, source)
        return key.unflatten(-1, (attn.heads, -1)), value.unflatten(-1, (attn.heads, -1))

    def attend(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cross: bool,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Linear attention, whatever sequence the keys come from."""
        return apply_op(linear_attention, query, key, value, attention_mask)

    def project_out(self, attn: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output projection."""
        own = self.ready(hidden).to_out[0]
        return attn.to_out[1](self.through(attn.to_out[0], own, hidden))
