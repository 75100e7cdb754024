"""Sizes of pictures that a pipeline can draw, in pixels."""

from __future__ import annotations

import math
from typing import Any

Size = tuple[int, int]
"""Height and width in pixels."""


def native_size(pipe: Any) -> Size | None:
    """The size that the model was trained at: its sample size in latent cells, decoded; ``None``: it does not tell.

    FLUX's transformer records none; its autoencoder does, in pixels.
    """
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    cells, scale = getattr(getattr(denoiser, "config", None), "sample_size", None), pipe.vae_scale_factor
    if cells is None:
        cells, scale = getattr(getattr(getattr(pipe, "vae", None), "config", None), "sample_size", None), 1
    if cells is None:
        return None
    height, width = (cells, cells) if isinstance(cells, int) else cells
    return height * scale, width * scale


def size_multiple(pipe: Any) -> int:
    """What sides have to be multiples of: of 8 at least, which stock pipelines ask for whatever the autoencoder."""
    processor = getattr(pipe, "image_processor", None)
    return math.lcm(processor.config.vae_scale_factor if processor is not None else pipe.vae_scale_factor, 8)
