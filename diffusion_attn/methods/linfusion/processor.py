"""The processor of a LinFusion layer: the layer's own projections around linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.methods.linfusion.layers import LinFusionLayer, base_layer
from diffusion_attn.ops.linear_attention import linear_attention
from diffusion_attn.processors.unet import UNetAttnProcessor, apply_op


class LinFusionProcessor(UNetAttnProcessor):
    """Linear attention with the weights of ``layer``; group norm, residual and rescaling are the attention module's.

    The module's own projections are left alone, except that a LoRA around one of them adds to the layer's result (see
    `Substitute`). ``layer=None`` is what loaders make that rebuild processors from their class; `enable` keeps the real
    one in place.

    Args:
        layer: the weights.
        pinned: keep their dtype, whatever the UNet's is; else they follow it.
        parked: the module's own projections are on the CPU.
    """

    def __init__(self, layer: LinFusionLayer | None = None, pinned: bool = False, parked: bool = False) -> None:
        super().__init__(linear_attention)
        self.layer, self.pinned, self.parked = layer, pinned, parked

    def forget(self) -> None:
        """Let go of the layer: who still holds this processor after `disable` must not compute with it."""
        self.layer = None

    def project(
        self, attn: Any, hidden: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each ``(batch, tokens, heads, head_dim)``: ``W(x + P(x))``, the value without ``P``."""
        layer = self._ready(hidden)
        source = hidden if context is None else context
        query = self._through(attn.to_q, layer.to_q, hidden + layer.to_q_(hidden))
        key = self._through(attn.to_k, layer.to_k, source + layer.to_k_(source))
        value = self._through(attn.to_v, layer.to_v, source)
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
    ) -> torch.Tensor:
        """Linear attention, whatever sequence the keys come from."""
        return apply_op(linear_attention, query, key, value, attention_mask)

    def project_out(self, attn: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output projection."""
        own = self._ready(hidden).to_out[0]
        return attn.to_out[1](self._through(attn.to_out[0], own, hidden))  # type: ignore[arg-type]

    def _ready(self, hidden: torch.Tensor) -> LinFusionLayer:
        """The layer, where and as its input is: offloading moves the UNet without asking, and so may the user."""
        if self.layer is None:
            raise UnsupportedModelError(
                "a LinFusion processor without its layer was called: it was made by hand or by a loader after "
                "disable(); enable LinFusion again, or set the stock processor."
            )
        weight = self.layer.to_q.weight
        if weight.device != hidden.device:
            self.layer.to(hidden.device)
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            if self.pinned:
                raise UnsupportedModelError(
                    f"LinFusion's weights are pinned to {weight.dtype}, and the UNet runs in {hidden.dtype} without "
                    "autocast; run it under torch.autocast, or leave LinFusion's dtype to the UNet."
                )
            self.layer.to(hidden.dtype)
        return self.layer

    def _through(self, outer: nn.Module, own: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """``own(x)``, plus what a LoRA around the base model's projection adds to it."""
        if base_layer(outer) is outer:
            return own(x)
        check_adapter(outer)
        if self.parked and base_layer(outer).weight.device.type not in (x.device.type, "meta"):
            raise UnsupportedModelError(
                "a LoRA runs the base model's projections, and base_weights='cpu' keeps them off the device; enable "
                "LinFusion with base_weights='device'."
            )
        return outer(x)


def check_adapter(outer: Any) -> None:
    """Make sure that a LoRA around a projection only adds to its result.

    Raises:
        UnsupportedModelError: it is fused, or a DoRA.
    """
    if getattr(outer, "merged", False):
        raise UnsupportedModelError(
            "a LoRA is fused into projections that LinFusion brings its own weights for, where it has no effect; call "
            "pipe.unfuse_lora() and leave it unfused, or disable LinFusion."
        )
    if any(getattr(outer, "use_dora", {}).values()):
        raise UnsupportedModelError(
            "a DoRA adapter scales the base weights, which LinFusion replaces; use a plain LoRA, or disable LinFusion."
        )


class Substitute:
    """Forward hook on a base projection: inside a LoRA's wrapper the base result is the layer's own."""

    def __init__(self, own: nn.Linear) -> None:
        self.own = own

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """The layer's result in place of the base model's."""
        return self.own(args[0])
