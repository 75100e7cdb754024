"""Numbers of PIE-Bench that need no network: how much of a picture has stayed, with masks of the edited part.

Source: Direct Inversion, section 5 and its code (arXiv 2310.01506). Similarities are computed by torchmetrics
(pip install diffusion-attn[metrics]).
"""

from __future__ import annotations

from typing import Any, cast

import torch

_BORDER = 5


def psnr(image: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels of both pictures times ``mask``.

    Args:
        image: ``(3, H, W)`` in 0..1.
        reference: the same.
        mask: ``(H, W)``, bool or float, the pixels that count; the number for an empty one is ``nan``.

    Raises:
        ValueError: the shapes do not agree.
        ImportError: torchmetrics is not installed.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return _masked(peak_signal_noise_ratio, image, reference, mask, data_range=1.0)


def mse(image: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Mean squared difference; arguments and errors as of `psnr`."""
    return _masked(torch.nn.functional.mse_loss, image, reference, mask)


def ssim(image: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Structural similarity (Gaussian window of 11, deviation 1.5) away from the border.

    Arguments and errors as of `psnr`. What is masked away counts as equal.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    def inner(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        # Versions of torchmetrics differ in whether the border, where windows are not full, counts; here it does not.
        _, full = structural_similarity_index_measure(image, reference, data_range=1.0, return_full_image=True)
        return full[..., _BORDER:-_BORDER, _BORDER:-_BORDER].mean()

    return _masked(inner, image, reference, mask)


def _masked(metric: Any, image: torch.Tensor, reference: torch.Tensor, mask: Any, **options: Any) -> float:
    if image.shape != reference.shape or image.ndim != 3:
        raise ValueError(
            f"image has the shape {tuple(image.shape)} and reference {tuple(reference.shape)}; give two of (3, H, W)."
        )
    image, reference = image.float(), reference.float()
    if mask is not None:
        if tuple(mask.shape) != tuple(image.shape[1:]):
            raise ValueError(f"mask has the shape {tuple(mask.shape)}; give {tuple(image.shape[1:])}, the picture's.")
        if not mask.any():
            return float("nan")
        image, reference = image * mask, reference * mask
    return float(cast(torch.Tensor, metric(image[None], reference[None], **options)))
