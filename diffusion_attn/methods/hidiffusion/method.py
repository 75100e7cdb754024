"""HiDiffusion: pictures above the training size without duplicated objects, in less time (arXiv 2311.17528).

RAU-Net shrinks the deep part of the UNet during the early steps, so that it works at the size it was trained on; window
attention runs the self-attention of the finest attention level in four shifted windows. Both are plain module hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.method import Plan, Target
from diffusion_attn.core.unet_layout import attention_levels
from diffusion_attn.methods.hidiffusion.hooks import Hooks
from diffusion_attn.methods.hidiffusion.regime import FAMILIES, LOW_T1, family_of

Shift = str | int | Callable[[int, str], int]


@dataclass(frozen=True)
class HiDiffusion:
    """Options of HiDiffusion; the defaults are the paper's. ``None`` means: by structure, size and run.

    Args:
        raunet: remove duplicated objects: dilate a downsampler, pool a block, early in the run.
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
        if self.family not in (None, *FAMILIES):
            raise ValueError(f"family={self.family!r}: expected one of {', '.join(FAMILIES)}, or None.")
        for name in ("t1_ratio", "t2_ratio", "control_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: expected a share of the run between 0 and 1, or None.")
        t1 = LOW_T1 if self.t1_ratio is None else self.t1_ratio
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
        hooks = Hooks(self, family, unet, target.pipeline)
        layers = hooks.layers()
        attention = frozenset(name for name in layers if name.endswith(".attn1"))
        return Plan(layers, hooks.install, attention, "HiDiffusion(window_attention=False) leaves attention alone")

    def _check(self, target: Target) -> str:
        from diffusers import UNet2DConditionModel

        unet: Any = target.denoiser
        if not isinstance(target.denoiser, UNet2DConditionModel):
            raise UnsupportedModelError(
                f"HiDiffusion works on the levels of a UNet, and {type(unet).__name__} has none to shrink; for "
                "FLUX and SD3 local attention (CLEAR) is what serves large pictures."
            )
        family = self.family or family_of(unet)
        if family is None:
            raise UnsupportedModelError(
                f"this UNet has {len(unet.down_blocks)} levels with attention in {attention_levels(unet)}: "
                "HiDiffusion knows four levels with attention in [0, 1, 2] (SD 1.x, 2.x) and three with attention in "
                "[1, 2] (SDXL); "
                f"if it is one of them after all, give family= ({', '.join(FAMILIES)})."
            )
        rules = FAMILIES[family]
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
                "control_reduce=True works on the pipeline's ControlNet, and there is none; enable through a "
                "ControlNet pipeline, or leave it out."
            )
        return family
