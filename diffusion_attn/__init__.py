"""diffusion-attn: attention methods for diffusers pipelines, switched on by a line and off by a line."""

from diffusion_attn import ops, processors, shapes
from diffusion_attn.core.enable import EnableReport, disable, enable, enabled, using
from diffusion_attn.core.errors import (
    CheckpointFormatError,
    DiffusionAttnError,
    GridError,
    MethodConflictError,
    UnsupportedModelError,
)
from diffusion_attn.methods import HiDiffusion, LinFusion
from diffusion_attn.version import __version__

__all__ = [
    "CheckpointFormatError",
    "DiffusionAttnError",
    "EnableReport",
    "GridError",
    "HiDiffusion",
    "LinFusion",
    "MethodConflictError",
    "UnsupportedModelError",
    "__version__",
    "disable",
    "enable",
    "enabled",
    "ops",
    "processors",
    "shapes",
    "using",
]
