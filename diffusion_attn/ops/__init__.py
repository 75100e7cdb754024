"""Attention as pure tensor functions, ``(batch, heads, tokens, head_dim)`` in and out."""

from diffusion_attn.ops.window_attention import window_attention

__all__ = ["window_attention"]
