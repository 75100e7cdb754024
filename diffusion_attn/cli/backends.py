"""Which of diffusers' attention backends work on this machine: found by trying them."""

from __future__ import annotations

from typing import Any

import torch


def working_backends() -> list[str]:
    """Names for ``set_attention_backend`` and the ``attention_backend`` context that compute on the default device.

    Backends that would fetch a kernel from the Hub are not tried, so they are not in the list.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName if "hub" not in backend.value and _works(backend)]


def _works(backend: Any) -> bool:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    query = torch.ones(1, 16, 2, 64, device=device, dtype=dtype)
    try:
        dispatch_attention_fn(query, query, query, backend=backend)
    except Exception:  # each missing package, device or compute capability fails in its own way
        return False
    return True
