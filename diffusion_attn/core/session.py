"""What is enabled on one denoiser: the methods, their attachments, and the context of the forward pass in progress."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.context import Schedule, StepContext
from diffusion_attn.core.errors import DiffusionAttnError, MethodConflictError
from diffusion_attn.core.method import Attachment, Method, Plan

_ATTRIBUTE = "_diffusion_attn"

FLUX_UNIT = 1000
"""FLUX is given the timesteps of its scheduler divided by this."""


@dataclass
class Enabled:
    """A method that is in force, with what it touched and how to take it back."""

    method: Method
    plan: Plan
    attachment: Attachment


class Session:
    """The state of one denoiser, kept on it from the first `enable` to the last `disable`.

    Hooks are bound methods, never closures, so that a deep copy of the denoiser carries a working copy of its session.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.enabled: dict[str, Enabled] = {}
        self.schedule: Schedule | None = None
        self._context: StepContext | None = None
        self._handles = [
            denoiser.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            denoiser.register_forward_hook(self._leave, always_call=True),
        ]
        setattr(denoiser, _ATTRIBUTE, self)

    @staticmethod
    def of(denoiser: nn.Module) -> Session | None:
        """The session of ``denoiser``, or ``None`` when nothing is enabled on it."""
        return getattr(denoiser, _ATTRIBUTE, None)

    def context(self) -> StepContext:
        """The forward pass in progress."""
        if self._context is None:
            raise DiffusionAttnError(
                "a part of the denoiser was called on its own while a method is enabled on the whole; call the "
                "denoiser itself, or disable the method first."
            )
        return self._context

    def install(self, method: Method, plan: Plan) -> None:
        """Put ``method`` in force; takes everything back if that fails half-way."""
        attachment = Attachment(self.context)
        try:
            plan.install(attachment)
        except BaseException:
            attachment.undo()
            raise
        self.enabled[method.name] = Enabled(method, plan, attachment)

    def remove(self, name: str) -> None:
        """Take one method back."""
        self.enabled.pop(name).attachment.undo()

    def close_if_empty(self) -> None:
        """Leave no trace once nothing is enabled."""
        if not self.enabled:
            for handle in self._handles:
                handle.remove()
            delattr(self.denoiser, _ATTRIBUTE)

    @torch.compiler.disable
    def _enter(self, denoiser: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        for on in self.enabled.values():
            on.attachment.hold()
        call = bind_call(denoiser, args, kwargs)
        # Transformers of the FLUX kind are given tokens instead of a picture.
        height, width = call["sample"].shape[-2:] if "sample" in call else (0, 0)
        if self.schedule is None or not any(on.plan.reads_steps for on in self.enabled.values()):
            self._context = StepContext(height, width)
        else:
            unit = FLUX_UNIT if "img_ids" in call else 1
            self._context = StepContext(height, width, *self.schedule.locate(call["timestep"], unit))

    @torch.compiler.disable
    def _leave(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        self._context = None


def check_conflicts(plans: dict[str, Plan]) -> None:
    """Refuse two methods that would both replace the attention of one layer.

    Raises:
        MethodConflictError: names both, a layer, and the options that resolve it.
    """
    for first, plan in plans.items():
        for second, other in plans.items():
            shared = sorted(plan.attention & other.attention)
            if first < second and shared:
                raise MethodConflictError(
                    f"{first!r} and {second!r} both replace the attention of {shared[0]} (and {len(shared) - 1} more "
                    f"layers); for {first!r}: {plan.remedy}; for {second!r}: {other.remedy}."
                )


def bind_call(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a denoiser's forward call by name, however they were passed."""
    return {**dict(zip(argument_names(denoiser), args, strict=False)), **kwargs}


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of what the forward call of ``module`` takes, in its order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
