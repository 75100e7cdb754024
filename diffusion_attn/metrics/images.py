"""How like two pictures are; SSIM is computed by torchmetrics (pip install diffusion-attn[metrics])."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image

Pictures = Sequence[Image.Image]
"""RGB pictures, all of one size where they are compared pixel by pixel."""


def psnr(images: Pictures, references: Pictures) -> list[float]:
    """Peak signal-to-noise ratio of each picture to its reference, in dB; infinite where they are equal.

    Raises:
        ValueError: there are not as many of both.
    """
    return [float(-10 * (a - b).square().mean().log10()) for a, b in _pairs(images, references)]


def ssim(images: Pictures, references: Pictures) -> list[float]:
    """Structural similarity of each picture to its reference, 1 where they are equal.

    Raises:
        ValueError: there are not as many of both.
        ImportError: torchmetrics is not installed.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = [structural_similarity_index_measure(a, b, data_range=1.0) for a, b in _pairs(images, references)]
    return [float(cast(torch.Tensor, value)) for value in values]


def as_tensor(images: Pictures) -> torch.Tensor:
    """Pictures of one size as ``(pictures, 3, height, width)``, uint8."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2)


def _pairs(images: Pictures, references: Pictures) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if len(images) != len(references):
        raise ValueError(f"{len(images)} images against {len(references)} references: expected as many of both.")
    return [
        (as_tensor([image]).float() / 255, as_tensor([reference]).float() / 255)
        for image, reference in zip(images, references, strict=True)
    ]
