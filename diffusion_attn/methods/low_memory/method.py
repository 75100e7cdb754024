"""LowMemory: the same picture in less memory, by doing at a time what would otherwise be done at once.

After the low-memory inference of LinFusion's authors, which needs copies of the UNet's code; here all is module hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.method import Attachment, Plan, Target
from diffusion_attn.methods.low_memory.skips import PLACES, Park
from diffusion_attn.methods.low_memory.split import Split, SplitRows, SplitTokens


@dataclass(frozen=True)
class LowMemory:
    """Options of LowMemory, each a switch of its own; what is computed stays the same, up to rounding.

    It goes beside other methods. What looks from one row of a batch at another needs ``one_row=False``: the editing
    pipelines, PAG, and ``rng="reference"`` of agents and merging, which draws nothing for single rows. In compiled
    regions only ``one_row`` works, by breaking the graph.

    Args:
        one_row: guidance branches, and pictures that are drawn together, go through the denoiser one after the other.
        feed_forward_chunks: feed-forward layers take their tokens in so many parts; ``1`` is all at once.
        park_skips: where the way up of a UNet finds what the way down has left: ``"cpu"``, ``"disk"`` (a file of the
            temporary directory), or ``None``, where it is computed. What a ControlNet has added to is not parked.
        in_place: activations in residual blocks of UNets write over their input.
    """

    name: ClassVar[str] = "low_memory"
    exact: ClassVar[bool] = True
    """Its output is the plain model's, which a bench makes sure of."""

    one_row: bool = True
    feed_forward_chunks: int = 16
    park_skips: str | None = "cpu"
    in_place: bool = True

    def __post_init__(self) -> None:
        if self.feed_forward_chunks < 1:
            raise ValueError(f"feed_forward_chunks={self.feed_forward_chunks}: expected 1 or more.")
        if self.park_skips not in (None, *PLACES):
            raise ValueError(f"park_skips={self.park_skips!r}: expected one of {', '.join(PLACES)}, or None.")
        if not (self.one_row or self.feed_forward_chunks > 1 or self.park_skips or self.in_place):
            raise ValueError("all switches are off, so nothing is left to enable.")

    def plan(self, target: Target) -> Plan:
        """Find the modules; see `Method.plan`.

        Raises:
            UnsupportedModelError: nothing of the denoiser's kind is known here.
        """
        from diffusers.models.attention import FeedForward
        from diffusers.models.resnet import ResnetBlock2D

        denoiser: Any = target.denoiser
        down, first = getattr(denoiser, "down_blocks", ()), getattr(denoiser, "conv_in", None)
        if not (len(down) or hasattr(denoiser, "transformer_blocks")):
            raise UnsupportedModelError(
                f"{type(denoiser).__name__} is neither a UNet nor a transformer that LowMemory knows; give the "
                "denoiser of a pipeline."
            )
        found: dict[str, list[nn.Module]] = {"rows": [denoiser] if self.one_row else []}
        modules = list(denoiser.modules())
        found["tokens"] = [x for x in modules if isinstance(x, FeedForward)] if self.feed_forward_chunks > 1 else []
        parks = self.park_skips is not None and len(down) > 0
        found["blocks"] = list(down) if parks else []
        found["convolution"] = [first] if parks and first is not None else []
        activations = [x.nonlinearity for x in modules if isinstance(x, ResnetBlock2D)]
        activations += [denoiser.conv_act] if hasattr(denoiser, "conv_act") else []
        found["activations"] = [x for x in activations if isinstance(x, nn.SiLU)] if self.in_place else []

        touched = {id(module) for modules in found.values() for module in modules}
        layers = [name for name, module in denoiser.named_modules() if id(module) in touched]
        return Plan(layers, _Install(self, found), reads_steps=False)


@dataclass(frozen=True)
class _Install:
    """Puts a `LowMemory` in force on the modules that were found for it."""

    method: LowMemory
    found: dict[str, list[nn.Module]]

    def __call__(self, attachment: Attachment) -> None:
        splits: list[tuple[nn.Module, Split]] = [(module, SplitRows()) for module in self.found["rows"]]
        splits += [(module, SplitTokens(self.method.feed_forward_chunks)) for module in self.found["tokens"]]
        for module, split in splits:
            attachment.before(module, split.before, kwargs=True, first=True)
            attachment.after(module, split.after, last=True)
        if self.method.park_skips:
            park = Park(self.method.park_skips)
            for module in self.found["blocks"]:
                attachment.after(module, park.block)
            for module in self.found["convolution"]:
                attachment.after(module, park.convolution)
        for module in self.found["activations"]:
            over = _WriteOver(module)
            attachment.before(module, over.begin)
            attachment.after(module, over.end)
            attachment.when_undone(over.end)


class _WriteOver:
    """Lets an activation work in place for as long as it works on feature maps.

    The time embedding, of two dimensions, is the input of other blocks too. Compiled regions are left alone.
    """

    def __init__(self, activation: Any) -> None:
        self.activation, self.own = activation, activation.inplace

    def begin(self, module: nn.Module, args: tuple) -> None:
        if args[0].ndim == 4 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.activation.inplace = True

    def end(self, *call: Any) -> None:
        if not torch.compiler.is_compiling():
            self.activation.inplace = self.own
