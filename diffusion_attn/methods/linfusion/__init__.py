"""LinFusion: self-attention in linear time, with distilled weights."""

from diffusion_attn.methods.linfusion.method import LinFusion

__all__ = ["LinFusion"]
