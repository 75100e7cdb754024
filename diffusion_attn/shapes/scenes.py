"""Scenes: what a picture of the shapes world holds, drawn at random from a seeded source."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
"""The shapes there are."""

COLORS = {
    "red": (222, 44, 44),
    "green": (40, 158, 60),
    "blue": (44, 72, 216),
    "yellow": (248, 216, 48),
    "purple": (150, 52, 186),
    "cyan": (72, 204, 220),
    "black": (20, 20, 20),
    "white": (244, 244, 244),
}
"""Colour names and their sRGB values (0 to 255)."""

SIZES = {"small": (0.115, 0.14), "large": (0.185, 0.215)}
"""Size names and their range of radii, as fractions of the picture's shorter side."""

RELATIONS = ("left of", "above")
"""How the first shape stands to the second."""

_MARGIN = 0.02
_GAP = 0.04
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Shape:
    """One shape: its ``kind``, ``color``, centre ``(x, y)`` and ``radius``.

    Positions are fractions of the picture's width and height (0 to 1, y down), ``radius`` a fraction of its shorter
    side. ``size`` is the word that the caption uses for the radius, or ``None`` where the caption leaves it open.
    """

    kind: str
    color: str
    size: str | None
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two shapes on a plain background; ``relation`` says how the first stands to the second."""

    shapes: tuple[Shape, ...]
    background: str
    relation: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether the scene is kept from training: decided by a hash of what it shows, not of where exactly."""
        content = (self.background, self.relation, *((s.kind, s.color, s.size) for s in self.shapes))
        digest = hashlib.sha256(repr(content).encode()).digest()
        return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


def sample_scene(rng: Any, held_out: bool | None = None) -> Scene:
    """Draw one scene.

    Args:
        rng: ``random.Random``, ``numpy.random.Generator``, ``torch.Generator`` or an integer seed. The first keeps its
            place, so repeated calls give a sequence; so do the generators, of which one integer a call is taken.
        held_out: draw from the held-out split only (``True``), the training split only (``False``) or both (``None``).

    Returns:
        A scene whose shapes do not touch each other or the border, in colours that differ from one another.
    """
    rng = _as_random(rng)
    while True:
        scene = _draw(rng)
        if held_out is None or scene.held_out == held_out:
            return scene


def sample_scenes(count: int, seed: int, held_out: bool | None = None) -> Iterator[Scene]:
    """``count`` scenes from one seed; see `sample_scene`."""
    rng = random.Random(seed)
    for _ in range(count):
        yield sample_scene(rng, held_out)


def _as_random(rng: Any) -> random.Random:
    if isinstance(rng, random.Random):
        return rng
    if isinstance(rng, int):
        return random.Random(rng)
    if hasattr(rng, "integers"):
        return random.Random(int(rng.integers(2**63)))
    if hasattr(rng, "initial_seed"):
        import torch

        return random.Random(int(torch.randint(2**62, (), generator=rng)))
    raise TypeError(
        f"rng={rng!r}: expected random.Random, numpy.random.Generator, torch.Generator or an int; pass a seed, say 0."
    )


def _draw(rng: random.Random) -> Scene:
    count = rng.choice((1, 2, 2))
    background, *colors = rng.sample(sorted(COLORS), 1 + count)
    relation = rng.choice(RELATIONS) if count == 2 else None
    looks = [(rng.choice(KINDS), color, rng.choice(sorted(SIZES)), rng.random() < 0.5) for color in colors]
    while True:
        shapes = tuple(_place(rng, *look) for look in looks)
        if relation is None or _stands(relation, *shapes):
            return Scene(shapes, background, relation)


def _place(rng: random.Random, kind: str, color: str, size: str, named: bool) -> Shape:
    radius = round(rng.uniform(*SIZES[size]), 4)
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    x, y = (round(rng.uniform(low, high), 4) for _ in range(2))
    return Shape(kind, color, size if named else None, x, y, radius)


def _stands(relation: str, first: Shape, second: Shape) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation == "left of" else (dy, dx)
    return along >= first.radius + second.radius + _GAP and abs(across) <= 0.6 * along
