"""Pairs of a source and a target: arguments of which there may be one for all, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def paired(image: Any, source: str | Sequence[str], target: str | Sequence[str]) -> tuple[list, list[str], list[str]]:
    """Pictures, source prompts and target prompts, as many of each; what there is one of is repeated.

    Raises:
        ValueError: the counts do not go together.
    """
    if isinstance(image, (list, tuple)):
        images = list(image)
    else:
        images = list(image[:, None]) if getattr(image, "ndim", 0) == 4 else [image]
    sources, targets = ([x] if isinstance(x, str) else list(x) for x in (source, target))
    counts = {"image": len(images), "source_prompt": len(sources), "target_prompt": len(targets)}
    pairs = max(counts.values())
    if any(count not in (1, pairs) for count in counts.values()) or 0 in counts.values():
        raise ValueError(f"there are {counts}; give as many of each, or one that goes with all.")
    images, sources, targets = (x * pairs if len(x) == 1 else x for x in (images, sources, targets))
    return images, sources, targets


def each(value: Any, pairs: int, name: str) -> list[Any]:
    """The argument ``name`` of each pair: one for all, or a list; two plain numbers are one window.

    Raises:
        ValueError: the list is of another length.
    """
    window = isinstance(value, list) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value)
    if not isinstance(value, list) or window:
        return [value] * pairs
    if len(value) != pairs:
        raise ValueError(f"{name} has {len(value)} entries for {pairs} pairs; give one for each, or one for all.")
    return value
