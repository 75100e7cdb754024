"""The precision that an op computes in, whatever is around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """No autocast on the device of ``x``, some of which (``meta``) have none, for a block of code."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else nullcontext()
