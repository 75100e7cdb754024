"""What code costs that runs on the meta device: its FLOPs, those of attention apart, and the most memory at a time.

Tensors there have shapes and storages but no data, so that a pass over a million tokens takes no memory and little
time, and what is counted is the real code, with the lifetimes that its tensors really have.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

_ONEDNN_BLOCK = 16  # channels that oneDNN keeps together


class Tracker(TorchDispatchMode):
    """Counts what is computed from meta tensors inside its ``with`` block; real tensors are computed, not counted.

    Attributes:
        flops: of products, by the formulas of ``torch.utils.flop_counter``; what works element by element has none.
        attention_flops: of those, products of activations with activations: all others are products with weights.
        live: bytes of the storages that were made inside and still exist; views share one.
        peak: the most that ``live`` was, with the workspace of an operation while it ran.

    ``scaled_dot_product_attention`` costs what a fused kernel does: no scores are kept.

    Args:
        cpu: count the workspace of oneDNN's convolutions, as they have it on a CPU. That of cuDNN depends on the device
            and is not counted. Neither is what allocators keep besides: glibc's heap, with tensors below 32 MB, was
            seen to keep 0.4 to 0.9 times as much again, unless MALLOC_MMAP_THRESHOLD_ forbids it.
    """

    def __init__(self, cpu: bool = False) -> None:
        super().__init__()
        self.cpu = cpu
        self.flops = self.attention_flops = 0
        self.live = self.peak = 0
        self._storages: set[int] = set()
        self._fused = _FusedAttention(self)

    def __enter__(self) -> Tracker:
        super().__enter__()
        self._fused.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._fused.__exit__(*error)
        super().__exit__(*error)

    def reset(self) -> None:
        """Count from nothing again; what is live, stays so."""
        self.flops = self.attention_flops = 0
        self.peak = self.live

    def count(self, flops: int, attention: bool) -> None:
        """Add FLOPs."""
        self.flops += flops
        self.attention_flops += flops if attention else 0

    def reach(self, extra: int) -> None:
        """So many bytes more than what is live are in use for a moment."""
        self.peak = max(self.peak, self.live + extra)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        given = _tensors((*args, *kwargs.values()))
        if any(type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for x in given):
            return NotImplemented  # tensors that know what they are made of: what they do comes here next
        if len({x.is_meta for x in given}) == 2:
            # Timesteps and positions are real, so that they can be read, until they meet what is not.
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        before = self.live
        out = func(*args, **kwargs)
        new = [x for x in _tensors((out,)) if x.is_meta]
        if new:
            known = {x.untyped_storage()._cdata for x in given}
            products = flop_registry.get(func.overloadpacket)
            if products is not None:
                self.count(products(*args, **kwargs, out_val=out), known <= self._storages)
            for x in new:
                self._see(x.untyped_storage(), known)
            if self.cpu and func is aten.convolution.default:
                self.peak = max(self.peak, before + _onednn_peak(args[0], args[1], out))
        return out

    def _see(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self._storages:  # a view, or changed in place
            return
        self._storages.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, storage.nbytes()).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Takes attention before torch does it in steps, as it would on the meta device."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _attention_inputs(*args, **kwargs)[0].is_meta:
            return self._attend(*_attention_inputs(*args, **kwargs))
        return func(*args, **kwargs)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        *batch, queries, dim = query.shape
        pairs = torch.Size(batch).numel() * queries * key.shape[-2]
        self.tracker.count(2 * pairs * (dim + value.shape[-1]), attention=True)
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(query.dtype)  # kernels add a mask to the scores
        # Kernels write (batch, tokens, heads, head_dim), which needs no copy where heads are joined again.
        out = query.new_empty(*batch[:-1], queries, batch[-1], value.shape[-1]).transpose(-2, -3)
        self.tracker.reach(4 * out.shape[:-1].numel())  # beside it float32 logarithms of the rows' sums
        return out


def _attention_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return query, key, value, attn_mask


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Those among arguments of an operation, and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _to_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, torch.Tensor) and not x.is_meta else x


def _onednn_peak(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
    """Bytes of a convolution on a CPU from its start on, its result among them.

    oneDNN works on copies of input and result whose channels come in blocks; the input's is freed before the result is
    copied back. 1 x 1 convolutions in float32 need none. (Measured on x86 with AVX-512, torch 2.13.)
    """
    if weight.shape[2:].numel() == 1 and x.dtype == torch.float32:
        return out.nbytes
    blocked_out = _blocked(out)
    return blocked_out + max(_blocked(x), out.nbytes) + weight.nbytes


def _blocked(x: torch.Tensor) -> int:
    return x.nbytes // x.shape[1] * -(-x.shape[1] // _ONEDNN_BLOCK) * _ONEDNN_BLOCK
