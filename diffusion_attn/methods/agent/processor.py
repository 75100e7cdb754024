"""The processor of a self-attention whose tokens are merged."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.methods.agent.block_match import BlockMatch
from diffusion_attn.ops.agent_attention import agent_attention
from diffusion_attn.ops.precision import without_autocast
from diffusion_attn.processors.unet import UNetAttnProcessor


class MergedAttnProcessor(UNetAttnProcessor):
    """Self-attention of merged tokens, through agents where there are any; exact attention where nothing is merged.

    Logits are computed in float32 where the layer says ``upcast_attention``, as Stable Diffusion 2.1's do: agents
    sharpen them.

    Args:
        merging: of the block; ``None`` is what loaders leave that rebuild processors from their class; `enable` keeps
            the real one in place.
    """

    def __init__(self, merging: BlockMatch | None = None) -> None:
        super().__init__()
        self.merging = merging

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Merge, attend, unmerge: ``(batch, tokens, channels)`` from the same.

        Raises:
            UnsupportedModelError: there is a mask.
        """
        match = None if self.merging is None else self.merging.match
        if match is None or encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        if attention_mask is not None:
            raise UnsupportedModelError(
                "an attention mask arrived at a self-attention layer whose tokens are merged, where it fits no more; "
                "drop the mask, or disable the method on this model."
            )
        assert self.merging is not None and self.merging.setting is not None
        setting = self.merging.setting
        query, key, value = self.project(attn, match.merge(hidden_states), None)
        pooled = match.agents(hidden_states)
        agents = None if pooled is None else self.project(attn, pooled, None)[0]
        upcast = bool(attn.upcast_attention)
        if upcast:
            query, key, value = query.float(), key.float(), value.float()
        # Under autocast the products would go back to 16 bits.
        with without_autocast(query) if upcast else nullcontext():
            if agents is None:
                out = self.attend(attn, query, key, value, None, cross=False)
            else:
                query, key, value, agents = (x.transpose(1, 2) for x in (query, key, value, agents.to(query.dtype)))
                out = agent_attention(
                    query,
                    key,
                    value,
                    agents,
                    second_scale=query.shape[-1] ** (-0.5 * setting.second_scale_power),
                    shortcut=setting.shortcut,
                ).transpose(1, 2)
        return match.unmerge(self.project_out(attn, out.flatten(2, 3).to(hidden_states.dtype)))
