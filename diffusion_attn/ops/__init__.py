"""Attention as pure tensor functions, ``(batch, heads, tokens, head_dim)`` in and out."""

from diffusion_attn.ops.linear_attention import linear_attention
from diffusion_attn.ops.local_attention import local_attention
from diffusion_attn.ops.window_attention import window_attention

__all__ = ["linear_attention", "local_attention", "window_attention"]
