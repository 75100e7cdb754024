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

    ``"keyed"``: seed, step and block decide, so that guidance branches and repeated runs agree however they are
    batched; the step is counted in the whole schedule, so that a run which begins inside it draws as one that came
    there. ``"reference"``: a generator draws once for each matching in the order of execution, as the official code
    does: not at all for odd batches, and from the seed again in each phase and whenever the step falls back. A run of
    one step, and a denoiser without a schedule, never fall back: their draws go on where the last ended.

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
            return self._checked(self.given(context.step, block, cells), setting, block, cells)
        if self.rng == "keyed":
            key = hashlib.blake2b(
                f"{self.seed}/{context.skipped + context.step}/{block}".encode(), digest_size=8
            ).digest()
            self._generator.manual_seed(int.from_bytes(key, "big") >> 1)
        else:
            if self._last is None or setting != self._last[0] or context.step < self._last[1]:
                self._generator.manual_seed(self.seed)
            self._last = setting, context.step
            if batch % 2:
                return None
        return torch.randint(setting.stride[0] * setting.stride[1], cells, generator=self._generator)

    @staticmethod
    def _checked(choice: torch.Tensor, setting: Setting, block: str, cells: Size) -> torch.Tensor:
        size = setting.stride[0] * setting.stride[1]
        if tuple(choice.shape) != cells or not (int(choice.min()) >= 0 and int(choice.max()) < size):
            raise ValueError(
                f"cell_choice for {block} gave shape {tuple(choice.shape)} and values from {int(choice.min())} to "
                f"{int(choice.max())}: expected shape {cells} and values from 0 to {size - 1}."
            )
        return choice
