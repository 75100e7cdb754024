"""Dynamic prompts where it is known which part of the picture each word names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.inversion.job import Job
from diffusion_attn.editing.inversion.null_text import NullStart
from diffusion_attn.editing.inversion.record import Inversion
from diffusion_attn.editing.inversion.words import Criterion, Weighted, first_tokens, learn_words, resized
from diffusion_attn.editing.layers import map_grid
from diffusion_attn.editing.losses import adjective_binding, box_similarity, mask_overlap, mask_similarity
from diffusion_attn.editing.text import named


def localised_prompts(
    pipe: Any,
    inversion: Inversion,
    words: Sequence[str],
    masks: torch.Tensor,
    *,
    boxes: bool = False,
    adjectives: Sequence[str] | None = None,
    guidance_scale: float = 7.5,
    num_word_steps: int = 31,
    num_null_steps: int = 31,
    null_start: NullStart = "empty",
    null_tolerance: float | None = None,
    similarity: Weighted | None = (1.0, 50.0, 0.7),
    overlap: Weighted | None = (1.0, 25.0, 0.7),
    adjective: Weighted | None = (2.0, 50.0, 0.1),
    map_size: int | Size | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Inversion:
    """The same as `dynamic_prompts` where it is known which part of the picture each word names.

    Source: LocInv; arXiv 2405.01496.

    Args:
        pipe, inversion, words, map_size, checkpoint: as in `dynamic_prompts`.
        masks: ``(K, H, W)``, the segment or the box of each word, on any grid, bool or float.
        boxes: the masks are boxes, inside which not everything is the object.
        adjectives: of each word, whose maps are bound to it; ``None``: no binding.
        guidance_scale, num_word_steps, num_null_steps, null_start, null_tolerance: as in `dynamic_prompts`.
        similarity: `mask_similarity`, or `box_similarity`, as ``(weight, alpha, beta)``; ``None``: off.
        overlap: `mask_overlap`.
        adjective: `adjective_binding`.

    Raises:
        ValueError: a word or an adjective is not in the prompt, or there is not one mask for each word.
        DiffusionAttnError: the inversion is of another model, or was begun with other options.
    """
    words = named(inversion.prompt, words)
    size = map_grid(inversion.size, map_size)
    tokens = first_tokens(pipe, inversion, words)
    if masks.ndim != 3 or len(masks) != len(words):
        raise ValueError(f"masks have the shape {tuple(masks.shape)}; give one (H, W) for each of {list(words)}.")
    if adjectives is not None and len(adjectives) != len(words):
        raise ValueError(f"adjectives are {list(adjectives)}; give one for each of {list(words)}.")
    masks = resized(masks, size)
    near = box_similarity if boxes else mask_similarity
    criteria = [
        Criterion("similarity", lambda maps: near(maps, tokens, masks.to(maps)), similarity),
        Criterion("overlap", lambda maps: mask_overlap(maps, tokens, masks.to(maps)), overlap),
    ]
    if adjectives is not None:
        bound = first_tokens(pipe, inversion, named(inversion.prompt, adjectives))
        criteria.append(Criterion("adjective", lambda maps: adjective_binding(maps, tokens, bound), adjective))
    options = {
        "words": list(words),
        "boxes": boxes,
        "adjectives": adjectives and list(adjectives),
        "guidance_scale": guidance_scale,
        "num_word_steps": num_word_steps,
        "num_null_steps": num_null_steps,
        "null_start": null_start,
        "null_tolerance": null_tolerance,
        "similarity": similarity and list(similarity),
        "overlap": overlap and list(overlap),
        "adjective": adjective and list(adjective),
        "map_size": list(size),
    }
    return learn_words(Job(pipe, inversion, "localised_prompts", options), words, criteria, checkpoint)
