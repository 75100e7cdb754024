"""Less memory for the same picture: a method that changes where and when things are computed, never what."""

from diffusion_attn.methods.low_memory.method import LowMemory

__all__ = ["LowMemory"]
