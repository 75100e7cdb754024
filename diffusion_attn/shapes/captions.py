"""Captions: the fixed grammar in which scenes are described, written and read back.

caption    = "a" shape [relation "a" shape] "on a" color "background"
shape      = ["large" | "small"] color kind
relation   = "left of" | "above"
"""

from __future__ import annotations

import re

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.shapes.scenes import COLORS, KINDS, RELATIONS, SIZES, Scene, Shape

_SHAPE = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(KINDS)})"
_CAPTION = re.compile(rf"{_SHAPE}(?: ({'|'.join(RELATIONS)}) {_SHAPE})? on a ({'|'.join(COLORS)}) background")
_WORDS = sorted({word for names in (COLORS, KINDS, RELATIONS, SIZES) for name in names for word in name.split()})


class CaptionError(DiffusionAttnError, ValueError):
    """A prompt is not a caption of the shapes grammar."""


def caption(scene: Scene) -> str:
    """The scene in words, for example ``"a red star above a small blue ring on a white background"``."""
    words = f" {scene.relation} ".join(_describe(shape) for shape in scene.shapes)
    return f"{words} on a {scene.background} background"


def parse_caption(prompt: str) -> Scene:
    """What a caption asks for, as a scene whose positions and radii are ``nan``: the caption leaves them open.

    Raises:
        CaptionError: the prompt is not of the grammar.
    """
    match = _CAPTION.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if match is None:
        raise CaptionError(
            f"prompt {prompt!r} is not a shapes caption, so nobody can say whether a picture shows it; write it like "
            f"'a large red star above a blue ring on a white background' with the words {', '.join(_WORDS)}."
        )
    size, color, kind, relation, other_size, other_color, other_kind, background = match.groups()
    nan = float("nan")
    shapes = [Shape(kind, color, size, nan, nan, nan)]
    if relation:
        shapes.append(Shape(other_kind, other_color, other_size, nan, nan, nan))
    return Scene(tuple(shapes), background, relation)


def _describe(shape: Shape) -> str:
    return " ".join(word for word in ("a", shape.size, shape.color, shape.kind) if word)
