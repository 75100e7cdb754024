"""Safetensors files, whose headers are read within bounds before anything else is done with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from diffusion_attn.core.errors import CheckpointFormatError
from diffusion_attn.core.reading import parse_json

LARGEST_HEADER = 2**24
"""Bytes; names, shapes and places of `MOST_TENSORS` take less."""

MOST_TENSORS = 2**16
"""Of a file; the largest models have some thousands."""


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU, in their stored dtype.

    Raises:
        CheckpointFormatError: the file is truncated, corrupt, or of another format.
    """
    from safetensors import SafetensorError

    try:
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, KeyError) as error:  # a dtype that torch does not have
        raise _unreadable(path, error) from error


def open_tensors(path: str | os.PathLike[str]) -> Any:
    """A safetensors file as ``safetensors.safe_open`` gives it, which reads a tensor when it is asked for.

    Raises:
        CheckpointFormatError: the file is truncated, corrupt, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _check_header(path)
        return safe_open(path, "pt")
    except (SafetensorError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error


def _check_header(path: str | os.PathLike[str]) -> None:
    """Look at what the reader would take up memory for, or let pass.

    Raises:
        ValueError: the header is too large, names a tensor twice, or names too many.
    """
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header is said to have {length} bytes, and {LARGEST_HEADER} is the most")
        header = parse_json(file.read(length).decode("utf-8"), unique=True)
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise ValueError(f"its header does not name tensors, {MOST_TENSORS} at most")


def _unreadable(path: str | os.PathLike[str], error: Exception) -> CheckpointFormatError:
    path = Path(path)
    return CheckpointFormatError(
        f"{path.name} in {path.resolve().parent.name!r} cannot be read as safetensors ({error}); it is truncated or of "
        "another format: get it again."
    )
