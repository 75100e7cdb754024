"""CLEAR: attention inside a disc around each image token, for FLUX and Stable Diffusion 3."""

from diffusion_attn.methods.clear.method import Clear

__all__ = ["Clear"]
