"""Weights that stand in for a model's own while a method is enabled, beside the model instead of inside it.

The model's weights stay what they are, so that saving the model saves them, and going back needs no copy. LoRA layers
wrapped around the model's projections add to the stand-in's results.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.method import Attachment


class StandIn:
    """Mixin of processors that compute with the projections of ``layer`` instead of the attention module's.

    Args:
        layer: the weights; its linear modules have the names that they have in the attention module.
        method: whose weights they are, for messages.
        pinned: keep their dtype, whatever the model's is; else they follow it.
        parked: the module's own projections are not where the model is.
    """

    layer: Any
    method: str
    pinned: bool
    parked: bool

    def stand_in(self, layer: Any, method: str, pinned: bool, parked: bool) -> None:
        """Set all of the class's attributes."""
        self.layer, self.method, self.pinned, self.parked = layer, method, pinned, parked

    def forget(self) -> None:
        """Let go of the layer: who still holds this processor after `disable` must not compute with it."""
        self.layer = None

    def ready(self, hidden: torch.Tensor) -> Any:
        """The layer, where and as its input is: offloading moves the model without asking, and so may the user.

        Raises:
            UnsupportedModelError: there is no layer any more, or it is pinned to another dtype.
        """
        if self.layer is None:
            raise UnsupportedModelError(
                f"a {self.method} processor without its layer was called: it was made by hand or by a loader after "
                f"disable(); enable {self.method} again, or set the stock processor."
            )
        weight = self.layer.to_q.weight
        if weight.device != hidden.device:
            self.layer.to(hidden.device)
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            if self.pinned:
                raise UnsupportedModelError(
                    f"{self.method}'s weights are pinned to {weight.dtype}, and the model runs in {hidden.dtype} "
                    f"without autocast; run it under torch.autocast, or leave {self.method}'s dtype to the model."
                )
            self.layer.to(hidden.dtype)
        return self.layer

    def through(self, outer: nn.Module, own: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """``own(x)``, plus what a LoRA around the model's projection adds to it.

        Raises:
            UnsupportedModelError: the LoRA cannot be told from the weights, or those are parked.
        """
        if base_layer(outer) is outer:
            return own(x)
        check_adapter(outer, self.method)
        if self.parked and base_layer(outer).weight.device.type not in (x.device.type, "meta"):
            raise UnsupportedModelError(
                "a LoRA runs the base model's projections, and base_weights keeps them off the device; enable "
                f"{self.method} with base_weights='device'."
            )
        return outer(x)


class Substitute:
    """Forward hook on a base projection: inside a LoRA's wrapper the base result is the stand-in's."""

    def __init__(self, own: nn.Linear) -> None:
        self.own = own

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """The stand-in's result in place of the model's."""
        return self.own(args[0])


@torch.inference_mode(False)  # or weights that are cast inside it could never be trained
def place_layer(
    attachment: Attachment,
    denoiser: Any,
    attn: Any,
    layer: nn.Module,
    linears: Iterable[str],
    dtype: torch.dtype | None,
    base_weights: str,
) -> None:
    """Bring ``layer`` to where and what ``attn`` is, and put its ``linears`` in the place of those of ``attn``.

    Args:
        attachment: takes it back.
        denoiser: that ``attn`` is a part of.
        attn: the attention module.
        layer: the weights, by the names of the module's.
        linears: names of the projections.
        dtype: what the layer is to be; the module's own for ``None``.
        base_weights: ``"cpu"`` or ``"disk"`` parks the module's own projections there.
    """
    like = base_layer(attn.to_q).weight
    layer.to(dtype=dtype or like.dtype, device=None if like.is_meta else like.device)  # meta: offloaded layer by layer
    for name in linears:
        base = base_layer(attn.get_submodule(name))
        attachment.after(base, Substitute(layer.get_submodule(name)))  # type: ignore[arg-type]
        if base_weights != "device":
            attachment.park(base, denoiser, base_weights)


def copy_weights(own: nn.Linear, projection: Any) -> None:
    """Give ``own`` copies of a projection's weights, also where they are offloaded or inside a LoRA."""
    from accelerate.utils import align_module_device

    base = base_layer(projection)
    with align_module_device(base):
        own.weight = nn.Parameter(base.weight.detach().clone())
        if own.bias is not None:
            bias = torch.zeros_like(own.weight[:, 0]) if base.bias is None else base.bias.detach().clone()
            own.bias = nn.Parameter(bias)


def base_layer(module: Any) -> Any:
    """The projection inside the wrappers that LoRA puts around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def check_projections(name: str, attn: Any, linears: Iterable[str], method: str) -> None:
    """Make sure that an attention module's projections are plain ones, with nothing around them but LoRAs.

    Raises:
        UnsupportedModelError: one is quantised, or a LoRA is fused into it, or a DoRA.
    """
    for part in linears:
        outer = attn.get_submodule(part)
        base = base_layer(outer)
        if base is not outer:
            check_adapter(outer, method)
        weight: Any = getattr(base, "weight", None)
        plain = type(base) is nn.Linear and type(weight) in (nn.Parameter, torch.Tensor)
        if not plain or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise UnsupportedModelError(
                f"{name}.{part} is a {type(base).__name__} of {getattr(weight, 'dtype', 'no dtype')}: {method} does "
                "not stand in for quantised projections; load the model with these layers unquantised "
                "(modules_to_not_convert)."
            )


def check_adapter(outer: Any, method: str) -> None:
    """Make sure that a LoRA around a projection only adds to its result.

    Raises:
        UnsupportedModelError: it is fused, or a DoRA.
    """
    if getattr(outer, "merged", False):
        raise UnsupportedModelError(
            f"a LoRA is fused into projections that {method} brings its own weights for, where it has no effect; call "
            f"pipe.unfuse_lora() and leave it unfused, or disable {method}."
        )
    if any(getattr(outer, "use_dora", {}).values()):
        raise UnsupportedModelError(
            f"a DoRA adapter scales the base weights, which {method} replaces; use a plain LoRA, or disable {method}."
        )


def check_place(base_weights: str) -> None:
    """Make sure that ``base_weights`` is a place for the model's idle projections.

    Raises:
        ValueError: it is none.
    """
    if base_weights not in ("device", "cpu", "disk"):
        raise ValueError(f"base_weights={base_weights!r}: expected 'device', 'cpu' or 'disk'.")
