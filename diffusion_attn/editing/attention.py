"""One forward pass under control: attention maps that are recorded or edited, everything else in the fused kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.controls import PromptEdit
from diffusion_attn.editing.layers import AttentionLayer, Kind, attention_layers, grid_of, reduced
from diffusion_attn.editing.processors import Fused, controlled


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

    A batch is ``[unconditional rows, conditional rows]``. Only conditional rows are edited and recorded, in that order:
    what is recorded is what was computed with. The sampling loop sets ``step``, and ``recording`` where it does not
    want the maps of every step.

    Args:
        size: ``(height, width)`` of the latent.
        edits: of the prompts of the rows: one edit of all rows, the source's first, or one for each pair of a source
            and a target, all sources first. Several have their windows of self- and image attention in common.
        recorders: take the maps.
        rows: how many are conditional, the last ones; ``None``: all.
    """

    def __init__(
        self,
        size: Size,
        edits: Sequence[PromptEdit] = (),
        recorders: Sequence[MapRecorder] = (),
        rows: int | None = None,
    ) -> None:
        self.size, self.edits, self.recorders, self.rows = size, list(edits), recorders, rows
        self.step = 0
        self.recording = True

    def touches(self, layer: AttentionLayer) -> bool:
        """Whether there can be something to do at ``layer``; others keep their processor."""
        grid = reduced(self.size, layer.factor)
        if any(recorder.wants(layer.kind, grid) for recorder in self.recorders):
            return True
        if not self.edits:
            return False
        return layer.kind == "cross" or self.edits[0].ever_copies(grid[0] * grid[1])

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
        first = 0 if self.rows is None else len(query) - self.rows
        grid = grid_of(query.shape[1], self.size)
        recorders = [recorder for recorder in self.recorders if self.recording and recorder.wants(layer.kind, grid)]
        pairs = len(self.edits)
        if layer.kind == "cross" and any(edit.edits_words(self.step) for edit in self.edits):
            maps = probabilities(query[first:], key[first:], _rows(mask, first))
            rows = [edit.edit(maps[pair::pairs], kind="cross", step=self.step) for pair, edit in enumerate(self.edits)]
            maps = torch.stack(rows, 1).flatten(0, 1)
            mean = maps.mean(1)
            edited = (maps.to(value.dtype) @ value[first:].transpose(1, 2)).transpose(1, 2)
            plain = fused(query[:first], key[:first], value[:first], _rows(mask, 0, first)) if first else edited[:0]
            out = torch.cat([plain, edited])
        else:
            if (
                self.edits
                and layer.kind in ("self", "image")
                and self.edits[0].copies(layer.kind, self.step, query.shape[1])
            ):
                query, key = (_copied(x, first, pairs) for x in (query, key))
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


def _resized(maps: torch.Tensor, size: Size) -> torch.Tensor:
    """Maps ``(rows, H, W, keys)`` at another size."""
    if tuple(maps.shape[1:3]) == size:
        return maps
    return F.interpolate(maps.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)


def _copied(x: torch.Tensor, first: int, sources: int) -> torch.Tensor:
    """``(batch, ...)`` with the sources' rows, the first conditional ones, in all conditional rows."""
    copies = (len(x) - first) // sources
    return torch.cat([x[:first], *[x[first : first + sources]] * copies])


def _rows(mask: torch.Tensor | None, first: int, end: int | None = None) -> torch.Tensor | None:
    return None if mask is None else mask[first:end]
