"""The renderer: a scene drawn at any size, with anti-aliased edges."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from diffusion_attn.shapes.scenes import COLORS, Scene


def render(scene: Scene, size: int | tuple[int, int] = 64) -> Image.Image:
    """Draw ``scene`` as an RGB image; ``size`` is the side or ``(width, height)``, in pixels."""
    return Image.fromarray(np.round(rasterize(scene, size) * 255).astype(np.uint8))


def rasterize(scene: Scene, size: int | tuple[int, int] = 64) -> np.ndarray:
    """Draw ``scene`` as an array ``(height, width, 3)``, float32 in 0..1."""
    width, height = (size, size) if isinstance(size, int) else size
    if width < 1 or height < 1:
        raise ValueError(f"size={size!r}: expected a positive number of pixels per side.")
    image = np.empty((height, width, 3), np.float32)
    image[:] = rgb(scene.background)
    side = min(width, height)
    for shape in scene.shapes:
        alpha = coverage(shape.kind, shape.x * width, shape.y * height, shape.radius * side, width, height)[..., None]
        image = image * (1 - alpha) + rgb(shape.color) * alpha
    return image


def rgb(color: str) -> np.ndarray:
    """A named colour as a float32 vector ``(3,)`` in 0..1."""
    return np.asarray(COLORS[color], np.float32) / 255


def coverage(kind: str, x: float, y: float, radius: float, width: int, height: int) -> np.ndarray:
    """How much of each pixel a shape covers: ``(height, width)`` float32 in 0..1; centre and radius in pixels.

    The signed distance to the outline, clipped to half a pixel on either side, is the covered share to first order.
    """
    u = ((np.arange(width, dtype=np.float32) + 0.5 - x) / radius)[None, :]
    v = ((np.arange(height, dtype=np.float32) + 0.5 - y) / radius)[:, None]
    return np.clip(0.5 - _OUTLINES[kind](u, v) * radius, 0, 1).astype(np.float32)


# Signed distances to the outlines of shapes of radius 1, negative inside; u to the right, v down.


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 1


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.73) - 0.27


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _box(u, v, 0.86, 0.86)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_box(u, v, 0.96, 0.33), _box(u, v, 0.33, 0.96))


def _polygon(u: np.ndarray, v: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    squared = np.full(np.broadcast_shapes(u.shape, v.shape), np.inf, np.float32)
    inside = np.zeros(squared.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (u - ax - along * ex) ** 2 + (v - ay - along * ey) ** 2)
        if ey:
            crosses = (v >= min(ay, by)) & (v < max(ay, by))
            inside ^= crosses & (u < ax + (v - ay) * ex / ey)
    distance = np.sqrt(squared)
    return np.where(inside, -distance, distance)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _polygon(u, v, [(0.0, -1.0), (0.96, 0.8), (-0.96, 0.8)])


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radii = (1.05, 0.45)
    corners = [
        (radii[i % 2] * math.sin(math.pi * i / 5), 0.06 - radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)
    ]
    return _polygon(u, v, corners)


_OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
