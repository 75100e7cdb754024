"""The embedded models: small pipelines in plain diffusers format that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_attn.core.loading import WEIGHTS_ONLY

FOLDER = Path(__file__).parent / "models"
CLIP = FOLDER / "shapes-clip"
"""A CLIP for pictures of shapes, of transformers."""
IP_ADAPTER = "ip-adapter_shapes-sd.safetensors"
"""The file beside it by which shapes-sd is told of a picture, for ``load_ip_adapter``."""


def available() -> list[str]:
    """The names of the embedded models."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))


def load_pipeline(name: str = "shapes-sd", **kwargs: Any) -> Any:
    """Load an embedded pipeline; nothing is downloaded.

    Args:
        name: one of `available`.
        kwargs: passed to ``DiffusionPipeline.from_pretrained``, for example ``dtype=torch.bfloat16``.

    Returns:
        A stock diffusers pipeline (``shapes-sd``: ``StableDiffusionPipeline``, ``shapes-flux``: ``FluxPipeline``),
        float32 unless ``dtype`` says so.

    Raises:
        ValueError: there is no such model.
    """
    if name not in available():
        raise ValueError(f"name={name!r} is not an embedded model; there are: {', '.join(available()) or 'none'}.")
    import torch
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(FOLDER / name, **{**WEIGHTS_ONLY, "dtype": torch.float32, **kwargs})
