"""From a picture to what sampling can come back from: DDIM, null-text and direct inversion, dynamic prompts."""

from diffusion_attn.editing.inversion.ddim import ddim_invert, direct_inversion
from diffusion_attn.editing.inversion.dynamic_prompts import dynamic_prompts
from diffusion_attn.editing.inversion.localised_prompts import localised_prompts
from diffusion_attn.editing.inversion.null_text import null_text
from diffusion_attn.editing.inversion.record import Inversion

__all__ = ["Inversion", "ddim_invert", "direct_inversion", "dynamic_prompts", "localised_prompts", "null_text"]
