"""The terms of the loss, as pure functions; float32 whatever they are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

PREDICTIONS = ("epsilon", "v_prediction", "flow")
"""What denoisers predict."""


def denoising_target(
    kind: str, clean: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """What a denoiser should predict of ``signal * clean + sigma * noise``.

    Args:
        kind: ``"epsilon"``, the noise; ``"v_prediction"``, ``signal * noise - sigma * clean``; ``"flow"``, the velocity
            of the straight path (``signal = 1 - sigma``), ``noise - clean``.
        clean: ``(batch, ...)``.
        noise: as ``clean``.
        signal: share of ``clean``, ``(batch,)``.
        sigma: share of ``noise``, ``(batch,)``.

    Returns:
        As ``clean``, float32.

    Raises:
        ValueError: ``kind`` is none of `PREDICTIONS`.
    """
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction type {kind!r}: expected one of {', '.join(PREDICTIONS)}; give such a model.")
    clean, noise = clean.float(), noise.float()
    if kind == "epsilon":
        return noise
    if kind == "flow":
        return noise - clean
    return _each(signal, clean) * noise - _each(sigma, clean) * clean


def add_noise(clean: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """``signal * clean + sigma * noise``, float32; shapes as in `denoising_target`."""
    return _each(signal, clean) * clean.float() + _each(sigma, clean) * noise.float()


def mse(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of two tensors of the same shape: the target loss, and the distillation of a prediction."""
    return F.mse_loss(predicted.float(), target.float())


def guided(predicted: torch.Tensor, scale: float) -> torch.Tensor:
    """The prediction under classifier-free guidance (Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6).

    Args:
        predicted: ``(2 * batch, ...)``, with captions, then the same without.
        scale: of guidance, the paper's 1 + w; 1 is the prediction with captions.

    Returns:
        ``(batch, ...)``, float32.
    """
    captioned, empty = predicted.float().chunk(2)
    return empty + scale * (captioned - empty)


def attention_mse(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean over layers of the mean squared error of attention outputs, each ``(batch, tokens, channels)``.

    Raises:
        ValueError: there are no layers, or not as many on both sides.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"{len(student)} layers of the student against {len(teacher)} of the teacher: expected the same number, "
            "1 or more; collect both from the same modules."
        )
    return torch.stack([mse(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).mean()


def _each(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scale.float().view(-1, *(1,) * (like.ndim - 1))
