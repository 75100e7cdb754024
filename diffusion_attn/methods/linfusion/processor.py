"""The processor of a LinFusion layer: the layer's own projections around linear attention."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_attn.methods.linfusion.layers import LinFusionLayer
from diffusion_attn.methods.stand_in import StandIn
from diffusion_attn.ops.linear_attention import linear_attention
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

    def __init__(self, layer: LinFusionLayer | None = None, pinned: bool = False, parked: bool = False) -> None:
        super().__init__(linear_attention)
        self.stand_in(layer, "LinFusion", pinned, parked)

    def project(
        self, attn: Any, hidden: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each ``(batch, tokens, heads, head_dim)``: ``W(x + P(x))``, the value without ``P``."""
        layer = self.ready(hidden)
        source = hidden if context is None else context
        query = self.through(attn.to_q, layer.to_q, hidden + layer.to_q_(hidden))
        key = self.through(attn.to_k, layer.to_k, source + layer.to_k_(source))
        value = self.through(attn.to_v, layer.to_v, source)
        split = (attn.heads, -1)
        return query.unflatten(-1, split), key.unflatten(-1, split), value.unflatten(-1, split)

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
