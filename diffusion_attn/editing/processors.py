"""The processors that carry a control into a denoiser, one for each family, and their coming and going."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from torch import nn

from diffusion_attn.core.enable import eager
from diffusion_attn.core.errors import MethodConflictError
from diffusion_attn.core.processors import HeldProcessor, check_exact, is_held
from diffusion_attn.editing.layers import AttentionLayer
from diffusion_attn.processors.joint import JointAttnProcessor
from diffusion_attn.processors.unet import UNetAttnProcessor

ADAPTERS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
"""What diffusers puts on a cross-attention with image adapters."""

Fused = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


class Control(Protocol):
    """Decides what a layer computes."""

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        fused: Fused,
    ) -> torch.Tensor:
        """``(batch, tokens, heads, head_dim)`` from the same; ``fused`` is the layer's own way."""
        ...


@contextmanager
def controlled(denoiser: nn.Module, layers: Sequence[AttentionLayer], control: Control) -> Iterator[None]:
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


class _Controlled:
    """Attention of one layer as ``control`` wants it; exact without one, which is what loaders leave."""

    def __init__(self, layer: AttentionLayer | None = None, control: Control | None = None) -> None:
        super().__init__()
        self.layer, self.control = layer, control

    def attend_exactly(self, *tensors: Any, **options: Any) -> torch.Tensor:
        """What stands for exact attention here."""
        return self.under_control(self.layer, *tensors, **options)

    def under_control(self, layer: AttentionLayer | None, *tensors: Any, **options: Any) -> torch.Tensor:
        """Attention of query, key, value and mask, as it is computed for ``layer``."""
        fused: Fused = partial(super().attend_exactly, **options)  # type: ignore[misc]
        if self.control is None or layer is None:
            return fused(*tensors)
        query, key, value, mask = tensors
        return self.control.attend(layer, query, key, value, mask, fused)


class ControlledAttnProcessor(_Controlled, UNetAttnProcessor):
    """For the layers of UNets."""


class ControlledJointAttnProcessor(_Controlled, JointAttnProcessor):
    """For those of FLUX and SD3."""


class ControlledIPAdapterAttnProcessor(IPAdapterAttnProcessor2_0):
    """For cross-attention with image adapters, whose weights and scales stay those of ``adapter``."""

    def __init__(self, adapter: Any, layer: AttentionLayer, control: Control) -> None:
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

    def __init__(self, layer: AttentionLayer, control: Control, adapter: ControlledIPAdapterAttnProcessor) -> None:
        super().__init__(layer, control)
        self.images = replace(layer, kind="image")
        self.adapter = adapter

    def attend(
        self, attn: Any, query: torch.Tensor, *args: Any, images: Any = (), masks: Any = (), **kwargs: Any
    ) -> torch.Tensor:
        out = super().attend(attn, query, *args, **kwargs)
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
                picture = self.under_control(self.images, query, picture_key, picture_value, None)
                out = out + factor * (picture if mask is None else picture * _shown(mask[:, index], picture))
        return out


def _shown(mask: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Where an adapter's picture is to be seen, beside ``(batch, tokens, heads, head_dim)``."""
    from diffusers.image_processor import IPAdapterMaskProcessor

    tokens = IPAdapterMaskProcessor.downsample(mask, len(picture), picture.shape[1], 1)
    return tokens.to(picture)[..., None]


def _processor(layer: AttentionLayer, control: Control) -> Any:
    current = layer.attn.processor
    if isinstance(current, ADAPTERS):
        return ControlledIPAdapterAttnProcessor(current, layer, control)
    if is_held(current):
        raise MethodConflictError(
            f"{layer.name} is computed by a method in force ({type(current).__name__}), which has no attention map to "
            "record or edit; disable it, or leave self-attention alone with self_replace_steps=0."
        )
    check_exact(layer.name, current)
    kind = ControlledJointAttnProcessor if layer.kind == "joint" else ControlledAttnProcessor
    return kind(layer, control)
