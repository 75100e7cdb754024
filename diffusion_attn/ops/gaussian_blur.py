"""Blur of feature maps by a Gaussian."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def gaussian_blur(x: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Each channel convolved with a Gaussian whose weights sum to one; beyond the border there are zeros.

    The kernel is separable, so that cost grows linearly with ``kernel_size``.

    Args:
        x: ``(batch, channels, height, width)``, any float dtype.
        kernel_size: cells along each side, odd.
        sigma: standard deviation, in cells.

    Returns:
        ``(batch, channels, height, width)`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not what it should be.

    Source: DemoFusion (arXiv 2311.16973), dilated sampling.
    """
    if x.ndim != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: expected (batch, channels, height, width); add what is missing."
        )
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size={kernel_size!r}: expected an odd number from 1, which has a middle; give 3 or 5."
        )
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma!r}: expected a number of cells above 0; give a kernel_size of 1 for no blur.")
    half = kernel_size // 2
    offsets = torch.arange(-half, half + 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).to(x.dtype)
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(planes, weights.view(1, 1, -1, 1), padding=(half, 0))
    planes = F.conv2d(planes, weights.view(1, 1, 1, -1), padding=(0, half))
    return planes.view_as(x)
