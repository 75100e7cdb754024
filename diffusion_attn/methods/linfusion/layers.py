"""The weights of LinFusion: one layer, how layers are described, and the base models that published ones belong to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from diffusion_attn.core.errors import CheckpointFormatError
from diffusion_attn.core.unet_layout import spatial_self_attentions
from diffusion_attn.methods.stand_in import base_layer, copy_weights

_WIDEST = 2**16


@dataclass(frozen=True)
class LayerConfig:
    """One entry of ``modules_list`` in a published ``config.json``, under its published names.

    Attributes:
        module_name: of the ``attn1`` that the layer stands in for, relative to the UNet.
        dim_n: width, in channels.
        heads: number of heads.
        projection_mid_dim: width inside the two projections; ``None``: ``dim_n``; ``-1``: no projections.
    """

    module_name: str
    dim_n: int
    heads: int
    projection_mid_dim: int | None = None

    @classmethod
    def parse(cls, entry: Any) -> LayerConfig:
        """An entry of a config file, in today's form or as the older ``[name, width, heads]``.

        Raises:
            CheckpointFormatError: it is neither.
        """
        try:
            config = cls(**entry) if isinstance(entry, dict) else cls(*entry)
        except TypeError:
            config = None
        if config is None or not config.is_valid():
            raise CheckpointFormatError(
                f"config.json has {entry!r} in modules_list; expected module_name, dim_n, heads and "
                "projection_mid_dim, as LinFusion's published folders have it."
            )
        return config

    def is_valid(self) -> bool:
        """Whether every value is one that a layer can be built of."""
        mid = self.projection_mid_dim
        counts = (self.dim_n, self.heads, *([] if mid in (None, -1) else [mid]))
        return isinstance(self.module_name, str) and all(
            type(count) is int and 0 < count <= _WIDEST for count in counts
        )


class LinFusionLayer(nn.Module):
    """The weights of one layer, under their published names; the computation is its processor's.

    Args:
        width: channels in and out.
        mid_dim: width inside the projections of queries and keys, ``None`` for ``width``, ``-1`` for none: the sum of
            input and projection is then twice the input, as in the official code.
    """

    def __init__(self, width: int, mid_dim: int | None = None) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_q_ = _projection(width, mid_dim)
        self.to_k_ = _projection(width, mid_dim)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def start_from(self, attn: Any) -> None:
        """Copy an attention module's own weights; the projections add nothing until they are trained."""
        for name in LINEARS:
            copy_weights(self.get_submodule(name), attn.get_submodule(name))  # type: ignore[arg-type]
        for projection in (self.to_q_, self.to_k_):
            if isinstance(projection, nn.Sequential):
                for parameter in projection[-1].parameters():
                    nn.init.zeros_(parameter)


LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of an attention module that a layer brings its own weights for."""


def _projection(width: int, mid_dim: int | None) -> nn.Module:
    if mid_dim == -1:
        return nn.Identity()
    mid = width if mid_dim is None else mid_dim
    return nn.Sequential(nn.Linear(width, mid), nn.LayerNorm(mid), nn.LeakyReLU(), nn.Linear(mid, width))


# ---- base models


@dataclass(frozen=True)
class Base:
    """A base model that weights are published for: told by layers, ``heads`` of each width, and the prompts' width."""

    name: str
    weights: str
    layers: int
    cross_attention_dim: int
    heads: frozenset[tuple[int, int]]


BASES = (
    Base("Stable Diffusion 1.x", "Yuanshi/LinFusion-1-5", 16, 768, frozenset({(320, 8), (640, 8), (1280, 8)})),
    Base("Stable Diffusion 2.x", "Yuanshi/LinFusion-2-1", 16, 1024, frozenset({(320, 5), (640, 10), (1280, 20)})),
    Base("Stable Diffusion XL", "Yuanshi/LinFusion-XL", 70, 2048, frozenset({(640, 10), (1280, 20)})),
    Base("shapes-sd", "shapes-linfusion", 10, 128, frozenset({(48, 4), (96, 4)})),
)
"""The published checkpoints, and the embedded one."""


def describe_layers(layers: Iterable[LayerConfig]) -> str:
    """Layers in a few words: of which base model they are, how many, and their heads by width."""
    layers = list(layers)
    heads = {(layer.dim_n, layer.heads) for layer in layers}
    base = next((base.name for base in BASES if base.heads == heads), "a model of its own")
    told = ", ".join(f"{count} of {width}" for width, count in sorted(heads))
    return f"{base} ({len(layers)} layers, heads {told} channels)"


def layers_of(unet: Any) -> list[LayerConfig]:
    """A UNet's layers in the published order, without projections."""
    return [
        LayerConfig(name, base_layer(attn.to_q).in_features, cast(Any, attn).heads)
        for name, attn in spatial_self_attentions(unet)
    ]
