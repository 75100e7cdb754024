"""diffusion-attn: attention methods for diffusers pipelines, switched on by a line and off by a line."""

from importlib import import_module
from types import ModuleType

from diffusion_attn import ops, processors, shapes
from diffusion_attn.core.enable import EnableReport, disable, enable, enabled, using
from diffusion_attn.core.errors import (
    CheckpointFormatError,
    DiffusionAttnError,
    GridError,
    MethodConflictError,
    UnsupportedModelError,
)
from diffusion_attn.methods import AgentAttention, Clear, HiDiffusion, LinFusion, LowMemory, TokenMerging
from diffusion_attn.version import __version__

__all__ = [
    "AgentAttention",
    "CheckpointFormatError",
    "Clear",
    "DiffusionAttnError",
    "EnableReport",
    "GridError",
    "HiDiffusion",
    "LinFusion",
    "LowMemory",
    "MethodConflictError",
    "TokenMerging",
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


def __getattr__(name: str) -> ModuleType:
    """Parts that are loaded when they are first asked for: they cost more than the rest together."""
    if name in ("distill", "editing", "metrics", "pipelines"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
