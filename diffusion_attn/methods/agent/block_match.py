"""The matching of one transformer block, and the hooks that make it and use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.methods.agent.setting import Counts, Setting, Size
from diffusion_attn.ops.match_tokens import TokenMatch, match_tokens


class BlockMatch:
    """The matching of one block, from the block's input to its end, and the hooks that make and use it.

    Attributes:
        setting: in force in this forward pass; ``None``: nothing is merged.
        grid, counts: of the block's tokens.
        choice: the destinations.
        match: what came of them while the block is computed.
    """

    setting: Setting | None = None
    grid: Size
    counts: Counts
    choice: torch.Tensor | None = None
    match: TokenMatch | None = None

    def find(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the block: its input, not yet normalised, is what tokens are compared by."""
        self.match = None  # of a pass that was broken off
        if self.setting is None:
            return
        self.match = match_tokens(
            args[0] if args else kwargs["hidden_states"],
            grid=self.grid,
            stride=self.setting.stride,
            merge=self.counts.merge,
            agents=self.counts.fewer,
            cell_choice=self.choice,
        )

    def forget(self, block: nn.Module, args: tuple, output: Any) -> None:
        """After the block."""
        self.match = None

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
