"""The processor of a CLEAR layer: local attention, with the layer's own projections if there are any."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_attn.core.errors import DiffusionAttnError, UnsupportedModelError
from diffusion_attn.methods.clear.attention import attend_as_one_operation, attend_tokens
from diffusion_attn.methods.clear.layers import ClearLayer
from diffusion_attn.methods.clear.rule import Rule
from diffusion_attn.methods.clear.tokens import Tokens
from diffusion_attn.methods.stand_in import StandIn
from diffusion_attn.processors.joint import JointAttnProcessor


class ClearProcessor(StandIn, JointAttnProcessor):
    """Local attention after ``rule`` over the tokens that come with the call (`tokens.hand_on`).

    Loaders that rebuild processors from their class make one without arguments; `enable` keeps the real one in place.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        layer: ClearLayer | None = None,
        pinned: bool = False,
        parked: bool = False,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.stand_in(layer, "Clear", pinned, parked)

    def __call__(
        self, attn: Any, *args: Any, local_tokens: Tokens | None = None, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the stock processors, with what a `TokenReader` has read.

        Raises:
            DiffusionAttnError: there are no tokens, or the processor is no longer in force.
        """
        if self.rule is None:
            raise UnsupportedModelError(
                "a Clear processor without its rule was called: it was made by hand or by a loader, or kept after "
                "disable(); enable Clear again, or set the stock processor."
            )
        if local_tokens is None:
            raise DiffusionAttnError(
                "a part of the transformer was called on its own while Clear is enabled on the whole; call the "
                "transformer itself, or disable Clear first."
            )
        return super().__call__(attn, *args, local_tokens=local_tokens, **kwargs)

    def forget(self) -> None:
        """Let go of layer and rule: who still holds this processor after `disable` must not compute with it."""
        super().forget()
        self.rule = None

    def project_hidden(self, attn: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value of the main stream by the layer's projections, or the model's."""
        if self.layer is None:
            return super().project_hidden(attn, hidden)
        layer = self.ready(hidden)
        pairs = ((getattr(attn, name), getattr(layer, name)) for name in ("to_q", "to_k", "to_v"))
        return tuple(self.through(outer, own, hidden) for outer, own in pairs)

    def project_out(self, attn: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The output projection of the main stream by the layer, or the model."""
        if self.layer is None or getattr(attn, "to_out", None) is None:
            return super().project_out(attn, hidden)
        return attn.to_out[1](self.through(attn.to_out[0], self.ready(hidden).to_out[0], hidden))

    def attend(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        local_tokens: Tokens | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Local attention; exact by the backend that is set where the disc covers the image."""
        rule = self.rule
        assert rule is not None and local_tokens is not None
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
        weight = self.ready(key).spatial_weight if self.layer is not None and rule.down_factor > 1 else None
        opaque = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        attend = attend_as_one_operation if opaque else attend_tokens
        return attend(query, key, value, local_tokens, rule, weight, self._attention_backend)
