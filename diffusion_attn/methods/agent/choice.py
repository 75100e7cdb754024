"""Which token of each cell the others are merged into: drawn anew for every matching."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from diffusion_attn.core.context import StepContext
from diffusion_attn.methods.agent.setting import Setting, Size

CellChoice = Callable[[int, str, Size], torch.Tensor]
SOURCES = ("keyed", "reference")


@dataclass
class Choices:
    """The draws of one enabled method.

    ``"keyed"``: seed, step and block decide, so that guidance branches, repeated and resumed runs agree however they
    are batched. ``"reference"``: a generator draws once for each matching in the order of execution, as the official
    code does: not at all for odd batches, and from the seed again in each phase and each run.

    Attributes:
        rng: ``"keyed"`` or ``"reference"``.
        seed: of either.
        given: ``given(step_index, block_name, cells)`` replaces the draw.
    """

    rng: str
    seed: int
    given: CellChoice | None
    _generator: torch.Generator = field(default_factory=torch.Generator, repr=False)
    _last: tuple[Setting, int] | None = field(default=None, repr=False)

    def draw(self, setting: Setting, context: StepContext, block: str, batch: int, cells: Size) -> torch.Tensor | None:
        """Long of shape ``cells`` as `match_tokens` takes it, on the CPU; ``None``: the top-left token of each."""
        if self.given is not None:
            return self.given(context.step, block, cells)
        if self.rng == "keyed":
            key = hashlib.blake2b(f"{self.seed}/{context.step}/{block}".encode(), digest_size=8).digest()
            self._generator.manual_seed(int.from_bytes(key) >> 1)
        else:
            if self._last is None or setting != self._last[0] or context.step < self._last[1]:
                self._generator.manual_seed(self.seed)
            self._last = setting, context.step
            if batch % 2:
                return None
        return torch.randint(setting.stride[0] * setting.stride[1], cells, generator=self._generator)
