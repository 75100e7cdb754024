"""How HiDiffusion gets into a UNet: hooks on resamplers, transformers and self-attention, and nothing else."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from diffusion_attn.core.context import StepContext
from diffusion_attn.core.errors import GridError, UnsupportedModelError
from diffusion_attn.core.method import Attachment
from diffusion_attn.core.session import bind_call
from diffusion_attn.core.unet_layout import (
    Size,
    Sizes,
    attention_levels,
    halve,
    mirror,
    self_attentions,
    trace_sizes,
)
from diffusion_attn.methods.hidiffusion.regime import FAMILIES, Regime, regime
from diffusion_attn.ops.window_attention import inverse_order, window_order

if TYPE_CHECKING:
    from diffusion_attn.methods.hidiffusion.method import HiDiffusion

logger = logging.getLogger(__name__)

_DOWN, _MID = "down_block_additional_residuals", "mid_block_additional_residual"
_INNER = "down_intrablock_additional_residuals"


@dataclass(frozen=True)
class Call:
    """What the hooks need to know of one forward pass; all that changes from step to step is in tensors."""

    regime: Regime
    sizes: Sizes
    orders: dict[str, tuple[torch.Tensor, torch.Tensor]]


class Hooks:
    """The hooks of one enabled HiDiffusion, and the forward pass that they serve."""

    call: Call
    context: Callable[[], StepContext]

    def __init__(self, options: HiDiffusion, family: str, unet: Any, pipeline: Any) -> None:
        self.options, self.family, self.rules = options, family, FAMILIES[family]
        self.unet = unet
        size = unet.config.sample_size
        self.native = size if isinstance(size, int) else min(size)
        self.inpainting = unet.config.in_channels > unet.config.out_channels
        self.image_to_image = pipeline is not None and "strength" in inspect.signature(pipeline.__call__).parameters
        self.controlnets = _controlnets(pipeline) if options.control_reduce else []
        self.windowed = list(self_attentions(unet, attention_levels(unet)[0])) if options.window_attention else []
        self._controlled = False
        self._permutations: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._told = False

    def layers(self) -> list[str]:
        """The names of the modules that get a hook, the UNet itself aside."""
        return [*self._resampled(), *(f"{block}.attn1" for _, block, _ in self.windowed)]

    def _resampled(self) -> dict[str, tuple[str, Callable]]:
        """RAU-Net's hooks: module name -> (``"before"`` or ``"after"``, hook)."""
        if not self.options.raunet:
            return {}
        rules, unet = self.rules, self.unet
        pairs = len(unet.up_blocks[mirror(unet, rules.pooled)].attentions)
        hooks: dict[str, tuple[str, Callable]] = {}
        if rules.dilated is not None:
            hooks[f"down_blocks.{rules.dilated}.downsamplers.0"] = ("before", self.dilate)
        hooks[f"down_blocks.{rules.pooled}.attentions.0"] = ("after", self.pool)
        hooks[f"up_blocks.{mirror(unet, rules.pooled)}.attentions.{pairs - 2}"] = ("after", self.restore)
        for index, block in enumerate(unet.up_blocks):
            if block.upsamplers is not None:
                name = f"up_blocks.{index}.upsamplers.0"
                hooks[name] = ("before", partial(self.upsample, name))
        return hooks

    def install(self, attachment: Attachment) -> None:
        """Register everything; see `Plan.install`."""
        self.context = attachment.context
        attachment.before(self.unet, self.begin, kwargs=True)
        for name, (when, hook) in self._resampled().items():
            (attachment.before if when == "before" else attachment.after)(self.unet.get_submodule(name), hook)
        for transformer, block, attn in self.windowed:
            attachment.before(attn, partial(self.split_windows, transformer, block), kwargs=True)
            attachment.after(attn, partial(self.merge_windows, transformer, block))
        for controlnet in self.controlnets:
            attachment.before(controlnet, self.reduce_control, kwargs=True)

    # ---- once per forward pass, outside any compiled region

    @torch.compiler.disable
    def begin(self, unet: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Decide the regime, sizes and shifts of this pass, and fit what ControlNets and adapters add."""
        context = self.context()
        call = bind_call(unet, args, kwargs)
        if context.step == 0:
            self._controlled = False
        self._controlled |= call.get(_MID) is not None and not self.image_to_image and not context.skipped
        now = regime(
            self.options, self.family, context, self.native, controlled=self._controlled, inpainting=self.inpainting
        )
        self._say_if_off(context)
        sizes = trace_sizes(
            unet,
            (context.height, context.width),
            self.rules.dilated if now.dilate else None,
            self.rules.pooled if now.pool else None,
        )
        device = call["sample"].device
        orders = {
            block: self._order(sizes.grids[transformer], self._shift(context.step, block), device)
            for transformer, block, _ in self.windowed
        }
        self.call = Call(now, sizes, orders)
        changed = {**self._fit_control(call, sizes, context), **self._fit_adapters(call, sizes, now)}
        return ((), {**call, **changed}) if changed else None

    def _shift(self, step: int, block: str) -> int:
        if self.options.shift == "seeded":
            return hashlib.blake2b(f"{self.options.seed}/{step}/{block}".encode()).digest()[0] % 4
        k = self.options.shift(step, block) if callable(self.options.shift) else self.options.shift
        if k not in range(4):
            raise ValueError(f"shift({step}, {block!r}) returned {k!r}: expected 0, 1, 2 or 3.")
        return int(k)

    def _order(self, grid: Size, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        key = (grid, k, device)
        if key not in self._permutations:
            if len(self._permutations) >= 16:  # four shifts on at most three grids are alive at one size
                self._permutations.clear()
            height, width = halve(grid)
            shift = (k * (height // 4), k * (width // 4))
            order = window_order((2 * height, 2 * width), shift=shift if shift[0] else (0, 0), device=device)
            self._permutations[key] = order, inverse_order(order)
        return self._permutations[key]

    def _say_if_off(self, context: StepContext) -> None:
        shorter = min(context.height, context.width)
        if self.options.raunet and self.options.min_size is None and shorter <= self.native and not self._told:
            self._told = True
            logger.warning(
                "RAU-Net stays off: %d x %d latent cells are not above the model's native size of %d; ask for a larger "
                "picture, or set min_size=0.",
                context.height,
                context.width,
                self.native,
            )

    def _fit_control(self, call: dict[str, Any], sizes: Sizes, context: StepContext) -> dict[str, Any]:
        """ControlNet residuals at the sizes of the skips that they are added to; none once ``control_end`` is over."""
        if call.get(_MID) is None:
            return {}
        end = self.options.control_end
        if end is not None and not context.step < end * context.steps:
            return {_DOWN: None, _MID: None}
        down = tuple(_bicubic(residual, size) for residual, size in zip(call[_DOWN], sizes.skips, strict=True))
        return {_DOWN: down, _MID: _bicubic(call[_MID], sizes.mid)}

    def _fit_adapters(self, call: dict[str, Any], sizes: Sizes, now: Regime) -> dict[str, Any]:
        """T2I-Adapter features at the sizes of the down blocks (and the middle block, for SDXL's last feature)."""
        # Without a mid residual, `_DOWN` is the older way of passing adapter features.
        name = _DOWN if call.get(_MID) is None and call.get(_DOWN) is not None else _INNER
        if now == Regime() or call.get(name) is None:
            return {}
        places = [*sizes.adapters, sizes.mid]
        return {name: [_bicubic(feature, size) for feature, size in zip(call[name], places, strict=False)]}

    # ---- RAU-Net

    def dilate(self, downsampler: nn.Module, args: tuple) -> tuple | None:
        """A 3x3 convolution of stride 4, dilation 2, padding 2 is the stock one on every other row and column."""
        if not self.call.regime.dilate:
            return None
        return (args[0][..., ::2, ::2], *args[1:])

    def pool(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
        """Halve what the first pair of the pooled level gives, before it is recorded as a skip."""
        if not self.call.regime.pool:
            return None
        return _replace_sample(output, partial(F.avg_pool2d, kernel_size=2, stride=2, ceil_mode=True))

    def restore(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
        """Give the mirrored level its size back before its last pair."""
        if not self.call.regime.pool:
            return None
        return _replace_sample(output, partial(_bicubic, size=self.call.sizes.restored))

    def upsample(self, name: str, upsampler: nn.Module, args: tuple) -> tuple | None:
        """Deeper levels can be odd where stock sizes are not, so every upsampler is told the skip it must meet."""
        if self.call.regime == Regime():
            return None
        return (args[0], self.call.sizes.upsampled[name])

    # ---- window attention

    def split_windows(
        self, transformer: str, block: str, attn: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """Turn a batch of sequences into a batch of windows, window fastest."""
        if kwargs.get("attention_mask") is not None or kwargs.get("encoder_hidden_states") is not None:
            raise UnsupportedModelError(
                f"{block}.attn1 got an attention mask or another sequence to attend to, which windows cannot serve: "
                "use HiDiffusion(window_attention=False)."
            )
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        grid = self.call.sizes.grids[transformer]
        if hidden.shape[1] != grid[0] * grid[1]:
            raise GridError(
                f"{block}.attn1 got {hidden.shape[1]} tokens where a grid of {grid[0]} x {grid[1]} was expected: "
                "another extension changes the feature maps; disable it, or use HiDiffusion(window_attention=False)."
            )
        hidden = _resize_tokens(hidden, grid, _even(grid))
        order, _ = self.call.orders[block]
        return (hidden[:, order].unflatten(1, (4, -1)).flatten(0, 1), *rest), kwargs

    def merge_windows(self, transformer: str, block: str, attn: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        """Put the windows back where they came from."""
        grid = self.call.sizes.grids[transformer]
        _, inverse = self.call.orders[block]
        hidden = output.unflatten(0, (-1, 4)).flatten(1, 2)[:, inverse]
        return _resize_tokens(hidden, _even(grid), grid)

    # ---- ControlNet

    def reduce_control(self, controlnet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Show the ControlNet a latent of about the native size."""
        call = bind_call(controlnet, args, kwargs)
        size = reduced_control_size(tuple(call["sample"].shape[-2:]), self.native)
        scale = call["controlnet_cond"].shape[-1] // call["sample"].shape[-1]
        call["sample"] = F.interpolate(call["sample"], size=size)
        call["controlnet_cond"] = F.interpolate(call["controlnet_cond"], size=(size[0] * scale, size[1] * scale))
        return (), call


def reduced_control_size(size: Size, native: int) -> Size:
    """The latent size at which a reduced ControlNet runs: the longer side at ``native``, both multiples of eight."""
    factor = max(size[0] / native, size[1] / native)
    return int(size[0] // factor) // 8 * 8, int(size[1] // factor) // 8 * 8


def _controlnets(pipeline: Any) -> list[nn.Module]:
    controlnet = pipeline.controlnet
    return list(getattr(controlnet, "nets", [controlnet]))


def _replace_sample(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return type(output)(sample=change(output.sample))


def _bicubic(x: torch.Tensor, size: Size) -> torch.Tensor:
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=size, mode="bicubic")


def _even(grid: Size) -> Size:
    height, width = halve(grid)
    return 2 * height, 2 * width


def _resize_tokens(hidden: torch.Tensor, grid: Size, size: Size) -> torch.Tensor:
    """Resize ``(batch, tokens, channels)`` from one grid to another."""
    if grid == size:
        return hidden
    return _bicubic(hidden.transpose(1, 2).unflatten(2, grid), size).flatten(2).transpose(1, 2)
