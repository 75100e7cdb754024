"""HiDiffusion: pictures above the training size without duplicated objects, in less time (arXiv 2311.17528).

RAU-Net shrinks the deep part of the UNet during the early steps, so that it works at the size it was trained on; window
attention runs the self-attention of the finest attention level in four shifted windows. Both are plain module hooks.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from diffusion_attn.core.context import StepContext
from diffusion_attn.core.errors import GridError, UnsupportedModelError
from diffusion_attn.core.method import Attachment, Plan, Target
from diffusion_attn.core.session import bind_call
from diffusion_attn.methods.unet_layout import (
    Size,
    Sizes,
    attention_levels,
    halve,
    mirror,
    self_attentions,
    trace_sizes,
)
from diffusion_attn.ops.window_attention import inverse_order, window_order

logger = logging.getLogger(__name__)

Shift = str | int | Callable[[int, str], int]


@dataclass(frozen=True)
class HiDiffusion:
    """Options of HiDiffusion; the defaults are the paper's. ``None`` means: by structure, size and run.

    Args:
        raunet: remove duplicated objects: dilate a downsampler, pool a block, early in the run (card's D and P).
        window_attention: save time: windowed self-attention at the finest attention level, at every step and size.
        family: ``"sd"`` (SD 1.x, 2.x), ``"sdxl"`` or ``"sdxl-turbo"``; by default the UNet's structure decides.
        t1_ratio: share of the run (0 to 1) in which the family's main switch is on.
        t2_ratio: the same for its second switch, not above ``t1_ratio``.
        aggressive: SDXL only: the deeper downsampler is dilated for the first 8/50 of the run, then the pooled block
            takes over, in place of ``t2_ratio``. By default below four times the native size, but not for inpainting;
            Playground models want ``False``.
        shift: how windows move from step to step: ``"seeded"``, one of 0 to 3, or ``f(step_index, block_name)``.
        seed: of the seeded shifts, which are the same for all guidance branches of a step.
        min_size: latent cells of the shorter side at or below which RAU-Net is off; by default the UNet's own
            ``sample_size``, ``0`` is always on.
        control_reduce: run the pipeline's ControlNet on a latent reduced to about the native size.
        control_end: share of the run after which ControlNet residuals are dropped (the paper's code: 0.6).
    """

    name: ClassVar[str] = "hidiffusion"

    raunet: bool = True
    window_attention: bool = True
    family: str | None = None
    t1_ratio: float | None = None
    t2_ratio: float | None = None
    aggressive: bool | None = None
    shift: Shift = "seeded"
    seed: int = 0
    min_size: int | None = None
    control_reduce: bool = False
    control_end: float | None = None

    def __post_init__(self) -> None:
        if self.family not in (None, *_FAMILIES):
            raise ValueError(f"family={self.family!r}: expected one of {', '.join(_FAMILIES)}, or None.")
        for name in ("t1_ratio", "t2_ratio", "control_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: expected a share of the run between 0 and 1, or None.")
        t1 = _LOW_T1 if self.t1_ratio is None else self.t1_ratio
        if self.t2_ratio is not None and self.t2_ratio > t1:
            raise ValueError(
                f"t2_ratio={self.t2_ratio} is above t1_ratio={t1}: the second switch works inside the first; raise "
                "t1_ratio or lower t2_ratio."
            )
        if not (self.shift == "seeded" or callable(self.shift) or self.shift in range(4)):
            raise ValueError(f"shift={self.shift!r}: expected 'seeded', 0, 1, 2, 3 or f(step_index, block_name).")
        if self.min_size is not None and self.min_size < 0:
            raise ValueError(f"min_size={self.min_size}: expected a number of latent cells, 0 for always on, or None.")
        if not (self.raunet or self.window_attention):
            raise ValueError("raunet and window_attention are both False, so nothing is left to enable.")

    def plan(self, target: Target) -> Plan:
        """Find the layers; see `Method.plan`."""
        unet = target.denoiser
        family = self._check(target)
        hooks = _Hooks(self, family, unet, target.pipeline)
        layers = hooks.layers()
        attention = frozenset(name for name in layers if name.endswith(".attn1"))
        return Plan(layers, hooks.install, attention, "HiDiffusion(window_attention=False) leaves attention alone")

    def _check(self, target: Target) -> str:
        from diffusers import UNet2DConditionModel

        unet = target.denoiser
        if not isinstance(unet, UNet2DConditionModel):
            raise UnsupportedModelError(
                f"HiDiffusion works on the levels of a UNet, and {type(unet).__name__} has none to shrink; for FLUX and "
                "SD3 local attention (CLEAR) is what serves large pictures."
            )
        family = self.family or _family_of(unet)
        if family is None:
            raise UnsupportedModelError(
                f"this UNet has {len(unet.down_blocks)} levels with attention in {attention_levels(unet)}: HiDiffusion "
                "knows four levels with attention in [0, 1, 2] (SD 1.x, 2.x) and three with attention in [1, 2] (SDXL); "
                f"if it is one of them after all, give family= ({', '.join(_FAMILIES)})."
            )
        rules = _FAMILIES[family]
        levels = range(len(unet.down_blocks) - 1)
        if not {rules.dilated, rules.pooled} - {None} <= set(levels) or rules.pooled not in attention_levels(unet):
            raise UnsupportedModelError(
                f"family={family!r} needs attention in level {rules.pooled} of the UNet; this one has it in "
                f"{attention_levels(unet)}."
            )
        if self.aggressive and family != "sdxl":
            raise ValueError(f"aggressive=True is a mode of SDXL, and this UNet is of family {family!r}; leave it out.")
        if unet.config.sample_size is None:
            raise UnsupportedModelError(
                "unet.config.sample_size is None, and what is large is relative to it; set it to the training size in "
                "latent cells, for example unet.register_to_config(sample_size=64)."
            )
        if not target.scheduled:
            raise UnsupportedModelError(
                "HiDiffusion depends on the step, and a bare denoiser does not know the run's schedule; enable it "
                "through the pipeline, or pass timesteps= (1-D tensor, noisiest first)."
            )
        if self.control_reduce and getattr(target.pipeline, "controlnet", None) is None:
            raise UnsupportedModelError(
                "control_reduce=True works on the pipeline's ControlNet, and there is none; enable through a ControlNet "
                "pipeline, or leave it out."
            )
        return family


@dataclass(frozen=True)
class _Family:
    """Where a family's switches are (levels), and which of them T1 governs."""

    dilated: int | None
    pooled: int
    main: str
    t1: tuple[float, float] = (0.4, 0.7)  # below and from four times the native size
    t2: tuple[float, float] = (0.0, 0.3)


_LOW_T1 = 0.4
_FAMILIES = {
    "sd": _Family(dilated=0, pooled=1, main="dilate"),
    "sdxl": _Family(dilated=1, pooled=1, main="pool"),
    "sdxl-turbo": _Family(dilated=None, pooled=1, main="pool", t1=(0.5, 0.5), t2=(0.0, 0.0)),
}
_AGGRESSIVE_RATIO = 8 / 50
_CONTROL_T1 = 0.5  # SDXL, text-to-image with ControlNet, below four times the native size
_DOWN, _MID = "down_block_additional_residuals", "mid_block_additional_residual"
_INNER = "down_intrablock_additional_residuals"
_TURBO_SAMPLE_SIZE = 64  # SDXL's own layout at half its size is what tells Turbo apart


def _family_of(unet: nn.Module) -> str | None:
    levels = attention_levels(unet)
    if len(unet.down_blocks) == 4 and levels == [0, 1, 2]:
        return "sd"
    if len(unet.down_blocks) == 3 and levels == [1, 2] and unet.config.addition_embed_type == "text_time":
        return "sdxl-turbo" if unet.config.sample_size == _TURBO_SAMPLE_SIZE else "sdxl"
    return None


@dataclass(frozen=True)
class Regime:
    """Which of RAU-Net's two switches are on in a call."""

    dilate: bool = False
    pool: bool = False


def regime(
    options: HiDiffusion,
    family: str,
    context: StepContext,
    native: int,
    *,
    controlled: bool = False,
    inpainting: bool = False,
) -> Regime:
    """The resolution table (card section 1.5) for one call.

    Args:
        options, family: what is enabled.
        context: the call.
        native: the UNet's training size in latent cells; the published thresholds are four times that.
        controlled: ControlNet residuals arrive in a text-to-image run.
        inpainting: the UNet takes a mask and a masked picture.
    """
    shorter = min(context.height, context.width)
    if not options.raunet or shorter <= (native if options.min_size is None else options.min_size):
        return Regime()
    rules, large, steps = _FAMILIES[family], shorter >= 4 * native, context.steps
    t1 = rules.t1[large]
    if controlled and family == "sdxl" and not large:
        t1 = _CONTROL_T1
    t1 = t1 if options.t1_ratio is None else options.t1_ratio
    t2 = min(rules.t2[large], t1) if options.t2_ratio is None else options.t2_ratio
    first, second = context.step < int(steps * t1), context.step < int(steps * t2)
    aggressive = options.aggressive
    if aggressive is None:
        aggressive = family == "sdxl" and not large and not inpainting and options.t2_ratio is None
    if aggressive:
        dilated = context.step < int(_AGGRESSIVE_RATIO * steps)
        return Regime(dilate=dilated, pool=first and not dilated)
    if rules.main == "dilate":
        return Regime(dilate=first, pool=second)
    return Regime(dilate=second and rules.dilated is not None, pool=first)


@dataclass(frozen=True)
class _Call:
    """What the hooks need to know of one forward pass; all that changes from step to step is in tensors."""

    regime: Regime
    sizes: Sizes
    orders: dict[str, tuple[torch.Tensor, torch.Tensor]]


class _Hooks:
    """The hooks of one enabled HiDiffusion, and the forward pass that they serve."""

    def __init__(self, options: HiDiffusion, family: str, unet: nn.Module, pipeline: Any) -> None:
        self.options, self.family, self.rules = options, family, _FAMILIES[family]
        self.unet = unet
        size = unet.config.sample_size
        self.native = size if isinstance(size, int) else min(size)
        self.inpainting = unet.config.in_channels > unet.config.out_channels
        self.image_to_image = pipeline is not None and "strength" in inspect.signature(pipeline.__call__).parameters
        self.controlnets = _controlnets(pipeline) if options.control_reduce else []
        self.windowed = list(self_attentions(unet, attention_levels(unet)[0])) if options.window_attention else []
        self.call: _Call | None = None
        self.context: Callable[[], StepContext] | None = None
        self._controlled = False
        self._permutations: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._told = False

    def layers(self) -> list[str]:
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
    def begin(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
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
        self.call = _Call(now, sizes, orders)
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
        down, mid = call.get(_DOWN), call.get(_MID)
        if mid is None:
            return {}
        end = self.options.control_end
        if end is not None and not context.step < end * context.steps:
            return {_DOWN: None, _MID: None}
        down = tuple(_bicubic(residual, size) for residual, size in zip(down, sizes.skips, strict=True))
        return {_DOWN: down, _MID: _bicubic(mid, sizes.mid)}

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
        if not self.call.regime.pool:
            return None
        return _replace_sample(output, partial(F.avg_pool2d, kernel_size=2, stride=2, ceil_mode=True))

    def restore(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
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
        if kwargs.get("attention_mask") is not None or kwargs.get("encoder_hidden_states") is not None:
            raise UnsupportedModelError(
                f"{block}.attn1 got an attention mask or another sequence to attend to, which windows cannot serve; use "
                "HiDiffusion(window_attention=False)."
            )
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        grid = self.call.sizes.grids[transformer]
        if hidden.shape[1] != grid[0] * grid[1]:
            raise GridError(
                f"{block}.attn1 got {hidden.shape[1]} tokens where a grid of {grid[0]} x {grid[1]} was expected: another "
                "extension changes the feature maps; disable it, or use HiDiffusion(window_attention=False)."
            )
        hidden = _resize_tokens(hidden, grid, _even(grid))
        order, _ = self.call.orders[block]
        return (hidden[:, order].unflatten(1, (4, -1)).flatten(0, 1), *rest), kwargs

    def merge_windows(self, transformer: str, block: str, attn: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        grid = self.call.sizes.grids[transformer]
        _, inverse = self.call.orders[block]
        hidden = output.unflatten(0, (-1, 4)).flatten(1, 2)[:, inverse]
        return _resize_tokens(hidden, _even(grid), grid)

    # ---- ControlNet

    def reduce_control(self, controlnet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Show the ControlNet a latent of about the native size (card section 3)."""
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
