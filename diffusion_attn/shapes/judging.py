"""Judging pictures against the captions they were made from, by what the oracle reads in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from PIL import Image

from diffusion_attn.shapes.captions import parse_caption
from diffusion_attn.shapes.oracle import FoundShape, read
from diffusion_attn.shapes.scenes import Scene, Shape

_RIVALS = 8  # found shapes considered for each asked one


@dataclass(frozen=True)
class Judgement:
    """One picture against one caption.

    ``asked`` and ``read`` count objects, unreadable ones included. Each asked object is paired with at most one found
    object that has its kind or its colour: ``wrong_color`` and ``wrong_shape`` count pairs that agree only in the
    other, ``wrong_size`` pairs whose size is not the named one, ``missing`` and ``extra`` the unpaired. ``relation``
    is ``None`` where the caption states none. ``exact``: the picture is readable, shows all that was asked and nothing
    else.
    """

    exact: bool
    asked: int
    read: int
    missing: int
    extra: int
    wrong_color: int
    wrong_shape: int
    wrong_size: int
    relation: bool | None
    background: bool
    readable: bool


@dataclass(frozen=True)
class Score:
    """Many pictures against their captions.

    ``exact``, ``background`` and ``readable`` are shares of the pictures (0 to 1), ``relation`` that of the pictures
    whose caption states one (``None`` where none does); the counts are totals. See `Judgement` for what they count.
    """

    judgements: tuple[Judgement, ...]
    exact: float
    asked: int
    read: int
    missing: int
    extra: int
    wrong_color: int
    wrong_shape: int
    wrong_size: int
    relation: float | None
    background: float
    readable: float

    def as_dict(self) -> dict[str, float | int | None]:
        """The number of pictures and every share and total, ready for JSON."""
        totals = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "judgements"}
        return {"images": len(self.judgements), **totals}


def judge(image: Any, prompt: str) -> Judgement:
    """Judge one picture (see `read`) against the caption it was made from.

    "Left of" and "above" hold where the first centre lies so, and by at least as much as it is off the other way, in
    fractions of the width and height. Where objects can be paired in several equally good ways, the relation is given
    the benefit of the doubt.

    Raises:
        CaptionError: ``prompt`` is not of the grammar.
    """
    asked, reading = parse_caption(prompt), read(image)
    pairs = _pair(asked, reading.shapes)
    matched = [(shape, found) for shape, found in zip(asked.shapes, pairs, strict=True) if found]
    wrong_color = sum(shape.color != found.color for shape, found in matched)
    wrong_shape = sum(shape.kind != found.kind for shape, found in matched)
    wrong_size = sum(not _right_size(shape, found) for shape, found in matched)
    missing, extra = len(pairs) - len(matched), len(reading.shapes) - len(matched)
    relation = _stands(asked.relation, pairs)
    background = reading.background == asked.background
    flaws = missing + extra + wrong_color + wrong_shape + wrong_size
    return Judgement(
        exact=reading.readable and background and relation is not False and not flaws,
        asked=len(pairs),
        read=len(reading.shapes),
        missing=missing,
        extra=extra,
        wrong_color=wrong_color,
        wrong_shape=wrong_shape,
        wrong_size=wrong_size,
        relation=relation,
        background=background,
        readable=reading.readable,
    )


def score(images: Any, prompts: str | Iterable[str]) -> Score:
    """Judge pictures against their captions, one each, and sum up.

    Args:
        images: pictures (see `read`), or a single one where ``prompts`` is a single string.
        prompts: captions, as many as there are images.

    Raises:
        ValueError: there are not as many images as prompts, or none.
        CaptionError: a prompt is not of the grammar.
    """
    images, prompts = ([images], [prompts]) if isinstance(prompts, str) else (_as_list(images), list(prompts))
    if len(images) != len(prompts) or not images:
        raise ValueError(
            f"images and prompts: got {len(images)} and {len(prompts)}, expected as many of each and at least one; "
            "repeat a prompt for each image made from it."
        )
    judgements = tuple(judge(image, prompt) for image, prompt in zip(images, prompts, strict=True))
    column = {field.name: [getattr(j, field.name) for j in judgements] for field in fields(Judgement)}
    related = [relation for relation in column.pop("relation") if relation is not None]
    shares = {name: sum(column.pop(name)) / len(judgements) for name in ("exact", "background", "readable")}
    totals = {name: sum(values) for name, values in column.items()}
    return Score(judgements, **shares, **totals, relation=sum(related) / len(related) if related else None)


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, Image.Image):
        raise TypeError("images is a single picture but prompts is not a single string; pass [image] or one prompt.")
    return list(images)


def _pair(asked: Scene, found: tuple[FoundShape, ...]) -> tuple[FoundShape | None, ...]:
    """The found shape that stands for each asked one, ``None`` where none does: the assignment that agrees best."""

    def agreement(shape: Shape, other: FoundShape | None) -> tuple[float, ...]:
        if other is None:
            return 0, 0, 0, 0, 0
        kind, color = shape.kind == other.kind, shape.color == other.color
        # Where only one of the two can agree it is the kind: pictures mix up colours more easily than shapes.
        return kind and color, kind or color, kind, _right_size(shape, other), other.confidence

    def merit(pairs: tuple[FoundShape | None, ...]) -> tuple[float, ...]:
        agreements = [agreement(*pair) for pair in zip(asked.shapes, pairs, strict=True)]
        *counts, confidence = (sum(column) for column in zip(*agreements, strict=True))
        return *counts, _stands(asked.relation, pairs) is True, confidence

    choices = []
    for shape in asked.shapes:
        akin = [other for other in found if shape.kind == other.kind or shape.color == other.color]
        choices.append([*sorted(akin, key=partial(agreement, shape), reverse=True)[:_RIVALS], None])
    assignments = (
        pairs
        for pairs in itertools.product(*choices)
        if not any(one is other for one, other in itertools.combinations(filter(None, pairs), 2))
    )
    return max(assignments, key=merit)


def _right_size(asked: Shape, found: FoundShape) -> bool:
    return asked.size in (None, found.size)


def _stands(relation: str | None, pairs: tuple[FoundShape | None, ...]) -> bool | None:
    if relation is None:
        return None
    first, second = pairs
    if first is None or second is None:
        return False
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation == "left of" else (dy, dx)
    return along > 0 and along >= abs(across)
