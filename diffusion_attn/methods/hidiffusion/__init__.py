"""HiDiffusion (arXiv 2311.17528): its options, when its switches are on, and its hooks."""

from diffusion_attn.methods.hidiffusion.method import HiDiffusion

__all__ = ["HiDiffusion"]
