"""Dynamic prompt learning: embeddings of the nouns for each step, under which each one looks at its own object."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.inversion.job import Job
from diffusion_attn.editing.inversion.null_text import NullStart
from diffusion_attn.editing.inversion.record import Inversion
from diffusion_attn.editing.inversion.words import Criterion, Weighted, first_tokens, learn_words, resized
from diffusion_attn.editing.layers import map_grid
from diffusion_attn.editing.losses import attention_balancing, background_leakage, disjoint_objects
from diffusion_attn.editing.text import named


def dynamic_prompts(
    pipe: Any,
    inversion: Inversion,
    words: Sequence[str],
    *,
    background: torch.Tensor | None = None,
    guidance_scale: float = 7.5,
    num_word_steps: int = 21,
    num_null_steps: int = 51,
    null_start: NullStart = "empty",
    null_tolerance: float | None = None,
    balancing: Weighted | None = (1.0, 25.0, 0.3),
    disjoint: Weighted | None = (0.05, 25.0, 0.9),
    leakage: Weighted | None = (0.05, 50.0, 0.7),
    temperature: float = 100.0,
    map_size: int | Size | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Inversion:
    """Learn embeddings of ``words`` and of the empty prompt for each step, the first from attention maps.

    At every step the words are optimised until all losses are below thresholds that fall with the steps; then the
    unconditional embedding is fitted as in `null_text`. Source: DPL, sections 3.2 to 3.4; arXiv 2309.15664. The default
    options are the published ones; ``num_null_steps=10, null_start="previous", null_tolerance=1e-5`` cost a fifth.

    Args:
        pipe: the pipeline that ``inversion`` was made with.
        inversion: from `ddim_invert`. An unfinished one, of the file ``checkpoint``, is continued where it stopped.
        words: nouns of the prompt, pieces of ``prompt.split(" ")`` or their indices. The maps of one with several
            tokens are averaged.
        background: ``(H, W)``, on the grid of the maps or any other, bool or float; ``None`` switches ``leakage`` off.
        guidance_scale: of the sampling that is to return.
        num_word_steps: most updates of the words at one step.
        num_null_steps, null_start, null_tolerance: as in `null_text`.
        balancing: `attention_balancing`, as ``(weight, alpha, beta)`` of loss and threshold; ``None``: off.
        disjoint: `disjoint_objects`.
        leakage: `background_leakage`.
        temperature: of `attention_balancing`. Where other tokens take so much that the loss is 1 and has no gradient
            left, as in models whose padding takes most, a lower one helps.
        map_size: ``(height, width)`` of the layers whose maps are read; ``None``: a quarter of the latent's.
        checkpoint: as in `null_text`.

    Returns:
        ``inversion`` with ``words``, ``word_embeds``, ``null_embeds``, ``reconstruction``, ``background`` on the grid
        of the maps, and ``history``: an entry for every evaluation, with ``step, iteration, total, balancing,
        disjoint, leakage``, unweighted but for ``total``.

    Raises:
        ValueError: a word is not in the prompt, or the maps are not of a level of the UNet.
        DiffusionAttnError: the inversion is of another model, or was begun with other options.
    """
    words = named(inversion.prompt, words)
    size = map_grid(inversion.size, map_size)
    if background is None:
        leakage = None
    else:
        background = resized(background[None], size)[0]
    tokens = first_tokens(pipe, inversion, words)
    criteria = [
        Criterion("balancing", lambda maps: attention_balancing(maps, tokens, temperature=temperature), balancing),
        Criterion("disjoint", lambda maps: disjoint_objects(maps, tokens), disjoint),
        Criterion("leakage", lambda maps: _leakage(maps, tokens, background), leakage),
    ]
    options = {
        "words": list(words),
        "guidance_scale": guidance_scale,
        "num_word_steps": num_word_steps,
        "num_null_steps": num_null_steps,
        "null_start": null_start,
        "null_tolerance": null_tolerance,
        "balancing": balancing and list(balancing),
        "disjoint": disjoint and list(disjoint),
        "leakage": leakage and list(leakage),
        "temperature": temperature,
        "map_size": list(size),
    }
    kept = replace(inversion, background=background)
    return learn_words(Job(pipe, kept, "dynamic_prompts", options), words, criteria, checkpoint)


def _leakage(maps: torch.Tensor, tokens: Sequence[int], background: torch.Tensor | None) -> torch.Tensor:
    if background is None:
        return maps.new_zeros(())
    return background_leakage(maps, tokens, background.to(maps.device))
