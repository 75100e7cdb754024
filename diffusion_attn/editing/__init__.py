"""Attention maps to look at and to steer pictures with: capture, prompts, controls, losses, grounding, inversion."""

from diffusion_attn.editing import controls, grounding, guidance, inversion, losses, prompts, schedulers
from diffusion_attn.editing.capture import record
from diffusion_attn.editing.maps import AttentionMaps

__all__ = [
    "AttentionMaps",
    "controls",
    "grounding",
    "guidance",
    "inversion",
    "losses",
    "prompts",
    "record",
    "schedulers",
]
