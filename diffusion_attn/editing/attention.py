"""One forward pass under control: attention maps that are recorded or edited, everything else in the fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from torch import nn

from diffusion_attn.core.enable import eager
from diffusion_attn.core.errors import MethodConflictError, UnsupportedModelError
from diffusion_attn.core.processors import HeldProcessor, check_exact, is_held
from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.controls import PromptEdit
from diffusion_attn.editing.layers import AttentionLayer, Kind, attention_layers, grid_of, reduced
from diffusion_attn.processors.joint import JointAttnProcessor
from diffusion_attn.processors.unet import UNetAttnProcessor, full_mask

Fused = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


class MapRecorder:
    """The mean over heads and layers of one kind of attention, in the forward passes so far.

    Gradients flow through what it takes, where they are on.

    Args:
        kind: of attention.
        size: ``(height, width)`` of the layers to take; ``None``: all, brought to the size of the finest.
    """

    def __init__(self, kind: Kind, size: Size | None = None) -> None:
        self.kind, self.size = kind, size
        self.begin()

    def begin(self) -> None:
        """Forget what was taken, by a forward pass that failed or by a layer that a backward pass ran again."""
        self._sums: dict[Size, torch.Tensor] = {}
        self._layers = 0

    def wants(self, kind: Kind, grid: Size) -> bool:
        """Whether it takes a layer."""
        return kind == self.kind and self.size in (None, grid)

    def add(self, maps: torch.Tensor, grid: Size) -> None:
        """Take the map ``(rows, queries, keys)`` of one layer, the mean of its heads."""
        self._sums[grid] = self._sums[grid] + maps if grid in self._sums else maps
        self._layers += 1

    def take(self) -> torch.Tensor:
        """``(rows, height, width, keys)``, and begin again."""
        finest = max(self._sums)
        levels = [_resized(maps.unflatten(1, grid), finest) for grid, maps in self._sums.items()]
        mean = torch.stack(levels).sum(0) / self._layers
        self.begin()
        return mean


class AttentionControl:
    """What a forward pass of a UNet does with its attention maps.

    A batch is ``[unconditional rows, conditional rows]`` when ``guided``, else conditional rows only. Only conditional
    rows are edited and recorded, in that order: what is recorded is what was computed with. The sampling loop sets
    ``step``.

    Args:
        size: ``(height, width)`` of the latent.
        edit: of the prompts of the rows, the source's first.
        recorders: take the maps.
        guided: how the batch is laid out.
    """

    def __init__(
        self, size: Size, edit: PromptEdit | None = None, recorders: Sequence[MapRecorder] = (), guided: bool = True
    ) -> None:
        self.size, self.edit, self.recorders, self.guided = size, edit, recorders, guided
        self.step = 0

    def touches(self, layer: AttentionLayer) -> bool:
        """Whether there can be something to do at ``layer``; others keep their processor."""
        grid = reduced(self.size, layer.factor)
        if any(recorder.wants(layer.kind, grid) for recorder in self.recorders):
            return True
        if self.edit is None:
            return False
        return layer.kind == "cross" or self.edit.ever_copies(grid[0] * grid[1])

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        fused: Fused,
    ) -> torch.Tensor:
        """``(batch, tokens, heads, head_dim)`` from the same, and the map where somebody wants it."""
        first = len(query) // 2 if self.guided else 0
        grid = grid_of(query.shape[1], self.size)
        recorders = [recorder for recorder in self.recorders if recorder.wants(layer.kind, grid)]
        edit = self.edit
        if edit is not None and layer.kind == "cross" and edit.edits_words(self.step):
            maps = probabilities(query[first:], key[first:], _rows(mask, first))
            maps = edit.edit(maps, kind="cross", step=self.step)
            mean = maps.mean(1)
            edited = (maps.to(value.dtype) @ value[first:].transpose(1, 2)).transpose(1, 2)
            plain = fused(query[:first], key[:first], value[:first], _rows(mask, 0, first)) if first else edited[:0]
            out = torch.cat([plain, edited])
        else:
            if (
                edit is not None
                and layer.kind in ("self", "image")
                and edit.copies(layer.kind, self.step, query.shape[1])
            ):
                query, key = (_copied(x, first) for x in (query, key))
            out = fused(query, key, value, mask)
            if not recorders:
                return out
            mean = mean_map(query[first:], key[first:], _rows(mask, first))
        for recorder in recorders:
            recorder.add(mean, grid)
        return out

    @contextmanager
    def on(self, unet: nn.Module) -> Iterator[None]:
        """Be in force on ``unet`` for a block of code; afterwards every layer has the processor it had.

        Raises:
            UnsupportedModelError: the UNet has no maps of the size of a recorder.
            MethodConflictError: a layer is computed by somebody else.
        """
        layers = list(attention_layers(unet))
        for recorder in self.recorders:
            sizes = {reduced(self.size, layer.factor) for layer in layers if layer.kind == recorder.kind}
            if recorder.size is not None and recorder.size not in sizes:
                raise UnsupportedModelError(
                    f"map_size is {recorder.size}, and the {recorder.kind}-attention of this UNet has maps of "
                    f"{' and '.join(map(str, sorted(sizes)))} for a latent of {self.size}; give one of these."
                )
        with controlled(unet, [layer for layer in layers if self.touches(layer)], self):
            yield


@contextmanager
def controlled(denoiser: nn.Module, layers: Sequence[AttentionLayer], control: Any) -> Iterator[None]:
    """Have ``control.attend`` compute ``layers`` for a block of code, uncompiled.

    Raises:
        MethodConflictError: a layer is computed by a method in force or somebody else's processor.
    """
    processors = [_processor(layer, control) for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(eager(denoiser))
        for layer, processor in zip(layers, processors, strict=True):
            held = HeldProcessor(layer.name, layer.attn, processor)
            stack.callback(held.release)
            layer.attn.set_processor(processor)
        yield


def probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention probabilities ``(batch, heads, queries, keys)`` in float32, of ``(batch, tokens, heads, head_dim)``."""
    # Products of half-precision numbers can be too large for them.
    query = query.transpose(1, 2).float() * query.shape[-1] ** -0.5
    scores = query @ key.permute(0, 2, 3, 1).float()
    return (scores if mask is None else scores + mask).softmax(-1)


def mean_map(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None, keys: int | None = None
) -> torch.Tensor:
    """The mean over heads of `probabilities`, ``(batch, queries, keys)``, of the first ``keys`` keys alone.

    One head at a time: between the tokens of a picture, a map of all heads can be larger than the model.
    """
    heads = query.shape[2]
    total = torch.zeros((), device=query.device)
    for head in range(heads):
        one = slice(head, head + 1)
        rows = mask if mask is None or mask.shape[1] == 1 else mask[:, one]
        total = total + probabilities(query[:, :, one], key[:, :, one], rows)[:, 0, :, :keys]
    return total / heads


class ControlledAttnProcessor(UNetAttnProcessor):
    """Attention of one layer as ``control`` wants it; exact without one, which is what loaders leave."""

    def __init__(self, layer: AttentionLayer | None = None, control: Any = None) -> None:
        super().__init__()
        self.layer, self.control = layer, control

    def attend(  # noqa: D102
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cross: bool,
        **kwargs: Any,
    ) -> torch.Tensor:
        mask = full_mask(attn, attention_mask, key)
        if self.control is None:
            return self.attend_exactly(query, key, value, mask)
        return self.control.attend(self.layer, query, key, value, mask, self.attend_exactly)


class ControlledJointAttnProcessor(JointAttnProcessor):
    """The same for the layers of FLUX and SD3."""

    def __init__(self, layer: AttentionLayer | None = None, control: Any = None) -> None:
        super().__init__()
        self.layer, self.control = layer, control

    def attend(  # noqa: D102
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.control is None:
            return self.attend_exactly(query, key, value, attention_mask)
        return self.control.attend(self.layer, query, key, value, attention_mask, self.attend_exactly)


class ControlledIPAdapterAttnProcessor(IPAdapterAttnProcessor2_0):
    """The same for a cross-attention with image adapters, whose weights and scales stay those of ``adapter``."""

    def __init__(self, adapter: Any, layer: AttentionLayer, control: Any) -> None:
        nn.Module.__init__(self)
        self.hidden_size, self.cross_attention_dim = adapter.hidden_size, adapter.cross_attention_dim
        self.num_tokens = adapter.num_tokens
        self.to_k_ip, self.to_v_ip = adapter.to_k_ip, adapter.to_v_ip
        self.__dict__["adapter"] = adapter  # beside the modules: its weights are in the tree already
        self.inner = _WithImages(layer, control, self)

    adapter: Any

    @property
    def scale(self) -> Any:
        """Of each adapter, a number or one for each of its pictures; setting it sets the adapter's."""
        return self.adapter.scale

    @scale.setter
    def scale(self, scale: Any) -> None:
        self.adapter.scale = scale

    def __call__(  # noqa: D102
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor:
        text, images = encoder_hidden_states
        masks = ip_adapter_masks if ip_adapter_masks is not None else [None] * len(images)
        return self.inner(attn, hidden_states, text, attention_mask, temb, images=images, masks=masks)


class _WithImages(ControlledAttnProcessor):
    """Attention to the prompt, plus that to each picture of each adapter."""

    def __init__(self, layer: AttentionLayer, control: Any, adapter: ControlledIPAdapterAttnProcessor) -> None:
        super().__init__(layer, control)
        self.images = replace(layer, kind="image")
        self.adapter = adapter

    def attend(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cross: bool,
        images: Any = (),
        masks: Any = (),
        **kwargs: Any,
    ) -> torch.Tensor:
        out = super().attend(attn, query, key, value, attention_mask, cross)
        adapter = self.adapter
        for states, mask, scale, to_k, to_v in zip(
            images, masks, adapter.scale, adapter.to_k_ip, adapter.to_v_ip, strict=True
        ):
            scales = scale if isinstance(scale, list) else [scale]
            if not any(scales):
                continue
            # Without masks all pictures of an adapter are one sequence, and have one scale.
            parts = [states] if mask is None else states.unbind(1)
            scales = scales * len(parts) if len(scales) == 1 else scales
            for index, (part, factor) in enumerate(zip(parts, scales, strict=mask is not None)):
                picture_key, picture_value = (
                    project(part).reshape(len(query), -1, *query.shape[2:]) for project in (to_k, to_v)
                )
                picture = self.control.attend(self.images, query, picture_key, picture_value, None, self.attend_exactly)
                out = out + factor * (picture if mask is None else picture * _shown(mask[:, index], picture))
        return out


def _shown(mask: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Where an adapter's picture is to be seen, beside ``(batch, tokens, heads, head_dim)``."""
    from diffusers.image_processor import IPAdapterMaskProcessor

    tokens = IPAdapterMaskProcessor.downsample(mask, len(picture), picture.shape[1], 1)
    return tokens.to(picture)[..., None]


def _processor(layer: AttentionLayer, control: Any) -> Any:
    current = layer.attn.processor
    if isinstance(current, (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)):
        return ControlledIPAdapterAttnProcessor(current, layer, control)
    if is_held(current):
        raise MethodConflictError(
            f"{layer.name} is computed by a method in force ({type(current).__name__}), which has no attention map to "
            "record or edit; disable it, or leave self-attention alone with self_replace_steps=0."
        )
    check_exact(layer.name, current)
    kind = ControlledJointAttnProcessor if layer.kind == "joint" else ControlledAttnProcessor
    return kind(layer, control)


def _resized(maps: torch.Tensor, size: Size) -> torch.Tensor:
    """Maps ``(rows, H, W, keys)`` at another size."""
    if tuple(maps.shape[1:3]) == size:
        return maps
    return F.interpolate(maps.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)


def _copied(x: torch.Tensor, first: int) -> torch.Tensor:
    """``(batch, ...)`` with the source's row, the first conditional one, in all conditional rows."""
    return torch.cat([x[:first], x[first : first + 1].expand_as(x[first:])])


def _rows(mask: torch.Tensor | None, first: int, end: int | None = None) -> torch.Tensor | None:
    return None if mask is None else mask[first:end]
