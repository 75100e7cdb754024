"""What a method is to the core: options that can plan their place on a denoiser and install themselves there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from diffusion_attn.core.context import StepContext
from diffusion_attn.core.processors import HeldProcessor


@dataclass(frozen=True)
class Target:
    """What is being enabled: the denoiser, and where known its pipeline; ``scheduled``: steps can be looked up."""

    denoiser: nn.Module
    pipeline: Any
    scheduled: bool


@dataclass(frozen=True)
class Plan:
    """What a method is going to do to a target; nothing is changed until ``install`` is called.

    Attributes:
        layers: names of the modules it touches, relative to the denoiser.
        install: registers hooks and processors through the `Attachment` it is given.
        attention: names of the attention modules whose computation it replaces; two methods must not share one.
        remedy: the option that gives ``attention`` up, for the error when they would.
        notes: sentences for the report on what this comes to.
        reads_steps: the method asks at which step a forward pass is, so that it has to be one of the schedule's.
    """

    layers: list[str]
    install: Callable[[Attachment], None]
    attention: frozenset[str] = frozenset()
    remedy: str = "enable one of them only"
    notes: tuple[str, ...] = ()
    reads_steps: bool = True


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of options with a name."""

    name: ClassVar[str]

    def plan(self, target: Target) -> Plan:
        """Check everything and say what would be touched.

        Raises:
            UnsupportedModelError: the target is not one that the method serves.
        """
        ...


@dataclass
class Attachment:
    """Everything a method has installed, and how to undo it; ``context`` gives the forward pass in progress."""

    context: Callable[[], StepContext]
    _undo: list[Callable[[], object]] = field(default_factory=list)
    _held: list[HeldProcessor] = field(default_factory=list)

    def before(self, module: nn.Module, hook: Callable, *, kwargs: bool = False, first: bool = False) -> None:
        """Register ``hook`` as a forward pre-hook of ``module``, the ``first`` of all that are there if asked."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=kwargs, prepend=first).remove)

    def after(self, module: nn.Module, hook: Callable, *, last: bool = False) -> None:
        """Register ``hook`` as a forward hook of ``module``, before those that are there or as the ``last`` of all.

        Hooks of two methods nest so: who changes an input after another changes the output before it.
        """
        self._undo.append(module.register_forward_hook(hook, prepend=not last).remove)

    def process(self, name: str, attn: Any, processor: Any) -> None:
        """Set ``processor`` on the attention module ``attn`` called ``name``, and keep it there."""
        held = HeldProcessor(name, attn, processor)
        self._held.append(held)
        self._undo.append(held.release)
        held.set()

    def park(self, module: nn.Module, denoiser: Any, place: str) -> None:
        """Keep the weights of ``module``, which nobody computes with meanwhile, on the ``"cpu"`` or on ``"disk"``.

        They come back to where ``denoiser`` is by then. On disk is in a file of the temporary directory that is mapped
        into memory and has no name any more: they are there when something reads them, and gone with the process.
        """
        device = next(module.parameters()).device.type
        if device == "meta" or device == place:  # meta: an offloading hook has them already
            return
        if place == "disk":
            _map(module)
        else:
            module.to(place)
        self.when_undone(partial(_bring_back, module, denoiser))

    def when_undone(self, action: Callable[[], object]) -> None:
        """Have ``action`` called when the method is taken off."""
        self._undo.append(action)

    def hold(self) -> None:
        """Before each forward pass: processors that a loader has replaced since are set again.

        Raises:
            MethodConflictError: somebody has set another kind of attention.
        """
        for held in self._held:
            held.hold()

    def undo(self) -> None:
        """Take everything back, last first; what fails does not keep the rest from being taken back."""
        errors = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


@torch.inference_mode(False)
def _map(module: nn.Module) -> None:
    """Have the parameters of ``module`` in a file instead of in memory."""
    from safetensors.torch import load_file, save_file

    handle, path = tempfile.mkstemp(suffix=".safetensors")
    os.close(handle)
    try:
        save_file({name: x.detach().contiguous() for name, x in module.named_parameters()}, path)
        mapped = load_file(path)
    finally:
        with suppress(PermissionError):  # Windows keeps what is mapped
            os.unlink(path)
    for name, parameter in module.named_parameters():
        parameter.data = mapped[name]


@torch.inference_mode(False)
def _bring_back(module: nn.Module, denoiser: Any) -> None:
    for parameter in module.parameters():
        if parameter.is_meta:  # an offloading hook has taken it over
            continue
        parameter.data = parameter.data.to(denoiser.device, copy=True)
