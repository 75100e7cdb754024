"""When and where HiDiffusion's switches are on: families of UNets and the resolution table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusion_attn.core.context import StepContext
from diffusion_attn.core.unet_layout import attention_levels

if TYPE_CHECKING:
    from diffusion_attn.methods.hidiffusion.method import HiDiffusion


@dataclass(frozen=True)
class Family:
    """Where a family's two switches are (levels of the UNet), and when they are on.

    Attributes:
        dilated: level whose downsampler can be dilated; ``None``: the family never does.
        pooled: level that can be pooled.
        main: the switch that T1 governs, ``"dilate"`` or ``"pool"``; T2 governs the other.
        t1, t2: shares of the run, below and from four times the native size.
    """

    dilated: int | None
    pooled: int
    main: str
    t1: tuple[float, float] = (0.4, 0.7)
    t2: tuple[float, float] = (0.0, 0.3)


FAMILIES = {
    "sd": Family(dilated=0, pooled=1, main="dilate"),
    "sdxl": Family(dilated=1, pooled=1, main="pool"),
    "sdxl-turbo": Family(dilated=None, pooled=1, main="pool", t1=(0.5, 0.5), t2=(0.0, 0.0)),
}
LOW_T1 = min(family.t1[0] for family in FAMILIES.values())
"""The shortest that the main switch is on by default."""

_AGGRESSIVE_RATIO = 8 / 50
_CONTROL_T1 = 0.5  # SDXL, text-to-image with ControlNet, below four times the native size
_TURBO_SAMPLE_SIZE = 64  # SDXL's own layout at half its size is what tells Turbo apart


def family_of(unet: Any) -> str | None:
    """The family that a UNet's structure tells, ``None`` for a layout that is not known."""
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
    """The resolution table for one call.

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
    rules, large, steps = FAMILIES[family], shorter >= 4 * native, context.steps
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
