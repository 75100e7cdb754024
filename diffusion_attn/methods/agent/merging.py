"""What token merging and agent attention have in common: options, the layers they belong to, and how they get there."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion_attn.core.context import StepContext
from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.method import Attachment, Plan, Target
from diffusion_attn.core.processors import check_exact
from diffusion_attn.core.session import argument_names, bind_call
from diffusion_attn.core.unet_layout import transformers
from diffusion_attn.methods.agent.block_match import PLAN, BlockMatch, MergePlan
from diffusion_attn.methods.agent.choice import SOURCES, CellChoice, Choices
from diffusion_attn.methods.agent.processor import MergedAttnProcessor
from diffusion_attn.methods.agent.setting import Setting, Size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Merging:
    """Options of every method that merges tokens.

    Args:
        max_downsample: merge where the UNet has reduced each side of the latent by no more than this; by default at the
            finest level that has attention (1 for SD 1.x and 2.x, 2 for SDXL).
        rng: ``"keyed"`` (seed, step and block decide the draw) or ``"reference"`` (the official order of draws).
        seed: of the draws.
        cell_choice: ``f(step_index, block_name, (cells_y, cells_x))`` in place of the draw.
        merge_cross_attention: merge the queries of the cross-attention as well.
        merge_feed_forward: merge before the feed-forward layer as well.
    """

    name: ClassVar[str]

    max_downsample: int | None = None
    rng: str = "keyed"
    seed: int = 0
    cell_choice: CellChoice | None = None
    merge_cross_attention: bool = False
    merge_feed_forward: bool = False

    def __post_init__(self) -> None:
        for phase, setting in self.phases().items():
            setting.check(phase)
        if self.max_downsample is not None and self.max_downsample < 1:
            raise ValueError(
                f"max_downsample={self.max_downsample}: expected 1 (the latent's own size), 2, 4, ..., or None."
            )
        if self.rng not in SOURCES:
            raise ValueError(f"rng={self.rng!r}: expected {' or '.join(map(repr, SOURCES))}.")

    def phases(self) -> dict[str, Setting]:
        """The settings of a run by the names of its phases."""
        raise NotImplementedError

    def setting(self, context: StepContext) -> Setting:
        """The setting of a forward pass."""
        raise NotImplementedError

    def plan(self, target: Target) -> Plan:
        """Find the layers; see `Method.plan`.

        Raises:
            UnsupportedModelError: not a UNet, or no attention at this level.
            MethodConflictError: a layer has a processor that is more than stock attention.
        """
        unet = self._check(target.denoiser)
        hooks = Hooks(self, unet, self._limit(unet))
        blocks = {name: block for _, found in hooks.transformers() for name, block in found.items()}
        for name, block in blocks.items():
            if not isinstance(block.attn1.processor, MergedAttnProcessor):
                check_exact(f"{name}.attn1", block.attn1.processor)
        layers = [f"{name}.{layer}" for name, block in blocks.items() for layer in ("attn1", *self.also(block))]
        attention = frozenset(f"{name}.attn1" for name in blocks)
        return Plan(layers, hooks.install, attention, f"leave {self.name!r} out", notes=self._notes(unet))

    def also(self, block: Any) -> list[str]:
        """The layers of a block that are merged beside its self-attention; not every one has a cross-attention."""
        return ["attn2"] * (self.merge_cross_attention and block.attn2 is not None) + ["ff"] * self.merge_feed_forward

    def _check(self, unet: Any) -> Any:
        from diffusers import UNet2DConditionModel, UNetMotionModel

        if not isinstance(unet, (UNet2DConditionModel, UNetMotionModel)):
            raise UnsupportedModelError(
                f"{self.name!r} merges tokens in the transformer blocks of UNets, and this is a {type(unet).__name__}; "
                "for FLUX and SD3 local attention (CLEAR) is what serves large pictures."
            )
        return unet

    def _limit(self, unet: Any) -> int:
        factors = [factor for _, factor, transformer in transformers(unet) if _self_attending(transformer)]
        if not factors:
            raise UnsupportedModelError(
                f"this {type(unet).__name__} has no transformer blocks with self-attention, so {self.name!r} has "
                "nothing to merge; leave it out."
            )
        if self.max_downsample is not None and self.max_downsample < min(factors):
            raise UnsupportedModelError(
                f"max_downsample={self.max_downsample}: this UNet has no self-attention there; its finest is where "
                f"each side is reduced by {min(factors)}: give {min(factors)} or None."
            )
        return self.max_downsample or min(factors)

    def _notes(self, unet: Any) -> tuple[str, ...]:
        """What becomes of the tokens at the native size, level by level."""
        size = unet.config.sample_size
        if size is None:
            return ()
        height, width = (size, size) if isinstance(size, int) else size
        limit = self._limit(unet)
        factors = sorted(
            {factor for _, factor, found in transformers(unet) if factor <= limit and _self_attending(found)}
        )
        grids = [(math.ceil(height / factor), math.ceil(width / factor)) for factor in factors]
        return tuple(
            f"{grid[0]} x {grid[1]} (native size), {phase}: {setting.counts(grid)}"
            for grid in grids
            for phase, setting in self.phases().items()
        )


def _self_attending(transformer: Any) -> dict[int, Any]:
    """The blocks of a transformer that do not attend to the prompt alone."""
    return {i: block for i, block in enumerate(transformer.transformer_blocks) if not block.only_cross_attention}


class Hooks:
    """The hooks of one enabled `Merging`: one on each transformer, more on each of its blocks."""

    context: Callable[[], StepContext]

    def __init__(self, options: Merging, unet: nn.Module, limit: int) -> None:
        self.options, self.unet, self.limit = options, unet, limit
        self.choices = Choices(options.rng, options.seed, options.cell_choice)
        self._told: set[tuple[Size, Setting]] = set()

    def transformers(self) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """Each transformer that is served, with its blocks by name."""
        for name, factor, transformer in transformers(self.unet):
            if factor <= self.limit:
                blocks = _self_attending(transformer)
                yield transformer, {f"{name}.transformer_blocks.{index}": block for index, block in blocks.items()}

    def install(self, attachment: Attachment) -> None:
        """Register everything; see `Plan.install`."""
        for transformer, blocks in self.transformers():
            self.install_on(attachment, transformer, blocks)

    def install_on(self, attachment: Attachment, transformer: nn.Module, blocks: dict[str, Any]) -> None:
        """Register the hooks of one transformer and its ``blocks``."""
        self.context = attachment.context
        attachment.before(transformer, partial(self.begin, tuple(blocks)), kwargs=True)
        for index, (name, block) in enumerate(blocks.items()):
            match = BlockMatch(torch.tensor(index), argument_names(block))
            attachment.before(block, match.find, kwargs=True)
            attachment.after(block, match.forget)
            attachment.process(f"{name}.attn1", block.attn1, MergedAttnProcessor(match))
            for layer in (getattr(block, also) for also in self.options.also(block)):
                attachment.before(layer, match.merge, kwargs=True)
                attachment.after(layer, match.unmerge)

    @torch.compiler.disable
    def begin(self, blocks: tuple[str, ...], transformer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Before a transformer: what its blocks are to merge in this pass, on the grid that it is really given."""
        call = bind_call(transformer, args, kwargs)
        hidden = call["hidden_states"]
        context, grid = self.context(), (hidden.shape[-2], hidden.shape[-1])
        setting = self.options.setting(context)
        counts = setting.counts(grid)
        # Other extensions shrink feature maps on the way; such a level is served as the one that it has become.
        factor = math.ceil(math.sqrt(context.height * context.width // counts.tokens))
        on = bool(counts.merge) and factor <= self.limit
        if (grid, setting) not in self._told:
            self._told.add((grid, setting))
            logger.info("%s on %d x %d: %s", self.options.name, *grid, counts if on else "nothing is merged")
        if not on:
            return None
        drawn = [self.choices.draw(setting, context, name, len(hidden), counts.cells) for name in blocks]
        given = [choice.to(hidden.device) for choice in drawn if choice is not None]  # of all blocks, or of none
        plan = MergePlan(setting, grid, counts, torch.stack(given) if given else None)
        return (), {**call, "cross_attention_kwargs": {**(call.get("cross_attention_kwargs") or {}), PLAN: plan}}
