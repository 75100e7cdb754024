"""Token merging in UNets, and attention through agents on what is merged."""

from diffusion_attn.methods.agent.agent_attention import AgentAttention
from diffusion_attn.methods.agent.token_merging import TokenMerging

__all__ = ["AgentAttention", "TokenMerging"]
