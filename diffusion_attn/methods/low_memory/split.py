"""A module that works on its input in parts, one after another, and returns the whole."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from diffusion_attn.core.session import bind_call

SHARED = ("img_ids", "txt_ids", "ip_adapter_masks")
"""Arguments of denoisers that all rows of a batch share, whatever their first dimension is."""

SEVERAL = ("encoder_hidden_states",)
"""Those that have several rows for each of the batch where it is one of videos."""

Call = tuple[tuple, dict[str, Any]]


class Split:
    """A pair of hooks that have a module compute its input in parts: `before` all others and `after` all others.

    All parts but the last are computed by calling the module from within the first hook, the hooks of others included;
    the last is what the call goes on with; the second hook puts the results together along the dimension ``dim``.
    """

    dim: ClassVar[int]

    def __init__(self) -> None:
        self._inside = False
        self._results: list[Any] = []

    def parts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Call]:
        """The calls that a call comes to; a single one, or none, leaves it whole."""
        raise NotImplementedError

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """The call's last part, with all others done; ``None``: it stays whole."""
        if self._inside:
            return None
        self._results = []  # those of a call that broke off
        parts = self.parts(module, args, kwargs)
        if len(parts) < 2:
            return None
        self._inside = True
        try:
            self._results = [module(*part_args, **part_kwargs) for part_args, part_kwargs in parts[:-1]]
        finally:
            self._inside = False
        return parts[-1]

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The whole output, where the call was the last part; ``None``: as it is."""
        if self._inside or not self._results:
            return None
        results, self._results = [*self._results, output], []
        return _concatenate(results, self.dim)


class SplitRows(Split):
    """The rows of a denoiser's batch, one by one: guidance branches, and pictures that are drawn together."""

    dim = 0

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """As `Split`, and never compiled."""
        return super().before(module, args, kwargs)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """As `Split`, and never compiled."""
        return super().after(module, args, output)

    def parts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Call]:
        """A call for each row of whatever has as many of them as the input."""
        call = bind_call(module, args, kwargs)
        batch = len(call["sample"] if "sample" in call else call["hidden_states"])
        return [((), _row_of(call, index, batch)) for index in range(batch)]


class SplitTokens(Split):
    """The tokens of a module's first input ``(batch, tokens, channels)``, in ``chunks`` parts.

    A compiled region is left whole: its memory is the compiler's to plan.
    """

    dim = 1

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """As `Split`, outside of compiled regions."""
        return None if torch.compiler.is_compiling() else super().before(module, args, kwargs)

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """As `Split`, outside of compiled regions."""
        return None if torch.compiler.is_compiling() else super().after(module, args, output)

    def parts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Call]:
        """A call for each chunk."""
        if not args or args[0].ndim != 3:
            return []
        return [((part, *args[1:]), kwargs) for part in args[0].chunk(self.chunks, dim=1)]


def _row_of(call: dict[str, Any], index: int, batch: int) -> dict[str, Any]:
    def row(value: Any, each: int = 1) -> Any:
        rows = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == each * batch
        return value[index * each : (index + 1) * each] if rows else value

    def part(name: str, value: Any) -> Any:
        if name in SHARED:
            return value
        if isinstance(value, dict):
            return {key: part(key, inner) for key, inner in value.items()}
        if name in SEVERAL and isinstance(value, torch.Tensor):
            return row(value, max(1, len(value) // batch))
        return tree_map(row, value)

    return {name: part(name, value) for name, value in call.items()}


def _concatenate(results: list[Any], dim: int) -> Any:
    """Outputs as one: tensors are concatenated along ``dim``, whatever they are wrapped in."""
    flat = [tree_flatten(result)[0] for result in results]
    _, spec = tree_flatten(results[0])
    return tree_unflatten([_cat(list(leaves), dim) for leaves in zip(*flat, strict=True)], spec)


def _cat(leaves: list[Any], dim: int) -> Any:
    return torch.cat(leaves, dim=dim) if isinstance(leaves[0], torch.Tensor) else leaves[0]
