"""What has to hold before anything is timed: a method computes numbers, leaves no trace, and is as exact as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusion_attn.core.enable import using
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.method import Method

_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest value: what another order of summation may change in one pass through a denoiser."""


class ParityError(DiffusionAttnError):
    """A method does not do what it says, so that its time means nothing."""


def check_parity(target: Any, name: str, method: Method, step: Callable[[], torch.Tensor]) -> None:
    """Take a step of the plain model, one with ``method`` and a plain one again, and compare.

    Args:
        target: what the method is enabled on.
        name: of the method, for the error.
        method: exact ones say so: ``exact = True``.
        step: computes the step anew with what is enabled.

    Raises:
        ParityError: its output is not finite; the plain model's changes by enabling and disabling; or a method that
            is exact is not.
    """
    plain = step()
    with using(target, method):
        on = step()
    if not torch.equal(step(), plain):
        raise ParityError(f"{name!r} leaves a trace: after disabling it the plain model's output is another.")
    if not on.isfinite().all():
        raise ParityError(f"{name!r} computes numbers that are not finite; try another dtype.")
    apart, largest = (on - plain).abs().max().item(), plain.abs().max().item()
    if getattr(method, "exact", False) and apart > _ROUNDING.get(plain.dtype, 1e-4) * largest:
        raise ParityError(
            f"{name!r} is to compute what the plain model does, and is {apart:.2g} from it, of {largest:.2g}."
        )
