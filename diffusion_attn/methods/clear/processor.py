"""The processor of a CLEAR layer: local attention, with the layer's own projections if there are any."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_attn.core.errors import DiffusionAttnError, GridError, UnsupportedModelError
from diffusion_attn.methods.clear.layers import ClearLayer
from diffusion_attn.methods.clear.rule import Rule
from diffusion_attn.methods.clear.tokens import Tokens
from diffusion_attn.methods.stand_in import StandIn
from diffusion_attn.ops.local_attention import local_attention
from diffusion_attn.ops.local_rule import Disc
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
        rule, now = self.rule, local_tokens
        assert rule is not None and now is not None
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
        image = now.grid[0] * now.grid[1]
        text = now.text if query.shape[1] != image else 0
        if query.shape[1] != text + image:
            raise GridError(
                f"the layer has {query.shape[1]} tokens, and the call has {now.text} of text and a grid of "
                f"{now.grid[0]} x {now.grid[1]}; pass txt_ids and img_ids of all tokens, or disable Clear."
            )
        scale = rule.scale(query.shape[-1], text + image)
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
        if now.cells is None:
            return None, None
        index = (now.cells + text).flatten()
        in_cells = (x.index_select(2, index).unflatten(2, now.cells.shape) for x in (key, value))
        if self.layer is None:
            pooled_key, pooled_value = (x.mean(dim=3) for x in in_cells)
        else:
            weight = self.ready(key).spatial_weight.flatten().to(key.dtype)
            pooled_key, pooled_value = (torch.einsum("bhcwd,w->bhcd", x, weight) for x in in_cells)
        return pooled_key, pooled_value
