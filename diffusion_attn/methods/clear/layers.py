"""CLEAR's weights: one attention layer, and the published format."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import CheckpointFormatError
from diffusion_attn.methods.stand_in import base_layer, copy_weights

LAYER = re.compile(r"((?:single_)?transformer_blocks\.\d+\.attn2?)\.(.+)")
"""A published key: the layer, and the tensor in it."""

SPATIAL = "processor.spatial_weight"
"""The published name, in its layer, of what pools keys and values."""


class ClearLayer(nn.Module):
    """The weights of one layer, by the attention module's names; the computation is its processor's.

    Args:
        width: channels in.
        inner: channels of queries, keys and values.
        out: there is an output projection.
        bias: the projections of queries, keys and values have one.
        down_factor: side of the cells that ``spatial_weight`` pools, 1 for none.
    """

    def __init__(self, width: int, inner: int, out: bool, bias: bool = True, down_factor: int = 1) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=bias) for _ in range(3))
        if out:
            self.to_out = nn.ModuleList([nn.Linear(inner, width)])
        if down_factor > 1:
            mean = torch.full((1, 1, 1, down_factor, 1, down_factor, 1), down_factor**-2.0)
            self.spatial_weight = nn.Parameter(mean)

    @classmethod
    def like(cls, attn: Any, down_factor: int = 1) -> ClearLayer:
        """A layer of the shape of an attention module."""
        query: Any = base_layer(attn.to_q)
        has_out = getattr(attn, "to_out", None) is not None
        return cls(query.in_features, query.out_features, has_out, query.bias is not None, down_factor)

    def start_from(self, attn: Any) -> None:
        """Copy an attention module's own projections."""
        for name in linears(self):
            copy_weights(self.get_submodule(name), attn.get_submodule(name))  # type: ignore[arg-type]


def linears(attn: nn.Module) -> list[str]:
    """Names of the projections that CLEAR trains: the image's, and in single blocks those of text and image."""
    return ["to_q", "to_k", "to_v", *(["to_out.0"] if getattr(attn, "to_out", None) is not None else [])]


class ClearWeights(nn.ModuleDict):
    """Layers by name, and their tensors by the published names."""

    def published(self) -> dict[str, torch.Tensor]:
        """The live tensors by their published names."""
        return {
            f"{layer_name(key)}.{SPATIAL if name == 'spatial_weight' else name}": tensor
            for key, layer in self.items()
            for name, tensor in layer.state_dict(keep_vars=True).items()
        }

    def layers(self) -> Iterator[tuple[str, ClearLayer]]:
        """``(name, layer)``."""
        for key, layer in self.items():
            assert isinstance(layer, ClearLayer)
            yield layer_name(key), layer

    @classmethod
    def of(cls, layers: Iterable[tuple[str, ClearLayer]]) -> ClearWeights:
        """From ``(name, layer)``."""
        return cls({name.replace(".", "/"): layer for name, layer in layers})

    @classmethod
    def parse(cls, tensors: Mapping[str, torch.Tensor], what: str) -> tuple[ClearWeights, int]:
        """Layers that hold tensors of the published names, and their down factor.

        Raises:
            CheckpointFormatError: names or shapes are not those of the format.
        """
        found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        unknown = []
        for key, tensor in tensors.items():
            match = LAYER.fullmatch(key)
            if match is None:
                unknown.append(key)
            else:
                found[match[1]][match[2]] = tensor
        if not tensors:
            raise CheckpointFormatError(f"{what}: there are no tensors; get the file again.")
        if unknown:
            raise CheckpointFormatError(
                f"{what}: {len(unknown)} keys are not CLEAR's ({', '.join(unknown[:4])}), {len(found)} layers "
                "are there; give a file of the published format, keys like transformer_blocks.0.attn.to_q.weight."
            )
        factor = max(_down_factor(layer, what) for layer in found.values())
        with torch.device("meta"):
            layers = {name: _empty(layer, factor) for name, layer in found.items()}
        return cls.of(layers.items()), factor

    def adopt(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold ``tensors`` of the published names, which have been checked."""
        for name, layer in self.layers():
            part = {key: tensors[f"{name}.{SPATIAL if key == 'spatial_weight' else key}"] for key in layer.state_dict()}
            layer.load_state_dict(part, assign=True)


def layer_name(key: str) -> str:
    """The module path of a layer from its key in `ClearWeights`, which may hold no dots."""
    return key.replace("/", ".")


def _down_factor(layer: Mapping[str, torch.Tensor], what: str) -> int:
    spatial = layer.get(SPATIAL)
    if spatial is None:
        return 1
    if spatial.ndim != 7 or tuple(spatial.shape) != (1, 1, 1, spatial.shape[3], 1, spatial.shape[3], 1):
        raise CheckpointFormatError(
            f"{what}: {SPATIAL} is {tuple(spatial.shape)}, expected (1, 1, 1, d, 1, d, 1); give weights of the format."
        )
    return int(spatial.shape[3])


def _empty(layer: Mapping[str, torch.Tensor], factor: int) -> ClearLayer:
    query, out = layer.get("to_q.weight"), "to_out.0.weight" in layer
    inner, width = query.shape if query is not None and query.ndim == 2 else (1, 1)
    return ClearLayer(width, inner, out, "to_q.bias" in layer, factor)
