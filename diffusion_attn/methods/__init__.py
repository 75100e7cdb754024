"""What a user enables: one file per method, one line per method here."""

from diffusion_attn.methods.agent import AgentAttention, TokenMerging
from diffusion_attn.methods.clear import Clear
from diffusion_attn.methods.hidiffusion import HiDiffusion
from diffusion_attn.methods.linfusion import LinFusion
from diffusion_attn.methods.low_memory import LowMemory

METHODS = {method.name: method for method in (HiDiffusion, LinFusion, Clear, AgentAttention, TokenMerging, LowMemory)}
"""Every method by the name that reports, `disable` and the command line use."""

__all__ = ["METHODS", "AgentAttention", "Clear", "HiDiffusion", "LinFusion", "LowMemory", "TokenMerging"]
