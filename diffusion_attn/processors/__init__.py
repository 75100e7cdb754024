"""Attention processors for diffusers, one file per model family; each takes an op."""

from diffusion_attn.processors.joint import JointAttnProcessor
from diffusion_attn.processors.unet import UNetAttnProcessor

__all__ = ["JointAttnProcessor", "UNetAttnProcessor"]
