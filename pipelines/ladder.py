"""The way up to a large picture: the sizes that it is drawn at one after the other, and how far each is drawn anew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusion_attn.core.sizes import Size


@dataclass(frozen=True)
class Stage:
    """One size on the way up.

    Attributes:
        height, width: in pixels.
        strength: how much of the schedule the enlarged picture is drawn again for, above 0 and up to 1; ``None``: drawn
            from noise, which only the first stage can be.
    """

    height: int
    width: int
    strength: float | None = None

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"a stage of {self.height}x{self.width} pixels: expected sides of 1 or more.")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength!r}: expected a share of the steps above 0 and up to 1.")

    @property
    def name(self) -> str:
        """``"512x1024"``: height and width."""
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class Ladder:
    """A rule for the stages below a picture of any size.

    The base has the picture's aspect and the model's native size; from there to the picture, sides grow by ``factor``
    from stage to stage, and by what is left in the first of them. What is hardly larger than the base is drawn at once.

    Args:
        fit: what of the base is native: its ``"area"``, its ``"short"`` or its ``"long"`` side.
        base_scale: the base's sides by the native ones: above 1 where a method such as HiDiffusion draws it.
        factor: by which sides grow in a stage.
        strength: of the first stage above the base.
        fall: by how much less it is in each further one; ``None``: evenly, so that it would be 0 after the last.
        least: what it does not fall below.
        embedded_guidance: of the stages above the base, for models that take their guidance as an input (FLUX.1-dev);
            ``None``: the call's.
        static_shift: the fixed shift of noise levels above the base, of schedulers whose shift else grows with the
            picture; ``None``: as the scheduler says.
    """

    fit: Literal["area", "short", "long"] = "area"
    base_scale: float = 1.0
    factor: int = 2
    strength: float = 0.4
    fall: float | None = 0.1
    least: float = 0.1
    embedded_guidance: float | None = None
    static_shift: float | None = None

    PRESETS: ClassVar[dict[str, Ladder]]

    def __post_init__(self) -> None:
        if self.fit not in ("area", "short", "long"):
            raise ValueError(f"fit={self.fit!r}: expected 'area', 'short' or 'long'.")
        if self.factor < 2 or not self.base_scale > 0:
            raise ValueError(
                f"factor={self.factor}, base_scale={self.base_scale}: expected a factor from 2 and a scale above 0."
            )

    def stages(self, target: Size, native: Size, multiple: int) -> list[Stage]:
        """The base and all stages above it, the last as large as the target or, for the model's sake, a little larger.

        Args:
            target: height and width in pixels.
            native: the size that the model was trained at.
            multiple: of which sides have to be.
        """
        scale = self._fitted(target, native)
        count = 0 if scale > 0.8 else max(1, math.ceil(math.log(1 / scale, self.factor) - 0.05))
        # Sizes on the way are free, so they are such as models see in training.
        unit = multiple * max(1, min(native) // 8 // multiple)
        if count == 0:
            return [Stage(*(_up(side, multiple) for side in target))]
        stages = [Stage(*(min(_up(side, multiple), _nearest(side * scale, unit)) for side in target))]
        for index in range(1, count + 1):
            shrink = self.factor ** (count - index)
            rounded = [_up(s, multiple) if shrink == 1 else _nearest(s / shrink, unit) for s in target]
            height, width = (min(_up(s, multiple), side) for s, side in zip(target, rounded, strict=True))
            stages.append(Stage(height, width, self.strength_of(index, count)))
        return stages

    def above(self, start: Size, target: Size, multiple: int) -> list[Stage]:
        """The stages from a picture that is there to ``target``, in steps of ``factor`` at most."""
        grows = max(side / own for side, own in zip(target, start, strict=True))
        count = max(1, math.ceil(math.log(grows, self.factor) - 0.05)) if grows > 1 else 1
        stages = []
        for index in range(1, count + 1):
            shrunk = [_up(s / self.factor ** (count - index), multiple) for s in target]
            # Of another aspect, no side has to become less on the way.
            height, width = (
                max(side, min(_up(own, multiple), _up(s, multiple)))
                for side, own, s in zip(shrunk, start, target, strict=True)
            )
            stages.append(Stage(height, width, self.strength_of(index, count)))
        return stages

    def strength_of(self, index: int, count: int) -> float:
        """The strength of stage ``index`` (from 1) of ``count`` above the base."""
        if self.fall is None:
            return round(self.strength * (1 - (index - 1) / count), 6)
        return round(max(self.least, self.strength - self.fall * (index - 1)), 6)

    def _fitted(self, target: Size, native: Size) -> float:
        """The base's sides by the target's."""
        scales = {
            "area": math.sqrt(math.prod(native) / math.prod(target)),
            "short": min(native) / min(target),
            "long": max(native) / max(target),
        }
        return self.base_scale * scales[self.fit]


Ladder.PRESETS = {
    "auto": Ladder(),
    "linfusion": Ladder(fit="short"),
    "clear": Ladder(fit="long", factor=4, strength=0.7, fall=0.0, embedded_guidance=7.5, static_shift=3.0),
    "demofusion": Ladder(fit="long", strength=0.32, fall=None),
}
"""What is published: LinFusion's image-to-image ladder, CLEAR's cascade, DemoFusion's in LinFusion's form; and ours."""


def _up(side: float, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple


def _nearest(side: float, unit: int) -> int:
    return max(unit, round(side / unit) * unit)
