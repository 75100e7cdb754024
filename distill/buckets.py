"""Buckets: a few picture shapes with about as many pixels, so that pictures keep their proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, int]
"""Height and width in pixels."""


def bucket_shapes(size: int, step: int, max_aspect: float) -> list[Shape]:
    """Shapes of about ``size * size`` pixels and of every proportion up to ``max_aspect``, from flat to tall.

    Args:
        size: side of the square one, in pixels.
        step: sides are multiples of this.
        max_aspect: longer by shorter side, at most.
    """
    area = size * size
    shapes = set()
    for height in range(step, int(size * math.sqrt(max_aspect)) + 1, step):
        width = max(step, round(area / height / step) * step)
        if max(height, width) <= max_aspect * min(height, width):
            shapes |= {(height, width), (width, height)}
    return sorted(shapes)


def nearest_shape(shape: Shape, shapes: Sequence[Shape]) -> Shape:
    """Which of ``shapes`` is nearest in proportion to ``shape``."""
    wanted = math.log(shape[0] / shape[1])
    return min(shapes, key=lambda other: abs(math.log(other[0] / other[1]) - wanted))
