"""Attention as pure tensor functions, ``(batch, heads, tokens, head_dim)`` in and out."""

from diffusion_attn.ops.agent_attention import agent_attention, joint_agent_attention, pool_agents, position_bias
from diffusion_attn.ops.linear_attention import linear_attention
from diffusion_attn.ops.local_attention import local_attention
from diffusion_attn.ops.match_tokens import TokenMatch, match_tokens
from diffusion_attn.ops.window_attention import window_attention

__all__ = [
    "TokenMatch",
    "agent_attention",
    "joint_agent_attention",
    "linear_attention",
    "local_attention",
    "match_tokens",
    "pool_agents",
    "position_bias",
    "window_attention",
]
