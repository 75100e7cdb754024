"""The matching of one transformer block, and the hooks that make it and use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.methods.agent.setting import Counts, Setting, Size
from diffusion_attn.ops.match_tokens import TokenMatch, match_tokens

PLAN = "merge_plan"
"""The entry of ``cross_attention_kwargs`` under which the plan of a transformer travels."""


@dataclass(frozen=True)
class MergePlan:
    """What the blocks of one transformer merge in one forward pass.

    It travels with the call: a block that is computed once more in the backward pass, as gradient checkpointing does,
    is given the plan of its own forward pass and not that of the latest.

    Attributes:
        setting: of the phase.
        grid, counts: of the block's tokens.
        choices: the destinations, long of shape ``(blocks, cells_y, cells_x)``.
    """

    setting: Setting
    grid: Size
    counts: Counts
    choices: torch.Tensor | None = None


@dataclass
class BlockMatch:
    """The matching of one block, from the block's input to its end, and the hooks that make and use it.

    Attributes:
        index: of the block in its transformer; a tensor, because compiled code is made anew for every number.
        arguments: names of what the block's forward call takes; compiled code cannot ask for them.
        setting, match: while a block is computed that merges.
    """

    index: torch.Tensor
    arguments: tuple[str, ...]
    setting: Setting | None = field(default=None, init=False)
    match: TokenMatch | None = field(default=None, init=False)

    def find(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before the block: its input, not yet normalised, is what tokens are compared by."""
        self.setting = self.match = None  # of a pass that was broken off
        call = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        extra = dict(call.get("cross_attention_kwargs") or {})
        if PLAN not in extra:
            return None
        plan = extra.pop(PLAN)
        self.setting = plan.setting
        self.match = match_tokens(
            call["hidden_states"],
            grid=plan.grid,
            stride=plan.setting.stride,
            merge=plan.counts.merge,
            agents=plan.counts.fewer,
            cell_choice=None if plan.choices is None else plan.choices[self.index],
        )
        return (), {**call, "cross_attention_kwargs": extra}

    def forget(self, block: nn.Module, args: tuple, output: Any) -> None:
        """After the block."""
        self.setting = self.match = None

    def merge(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before a layer inside the block that is to work on merged tokens.

        Raises:
            UnsupportedModelError: masks over the picture are given for image prompts.
        """
        if self.match is None:
            return None
        if kwargs.get("ip_adapter_masks") is not None:
            raise UnsupportedModelError(
                "ip_adapter_masks are laid over all tokens of the picture, and cross-attention is merged: leave "
                "merge_cross_attention=False, or the masks out."
            )
        return (self.match.merge(args[0]), *args[1:]), kwargs

    def unmerge(self, layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """After it."""
        return None if self.match is None else self.match.unmerge(output)
