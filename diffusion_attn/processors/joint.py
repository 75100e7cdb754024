"""The processor of FLUX and Stable Diffusion 3: text and image in one sequence, around an exchangeable attention op."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.processors.unet import Op, apply_op


class JointAttnProcessor:
    """Attention over text and image tokens together through ``op``.

    Keeps the contract of diffusers' ``FluxAttnProcessor`` (double and single blocks) and ``JointAttnProcessor2_0`` (the
    joint layers of SD3, and the layers of SD3.5 that see the image alone): query and key norm, rotary embedding, fused
    projections, LoRA. Without an op attention is exact and goes through diffusers' dispatcher, so that
    ``set_attention_backend`` is in force.

    Args:
        op: ``op(q, k, v)`` on ``(batch, heads, tokens, head_dim)``, text tokens first, for example a
            ``functools.partial`` of ``diffusion_attn.ops.local_attention`` that fixes its grid and text length.
            ``None`` is exact attention, which is what loaders that rebuild processors from their class leave: set
            yours after them.
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
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of ``hidden_states`` ``(batch, tokens, channels)``, with text in ``encoder_hidden_states`` or none.

        A FLUX single block gives both in ``hidden_states``, text first, and has no output projection here.

        Returns:
            The image's, and the text's where it came apart.

        Raises:
            UnsupportedModelError: a mask on a layer that ``op`` computes, or context parallelism, which splits tokens.
        """
        query, key, value = self.project(attn, hidden_states, encoder_hidden_states)
        query, key = self.rotate(query, key, image_rotary_emb, **kwargs)
        out = self.attend(attn, query, key, value, attention_mask, **kwargs).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return self.project_out(attn, out)
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text.contiguous())
        return self.project_out(attn, image.contiguous()), text

    def project(
        self, attn: Any, hidden: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each ``(batch, tokens, heads, head_dim)``, normalised, text tokens first."""
        query, key, value = self._split(attn, self.project_hidden(attn, hidden))
        query, key = _normalised(attn.norm_q, query), _normalised(attn.norm_k, key)
        if text is None:
            return query, key, value
        if _is_fused(attn):
            projected = attn.to_added_qkv(text).chunk(3, dim=-1)
        else:
            projected = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        text_query, text_key, text_value = self._split(attn, projected)
        text_query = _normalised(attn.norm_added_q, text_query)
        text_key = _normalised(attn.norm_added_k, text_key)
        return (
            torch.cat([text_query, query], dim=1),
            torch.cat([text_key, key], dim=1),
            torch.cat([text_value, value], dim=1),
        )

    def project_hidden(self, attn: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value of the main stream, ``(batch, tokens, heads * head_dim)`` each."""
        if _is_fused(attn):
            return attn.to_qkv(hidden).chunk(3, dim=-1)
        return attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions into query and key ``(batch, tokens, heads, head_dim)``; ``None`` where a family adds its own."""
        return rotated(query, rotary), rotated(key, rotary)

    def attend(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``(batch, tokens, heads, head_dim)`` from the same: through the op, or exact without one."""
        if self.op is None:
            return self.attend_exactly(query, key, value, attention_mask)
        if self._parallel_config is not None:
            raise UnsupportedModelError(
                "context parallelism gives each device a part of the tokens, and a custom op needs all of them; call "
                "disable() on this model, or run it without enable_parallelism."
            )
        return apply_op(self.op, query, key, value, attention_mask)

    def attend_exactly(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
    ) -> torch.Tensor:
        """Exact attention by the backend that is set."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
            **options,
        )

    def project_out(self, attn: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The output projection of the main stream, where the layer has one."""
        return hidden if _has_no_output(attn) else attn.to_out[1](attn.to_out[0](hidden))

    @staticmethod
    def _split(attn: Any, projected: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        # FLUX knows its head_dim: under tensor parallelism a device has only some of the heads.
        head_dim = getattr(attn, "head_dim", None) or projected[1].shape[-1] // attn.heads
        return [x.unflatten(-1, (-1, head_dim)) for x in projected]


def rotated(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """``(batch, tokens, heads, head_dim)`` with a rotary embedding ``(cos, sin)`` of shape ``(tokens, head_dim)``."""
    from diffusers.models.embeddings import apply_rotary_emb

    return x if rotary is None else cast(torch.Tensor, apply_rotary_emb(x, cast(Any, rotary), sequence_dim=1))


def _is_fused(attn: Any) -> bool:
    """Whether to use the fused projections. SD3's attention keeps them, and the mark, when they are taken off again."""
    from diffusers.models.attention_processor import Attention

    return attn.fused_projections and not isinstance(attn, Attention)


def _has_no_output(attn: Any) -> bool:
    return getattr(attn, "to_out", None) is None


def _normalised(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """``(batch, tokens, heads, head_dim)``; the norms are over the head dimension and do not mind the layout."""
    return x if norm is None else norm(x)
