"""What the shapes oracle reads in a picture, for files and in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from PIL import Image

from diffusion_attn.shapes.captions import CaptionError
from diffusion_attn.shapes.judging import judge
from diffusion_attn.shapes.oracle import read

_FLAWS = ("missing", "extra", "wrong_color", "wrong_shape", "wrong_size")


def consult(image: Image.Image, prompt: str) -> dict[str, Any] | None:
    """The oracle's ``judgement`` and ``reading`` as dictionaries; ``None`` if the prompt is no shapes caption."""
    try:
        judgement = judge(image, prompt)
    except CaptionError:
        return None
    return {"judgement": asdict(judgement), "reading": asdict(read(image))}


def in_words(judgement: dict[str, Any]) -> str:
    """A judgement on one line: ``"2 of 2 shapes, exact"``, ``"5 shapes, 3 extra"``."""
    read_, asked = judgement["read"], judgement["asked"]
    if judgement["exact"]:
        return f"{read_} of {asked} {_shapes(asked)}, exact"
    flaws = [f"{judgement[name]} {name.replace('_', ' ')}" for name in _FLAWS if judgement[name]]
    if judgement["relation"] is False and not judgement["missing"]:
        flaws.append("wrong relation")
    if not judgement["background"]:
        flaws.append("wrong background")
    if not judgement["readable"]:
        flaws.append("partly unreadable" if read_ else "unreadable")
    return ", ".join((f"{read_} {_shapes(read_)}", *flaws))


def _shapes(count: int) -> str:
    return "shape" if count == 1 else "shapes"
