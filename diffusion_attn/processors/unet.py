"""The processor of UNets: everything the stock one does, around an exchangeable attention op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusion_attn.core.errors import UnsupportedModelError

Op = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class UNetAttnProcessor:
    """Self-attention through ``op``, all other attention exact.

    Keeps the contract of diffusers' ``AttnProcessor2_0``: masks, group and spatial norm, query and key norm, residual
    and rescale options, fused projections, LoRA. Exact attention goes through diffusers' dispatcher, so that
    ``set_attention_backend`` and the ``attention_backend`` context work on UNets too.

    Args:
        op: ``op(q, k, v)`` on ``(batch, heads, tokens, head_dim)``, for example a ``functools.partial`` of
            ``diffusion_attn.ops.window_attention`` that fixes its grid. ``None`` is exact attention everywhere, which
            is what loaders that rebuild processors from their class (``load_ip_adapter``) leave: set yours after them.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, op: Op | None = None) -> None:
        self.op = op

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of ``hidden_states`` ``(batch, tokens, channels)`` or ``(batch, channels, height, width)``.

        Raises:
            UnsupportedModelError: a mask on a layer that ``op`` computes.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        size = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        if size is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        hidden_states = self.compute(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

        if size is not None:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, size)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def compute(
        self,
        attn: Any,
        hidden: torch.Tensor,
        context: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The layer between its norms and its residual, ``(batch, tokens, channels)`` to the same."""
        query, key, value = self.project(attn, hidden, context)
        out = self.attend(attn, query, key, value, attention_mask, context is not None, **kwargs)
        return self.project_out(attn, out.flatten(2, 3).to(query.dtype))

    def project(
        self, attn: Any, hidden: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each ``(batch, tokens, heads, head_dim)``; a cross-attention sees ``context``."""
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if not attn.fused_projections:
            source = hidden if context is None else context
            projected = [attn.to_q(hidden), attn.to_k(source), attn.to_v(source)]
        elif context is None:
            projected = list(attn.to_qkv(hidden).chunk(3, dim=-1))
        else:
            projected = [attn.to_q(hidden), *attn.to_kv(context).chunk(2, dim=-1)]
        head_dim = projected[1].shape[-1] // attn.heads
        query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in projected)
        # Norms over the head dimension do not mind the layout; stock code applies them head-first.
        if attn.norm_q is not None:
            query = attn.norm_q(query.transpose(1, 2)).transpose(1, 2)
        if attn.norm_k is not None:
            key = attn.norm_k(key.transpose(1, 2)).transpose(1, 2)
        return query, key, value

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
        """``(batch, tokens, heads, head_dim)`` from the same: through the op, or exact where it does not serve."""
        if self.op is not None and not cross:
            return apply_op(self.op, query, key, value, attention_mask)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], key.shape[0])
            attention_mask = attention_mask.unflatten(0, (key.shape[0], attn.heads))
        return self.attend_exactly(query, key, value, attention_mask)

    def attend_exactly(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Exact attention by the backend that is set, with a mask ``(batch, heads, 1 or tokens, keys)``."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )

    def project_out(self, attn: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output projection of ``(batch, tokens, channels)``."""
        return attn.to_out[1](attn.to_out[0](hidden))


def apply_op(
    op: Op, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """``op`` on tensors ``(batch, tokens, heads, head_dim)``.

    Raises:
        UnsupportedModelError: there is a mask.
    """
    if attention_mask is not None:
        raise UnsupportedModelError(
            "an attention mask arrived at a self-attention layer that a custom op computes, which knows no masks; drop "
            "the mask, or disable the method (or set the stock processor) on this model."
        )
    return op(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)
