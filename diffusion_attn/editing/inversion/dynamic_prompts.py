"""Dynamic prompt learning: embeddings of the nouns for each step, under which each one looks at its own object."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.attention import AttentionControl, MapRecorder
from diffusion_attn.editing.inversion.job import LOSS_SCALE, Job
from diffusion_attn.editing.inversion.null_text import NullStart
from diffusion_attn.editing.inversion.record import Inversion
from diffusion_attn.editing.layers import map_grid
from diffusion_attn.editing.losses import (
    adjective_binding,
    attention_balancing,
    background_leakage,
    box_similarity,
    disjoint_objects,
    mask_overlap,
    mask_similarity,
    threshold,
)
from diffusion_attn.editing.text import LearnedWords, encode, named, occurrences, text_encoders, word_rows

Weighted = tuple[float, float, float]
"""A loss's weight, and the ``alpha`` and ``beta`` of its threshold."""


@dataclass(frozen=True)
class _Criterion:
    """A loss of the maps ``(H, W, L)``; one without weight is computed for the history alone."""

    name: str
    loss: Callable[[torch.Tensor], torch.Tensor]
    weighted: Weighted | None

    def met(self, value: float, step: int) -> bool:
        return self.weighted is None or value < threshold(step, *self.weighted[1:])


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
        background = _resized(background[None], size)[0]
    tokens = _first_tokens(pipe, inversion, words)
    criteria = [
        _Criterion("balancing", lambda maps: attention_balancing(maps, tokens, temperature=temperature), balancing),
        _Criterion("disjoint", lambda maps: disjoint_objects(maps, tokens), disjoint),
        _Criterion("leakage", lambda maps: _leakage(maps, tokens, background), leakage),
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
    return _learn(Job(pipe, kept, "dynamic_prompts", options), words, criteria, checkpoint)


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
    tokens = _first_tokens(pipe, inversion, words)
    if masks.ndim != 3 or len(masks) != len(words):
        raise ValueError(f"masks have the shape {tuple(masks.shape)}; give one (H, W) for each of {list(words)}.")
    if adjectives is not None and len(adjectives) != len(words):
        raise ValueError(f"adjectives are {list(adjectives)}; give one for each of {list(words)}.")
    masks = _resized(masks, size)
    near = box_similarity if boxes else mask_similarity
    criteria = [
        _Criterion("similarity", lambda maps: near(maps, tokens, masks.to(maps)), similarity),
        _Criterion("overlap", lambda maps: mask_overlap(maps, tokens, masks.to(maps)), overlap),
    ]
    if adjectives is not None:
        bound = _first_tokens(pipe, inversion, named(inversion.prompt, adjectives))
        criteria.append(_Criterion("adjective", lambda maps: adjective_binding(maps, tokens, bound), adjective))
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
    return _learn(Job(pipe, inversion, "localised_prompts", options), words, criteria, checkpoint)


@torch.no_grad()
def _learn(
    job: Job, words: Sequence[str], criteria: Sequence[_Criterion], checkpoint: str | os.PathLike[str] | None
) -> Inversion:
    job.words = tuple(words)
    rows = job.rows if job.rows is not None else word_rows(job.pipe, job.prompt, words)
    with job.running(checkpoint):
        for step in job.steps():
            rows = _fit_words(job, step, rows, criteria)
            text = encode(job.pipe, [job.prompt], LearnedWords(job.words, rows, job.prompt))
            job.fit_null(step, job.network(job.latents, job.path.timesteps[step], text), rows)
    return job.result


def _fit_words(job: Job, step: int, rows: torch.Tensor, criteria: Sequence[_Criterion]) -> torch.Tensor:
    """``(K, D)``: the embeddings of the words at ``step``, from those of the step before."""
    active = [criterion for criterion in criteria if criterion.weighted is not None]
    rows = rows.detach().clone()
    optimizer = torch.optim.AdamW([rows], lr=1e-3)
    recorder = MapRecorder("cross", tuple(job.options["map_size"]))
    control = AttentionControl(job.size, recorders=[recorder], guided=False)
    groups = [tokens for word in job.words for tokens in occurrences(job.prompt, word, text_encoders(job.pipe)[0][0])]
    with control.on(job.pipe.unet):
        for iteration in range(job.options["num_word_steps"] if active else 0):
            recorder.begin()
            with torch.enable_grad():
                text = encode(job.pipe, [job.prompt], LearnedWords(job.words, rows.requires_grad_(), job.prompt))
                job.network(job.latents, job.path.timesteps[step], text)
                maps = _merged(recorder.take()[0], groups)
                losses = {criterion.name: criterion.loss(maps) for criterion in criteria}
                total = torch.stack([c.weighted[0] * losses[c.name] for c in active if c.weighted]).sum()
                scaled = total * LOSS_SCALE
            values = {name: float(loss) for name, loss in losses.items()}
            job.history.append({"step": step, "iteration": iteration, "total": float(total), **values})
            if all(criterion.met(values[criterion.name], step) for criterion in criteria):
                break
            (gradient,) = torch.autograd.grad(scaled, rows)
            rows.grad = gradient / LOSS_SCALE
            optimizer.step()
    return rows.detach()


def _merged(maps: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """The maps ``(H, W, L)``, where the first token of a word has the mean of all its tokens."""
    columns = list(maps.unbind(-1))
    for first, *others in groups:
        if others:
            columns[first] = maps[..., [first, *others]].mean(-1)
    return torch.stack(columns, -1)


def _leakage(maps: torch.Tensor, tokens: Sequence[int], background: torch.Tensor | None) -> torch.Tensor:
    if background is None:
        return maps.new_zeros(())
    return background_leakage(maps, tokens, background.to(maps.device))


def _first_tokens(pipe: Any, inversion: Inversion, words: Sequence[str]) -> list[int]:
    """The position of the first token of each word.

    Raises:
        ValueError: there are none, or one is not in the prompt.
    """
    prompt = inversion.prompt
    if prompt is None:
        raise ValueError("the inversion has no prompt; invert with the text, in which the words can be found.")
    if isinstance(words, str) or not words:
        raise ValueError(f"words is {words!r}; give a list of words of the prompt {prompt!r}.")
    tokenizer = text_encoders(pipe)[0][0]
    found = {word: occurrences(prompt, word, tokenizer) for word in words}
    for word, places in found.items():
        if not places:
            raise ValueError(f"words names {word!r}, which is not a word of the prompt {prompt!r}.")
    return [found[word][0][0] for word in words]


def _resized(masks: torch.Tensor, size: Size) -> torch.Tensor:
    """Masks ``(K, H, W)`` on the grid of the maps, where most of a cell counts."""
    if tuple(masks.shape[-2:]) == size:
        return masks
    return (torch.nn.functional.adaptive_avg_pool2d(masks.float(), size) > 0.5).to(masks.dtype)
