"""Attention processors that a method sets: kept in place against loaders that replace them, given back afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusion_attn.core.errors import MethodConflictError

_EXACT = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FluxAttnProcessor",
    "FusedAttnProcessor2_0",
    "FusedJointAttnProcessor2_0",
    "JointAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XLAFlashAttnProcessor2_0",
}
"""Classes of diffusers that are the same attention computed in different ways."""


_EXACT_WITHOUT_OP = {"JointAttnProcessor", "UNetAttnProcessor"}
"""Classes of ours that are stock attention as long as they are given no op."""

_HELD = "_held_by_diffusion_attn"
"""Set on processors of methods in force."""


def check_exact(name: str, processor: Any) -> None:
    """Make sure that nothing is lost when the ``processor`` of the layer ``name`` is replaced.

    Those of methods that are in force are left to `check_conflicts`, which knows both by name.

    Raises:
        MethodConflictError: it is not one of the ways to compute stock attention.
    """
    kind = type(processor).__name__
    if is_held(processor) or kind in _EXACT or (kind in _EXACT_WITHOUT_OP and processor.op is None):
        return
    raise MethodConflictError(
        f"{name} has the processor {type(processor).__name__}, which is more than stock attention: a method of "
        "diffusion-attn that replaces the attention of this layer would switch it off. Use one of them: take the "
        "processor (or the guidance that sets it, such as PAG and SAG) off, or disable the method."
    )


def is_held(processor: Any) -> bool:
    """Whether ``processor`` belongs to a method that is in force."""
    return getattr(processor, _HELD, False)


@dataclass
class HeldProcessor:
    """``processor`` on the attention module ``attn`` called ``name``, and the one to give back."""

    name: str
    attn: Any
    processor: Any
    original: Any = field(init=False)

    def __post_init__(self) -> None:
        self.original = self.attn.processor
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(self.original, name) and hasattr(self.processor, name):
                setattr(self.processor, name, getattr(self.original, name))

    def set(self) -> None:
        """Put the processor in its place."""
        setattr(self.processor, _HELD, True)
        self.attn.set_processor(self.processor)

    def hold(self) -> None:
        """Put it there again if a loader has replaced it; what came in its place is then what is given back.

        Raises:
            MethodConflictError: what came is not stock attention.
        """
        current = self.attn.processor
        if current is self.processor:
            return
        # IP-Adapter loaders rebuild every processor from its class: such a one is ours, without its layer.
        if type(current) is not type(self.processor):
            check_exact(self.name, current)
            self.original = current
        self.set()

    def release(self) -> None:
        """Give back the processor that was there, unless somebody has set another one since.

        What diffusers has set on this one since, its attention backend and how the model is parallel, goes with it.
        """
        setattr(self.processor, _HELD, False)
        for name in ("_attention_backend", "_parallel_config"):
            value = getattr(self.processor, name, None)
            if hasattr(self.original, name) and getattr(self.original, name) is not value:
                setattr(self.original, name, value)
        if type(self.attn.processor) is type(self.processor):
            self.attn.set_processor(self.original)
