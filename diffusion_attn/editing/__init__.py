"""Attention maps to look at and to steer pictures with: capture, prompts, controls, losses, grounding, inversion."""

from diffusion_attn.editing.capture import AttentionMaps, record

__all__ = ["AttentionMaps", "record"]
