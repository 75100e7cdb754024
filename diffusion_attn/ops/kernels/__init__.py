"""GPU forms of ops in Triton, same signatures; the ops choose them, users never do."""

from __future__ import annotations

from importlib.util import find_spec

import torch

TRITON = find_spec("triton") is not None
"""Whether Triton is installed."""


def triton_serves(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can take ``tensors``: on CUDA, of a dtype that they know, with Triton installed."""
    known = (torch.float16, torch.bfloat16, torch.float32)
    return TRITON and all(x.is_cuda and x.dtype in known for x in tensors)
