"""GPU forms of ops in Triton, same signatures; the ops choose them, users never do."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch

_COMPILERS = (os.environ.get("CC"), "cc", "gcc", "clang")
TRITON = find_spec("triton") is not None and any(shutil.which(name) for name in _COMPILERS if name)
"""Whether Triton is installed, and the C compiler that it needs to launch anything."""


def triton_serves(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can take ``tensors``: on CUDA, of a dtype that they know, with Triton installed."""
    known = (torch.float16, torch.bfloat16, torch.float32)
    return TRITON and all(x.is_cuda and x.dtype in known and x.numel() > 0 for x in tensors)
