"""Outputs of chosen modules, collected during a forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn


class Features:
    """Context manager: inside, the outputs of ``modules`` are collected, in the order of ``modules``.

    Wrap the forward pass and nothing more: under gradient checkpointing the backward pass runs modules again, and by
    then nobody collects, so that everything counts once. The tensors are part of the graph (non-reentrant).

    Args:
        modules: what to listen to; each has to run exactly once inside.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._found: dict[nn.Module, torch.Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Features:
        self._handles = [module.register_forward_hook(self._collect) for module in self.modules]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def outputs(self) -> list[torch.Tensor]:
        """What was collected, one tensor for each module.

        Raises:
            RuntimeError: a module did not run.
        """
        silent = sum(module not in self._found for module in self.modules)
        if silent:
            raise RuntimeError(f"{silent} of {len(self.modules)} modules did not run; call the whole model inside.")
        return [self._found[module] for module in self.modules]

    def _collect(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in self._found:
            raise RuntimeError(f"a {type(module).__name__} ran twice; wrap the forward pass alone.")
        self._found[module] = output[0] if isinstance(output, tuple) else output
