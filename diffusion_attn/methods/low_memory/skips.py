"""Tensors that wait elsewhere: what a UNet's way down leaves for its way up."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

PLACES = ("cpu", "disk")


class Parked(torch.Tensor):
    """A tensor whose numbers are in another place, from which every operation on it fetches them anew.

    Args:
        tensor: of any device; nothing of it is kept there.
        place: ``"cpu"``, or ``"disk"``: a file of the temporary directory that has no name and goes with the tensor.
    """

    _kept: Any

    @staticmethod
    def __new__(cls, tensor: torch.Tensor, place: str) -> Parked:
        """A tensor without memory that looks like ``tensor``."""
        return torch.Tensor._make_wrapper_subclass(
            cls, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )

    def __init__(self, tensor: torch.Tensor, place: str) -> None:
        if tensor.device.type == "meta":  # there are no numbers, only the room that they would take
            self._kept = None
        elif place == "cpu":
            self._kept = tensor.to("cpu")
        else:
            self._kept = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the tensor lives
            tensor.cpu().contiguous().view(torch.uint8).numpy().tofile(self._kept)

    def fetch(self) -> torch.Tensor:
        """The tensor, where it was."""
        if self._kept is None:
            return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
        if isinstance(self._kept, torch.Tensor):
            return self._kept.to(self.device)
        self._kept.seek(0)
        return torch.from_numpy(np.fromfile(self._kept, np.uint8)).view(self.dtype).view(self.shape).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any operation, on what is fetched."""
        args, kwargs = tree_map_only(Parked, Parked.fetch, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Without the numbers, which printing has no business fetching."""
        return f"Parked({tuple(self.shape)}, {self.dtype}, {self.device})"


class Park:
    """Forward hooks that park what a module of the way down leaves for the way up.

    Args:
        place: see `Parked`. What is there anyway, is left alone; so is everything while gradients are recorded, and in
            a compiled region, whose memory is the compiler's to plan.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    def block(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        """After a down block, which returns ``(hidden states, skips)``.

        The last skip is the hidden states again, which live on, and which adapters add to in place.
        """
        hidden, skips = output
        return hidden, (*(self._park(skip) for skip in skips[:-1]), skips[-1])

    def convolution(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """After the UNet's first convolution, whose result is a skip too."""
        return self._park(output)

    def _park(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type == self.place:
            return x
        return Parked(x, self.place)
