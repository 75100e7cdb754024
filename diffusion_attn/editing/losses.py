"""How well the cross-attention of nouns is localised, as scalars to descend on.

Everywhere ``maps (H, W, L)`` are attention probabilities averaged over layers and heads, ``tokens`` the positions of
``K`` nouns, as `diffusion_attn.editing.prompts.word_tokens` finds them, and losses are computed in float32 at least.
Sources: DPL, arXiv 2309.15664, and LocInv, arXiv 2405.01496.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

_EPS = 1e-8


def attention_balancing(
    maps: torch.Tensor,
    tokens: Sequence[int],
    *,
    smooth: bool = True,
    reduction: Literal["max", "mean"] = "max",
    temperature: float = 100.0,
) -> torch.Tensor:
    """How far the strongest pixel of each noun is from taking all attention there: ``max(0, 1 - peak)``.

    Attention is sharpened by a softmax over all positions but the start token and the last. Source: DPL,
    "attention balancing", after Attend-and-Excite, arXiv 2301.13826.

    Args:
        maps: ``(H, W, L)``.
        tokens: positions from 1 to ``L - 2``.
        smooth: blur the sharpened maps with a 3x3 Gaussian of deviation 0.71, which asks for a region, not one pixel.
        reduction: over nouns: the worst, ``"max"``, or their ``"mean"``.
        temperature: what probabilities are multiplied by before the softmax.

    Raises:
        ValueError: ``tokens`` or ``reduction`` are not as above, or maps of one row or column are to be smoothed.
    """
    if reduction not in ("max", "mean"):
        raise ValueError(f"reduction={reduction!r}: expected 'max' or 'mean'.")
    if smooth and min(maps.shape[:2]) < 2:
        raise ValueError(f"smooth=True takes maps of 2x2 or more, not {tuple(maps.shape[:2])}; use smooth=False.")
    _check(maps, tokens, ends=1)
    sharp = (temperature * _full(maps)[..., 1:-1]).softmax(-1).permute(2, 0, 1)
    nouns = sharp[[token - 1 for token in tokens]]
    peaks = (_smooth(nouns) if smooth else nouns).amax((-2, -1))
    losses = (1 - peaks).clamp(min=0)
    return losses.max() if reduction == "max" else losses.mean()


def disjoint_objects(maps: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Mean cosine between the maps of two nouns, over all pairs; 0 for one noun.

    Source: DPL, "disjoint object attention".

    Args:
        maps: ``(H, W, L)``.
        tokens: positions of the nouns.

    Raises:
        ValueError: ``tokens`` are no positions of the maps.
    """
    nouns = _columns(maps, tokens)
    first, second = torch.triu_indices(len(nouns), len(nouns), offset=1, device=maps.device)
    return _cosines(nouns[first], nouns[second]).sum() / max(len(first), 1)


def background_leakage(maps: torch.Tensor, tokens: Sequence[int], background: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the maps of nouns and the background; 0 for an empty one. Source: DPL, "background leakage".

    Args:
        maps: ``(H, W, L)``.
        tokens: positions of the nouns.
        background: ``(H, W)``, bool or float, as `diffusion_attn.editing.grounding.background_mask` finds it.

    Raises:
        ValueError: ``tokens`` are no positions of the maps, or ``background`` has not their height and width.
    """
    if background.shape != maps.shape[:2]:
        raise ValueError(
            f"background has the shape {tuple(background.shape)}: expected {tuple(maps.shape[:2])}, that of the maps; "
            "resize it."
        )
    nouns = _columns(maps, tokens)
    return _cosines(nouns, background.to(nouns).flatten()).mean()


def mask_similarity(maps: torch.Tensor, tokens: Sequence[int], masks: torch.Tensor) -> torch.Tensor:
    """One minus the mean cosine between the map of each noun and its segment. Source: LocInv, "similarity".

    Args:
        maps: ``(H, W, L)``.
        tokens: positions of the nouns.
        masks: ``(K, H, W)``, bool or float, one for each noun.

    Raises:
        ValueError: ``tokens`` are no positions of the maps, or ``masks`` not of their shape.
    """
    return 1 - _cosines(*_pairs(maps, tokens, masks)).mean()


def box_similarity(maps: torch.Tensor, tokens: Sequence[int], masks: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the map of each noun and all that is outside its box. Source: LocInv, "similarity".

    Args:
        maps: ``(H, W, L)``.
        tokens: positions of the nouns.
        masks: ``(K, H, W)``, bool or float, one for each noun.

    Raises:
        ValueError: ``tokens`` are no positions of the maps, or ``masks`` not of their shape.
    """
    nouns, masks = _pairs(maps, tokens, masks)
    return _cosines(nouns, 1 - masks).mean()


def mask_overlap(maps: torch.Tensor, tokens: Sequence[int], masks: torch.Tensor) -> torch.Tensor:
    """Mean share of a noun's attention that falls outside its segment or box. Source: LocInv, "overlapping".

    One formula for both: what is published for segments, one minus the share inside, is the same number.

    Args:
        maps: ``(H, W, L)``.
        tokens: positions of the nouns.
        masks: ``(K, H, W)``, bool or float, one for each noun.

    Raises:
        ValueError: ``tokens`` are no positions of the maps, or ``masks`` not of their shape.
    """
    nouns, masks = _pairs(maps, tokens, masks)
    return ((nouns * (1 - masks)).sum(1) / nouns.sum(1).clamp(min=_EPS)).mean()


def adjective_binding(maps: torch.Tensor, tokens: Sequence[int], adjectives: Sequence[int]) -> torch.Tensor:
    """One minus the mean cosine between the maps of each noun and its adjective. Source: LocInv, "adjective binding".

    Args:
        maps: ``(H, W, L)``.
        tokens: positions of the nouns.
        adjectives: positions of their adjectives, one for each noun.

    Raises:
        ValueError: there are not as many of both, or they are no positions of the maps.
    """
    if len(tokens) != len(adjectives):
        raise ValueError(f"adjectives={list(adjectives)}: expected one for each of tokens={list(tokens)}.")
    return 1 - _cosines(_columns(maps, tokens), _columns(maps, adjectives)).mean()


def threshold(step: int, alpha: float, beta: float) -> float:
    """The loss below which a step needs no further update: ``beta * exp(-step / alpha)``.

    Source: DPL, gradual optimisation.

    Args:
        step: from 0, the noisiest; ``step - start`` for a loss that begins late.
        alpha: steps in which the threshold falls by a factor of e, above 0.
        beta: the threshold at step 0.

    Raises:
        ValueError: ``alpha`` is not above 0.
    """
    if alpha <= 0:
        raise ValueError(f"alpha={alpha}: expected a number of steps above 0.")
    return beta * math.exp(-step / alpha)


def _full(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least: ``_EPS`` is 0 in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(maps: torch.Tensor, tokens: Sequence[int], ends: int = 0) -> None:
    last = maps.shape[-1] - 1 - ends
    if not tokens or not all(ends <= token <= last for token in tokens):
        raise ValueError(
            f"tokens={list(tokens)}: expected positions from {ends} to {last}, as word_tokens finds them; maps have "
            f"{maps.shape[-1]}."
        )


def _columns(maps: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """``(K, HW)``, the maps of ``tokens``."""
    _check(maps, tokens)
    return _full(maps).flatten(0, 1).T[list(tokens)]


def _pairs(maps: torch.Tensor, tokens: Sequence[int], masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of ``tokens`` and the masks, both ``(K, HW)``."""
    expected = (len(tokens), *maps.shape[:2])
    if tuple(masks.shape) != expected:
        raise ValueError(
            f"masks has the shape {tuple(masks.shape)}: expected {expected}, one mask of the maps' size for each token."
        )
    nouns = _columns(maps, tokens)
    return nouns, masks.to(nouns).flatten(1)


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(a, b, dim=-1, eps=_EPS)


def _smooth(maps: torch.Tensor) -> torch.Tensor:
    # The published exponent is -(d / 2s)^2 with s = 0.5, not -d^2 / 2s^2: a deviation of 0.71 under the name of 0.5.
    axis = torch.tensor([-1.0, 0.0, -1.0], dtype=maps.dtype, device=maps.device).softmax(0)
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, torch.outer(axis, axis)[None, None])[:, 0]
