"""Modules of one kind on tensors of one shape cost the same, so one of them is run and the others repeat its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from diffusion_attn.planning.tracker import Tracker


@dataclass(frozen=True)
class _Cost:
    """What one run of a module cost; ``peak`` in bytes above what was live before, ``result`` makes the like of it."""

    flops: int
    attention_flops: int
    peak: int
    result: Callable[[list[torch.Tensor]], Any]


@contextmanager
def repeating(modules: list[nn.Module], tracker: Tracker) -> Iterator[None]:
    """Inside, of all calls of ``modules`` that are alike only the first one is run, with all hooks that are there."""
    costs: dict[Any, _Cost] = {}
    for module in modules:
        # The place in front of a module's hooks that torch keeps for its compiled form.
        module._compiled_call_impl = partial(_run, module, _kind(module), costs, tracker)
    try:
        yield
    finally:
        for module in modules:
            del module._compiled_call_impl  # the class's own again


def _kind(module: nn.Module) -> Any:
    """What tells modules apart: their weights, processors, and how many hooks methods have put where."""
    weights = tuple((name, tuple(x.shape), x.dtype) for name, x in module.named_parameters())
    parts = tuple(
        (type(part), type(getattr(part, "processor", None)), len(part._forward_pre_hooks), len(part._forward_hooks))
        for part in module.modules()
    )
    return weights, parts


def _run(module: Any, kind: Any, costs: dict[Any, _Cost], tracker: Tracker, *args: Any, **kwargs: Any) -> Any:
    leaves = tree_leaves((args, kwargs))
    given = [x for x in leaves if isinstance(x, torch.Tensor)]
    # What methods hand to a module tells of itself in its text, its tensors by their shapes.
    others = tuple(repr(x) for x in leaves if not isinstance(x, torch.Tensor))
    key = kind, others, tuple((x.shape, x.stride(), x.dtype, x.device) for x in given)
    if key not in costs:
        flops, attention_flops, live, peak = tracker.flops, tracker.attention_flops, tracker.live, tracker.peak
        tracker.peak = live
        out = module._call_impl(*args, **kwargs)
        costs[key] = _Cost(
            tracker.flops - flops,
            tracker.attention_flops - attention_flops,
            tracker.peak - live,
            _like(out, given),
        )
        tracker.peak = max(peak, tracker.peak)
        return out
    cost = costs[key]
    tracker.count(cost.attention_flops, attention=True)
    tracker.count(cost.flops - cost.attention_flops, attention=False)
    tracker.reach(cost.peak)
    return cost.result(given)


def _like(out: Any, given: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], Any]:
    """What makes tensors as ``out`` has them, sharing storages among them and with ``given`` as they do there."""
    places = {x.untyped_storage()._cdata: index for index, x in enumerate(given)}
    fresh: dict[int, int] = {}  # number of each storage that the module has made

    def describe(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage()
        place = places.get(storage._cdata)
        number = None if place is not None else fresh.setdefault(storage._cdata, len(fresh))
        return _View(place, number, int(storage.nbytes()), x.dtype, x.shape, x.stride(), int(x.storage_offset()))

    views = tree_map(describe, out)

    def make(given: list[torch.Tensor]) -> Any:
        made: dict[int, torch.Tensor] = {}
        return tree_map(lambda x: x.make(given, made) if isinstance(x, _View) else x, views)

    return make


@dataclass(frozen=True)
class _View:
    """A tensor of a storage: that of the ``place``-th of the tensors given, or else the ``number``-th of the new."""

    place: int | None
    number: int | None
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self, given: list[torch.Tensor], made: dict[int, torch.Tensor]) -> torch.Tensor:
        """The tensor, among ``given`` ones and those that were ``made`` already."""
        if self.place is not None:
            base = given[self.place]
        else:
            assert self.number is not None
            if self.number not in made:
                made[self.number] = torch.empty(self.nbytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
            base = made[self.number]
        return base.as_strided(self.shape, self.stride, self.offset)
