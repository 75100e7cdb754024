"""Embeddings of words, learned step by step until losses of their attention maps are low enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.attention import AttentionControl, MapRecorder
from diffusion_attn.editing.inversion.job import LOSS_SCALE, Job
from diffusion_attn.editing.inversion.record import Inversion
from diffusion_attn.editing.losses import threshold
from diffusion_attn.editing.prompts import known_tokens
from diffusion_attn.editing.text import LearnedWords, encode, occurrences, text_encoders, word_rows

Weighted = tuple[float, float, float]
"""A loss's weight, and the ``alpha`` and ``beta`` of its threshold."""


@dataclass(frozen=True)
class Criterion:
    """A loss of the maps ``(H, W, L)``; one without weight is computed for the history alone."""

    name: str
    loss: Callable[[torch.Tensor], torch.Tensor]
    weighted: Weighted | None

    def met(self, value: float, step: int) -> bool:
        """Whether ``value`` is low enough at ``step``."""
        return self.weighted is None or value < threshold(step, *self.weighted[1:])


@torch.no_grad()
def learn_words(
    job: Job, words: Sequence[str], criteria: Sequence[Criterion], checkpoint: str | os.PathLike[str] | None
) -> Inversion:
    """Learn embeddings of ``words`` and of the empty prompt for each step of ``job``.

    Args:
        job: whose options have ``map_size`` and ``num_word_steps``.
        words: of its prompt.
        criteria: the losses; a step's words are done when all are met.
        checkpoint: as in `null_text`.
    """
    job.words = tuple(words)
    rows = job.rows if job.rows is not None else word_rows(job.pipe, job.prompt, words)
    with job.running(checkpoint):
        for step in job.steps():
            rows = _fit_words(job, step, rows, criteria)
            text = encode(job.pipe, [job.prompt], LearnedWords(job.words, rows, job.prompt))
            job.fit_null(step, job.network(job.latents, job.path.timesteps[step], text), rows)
    return job.result


def _fit_words(job: Job, step: int, rows: torch.Tensor, criteria: Sequence[Criterion]) -> torch.Tensor:
    """``(K, D)``: the embeddings of the words at ``step``, from those of the step before."""
    active = [criterion for criterion in criteria if criterion.weighted is not None]
    rows = rows.detach().clone()
    optimizer = torch.optim.AdamW([rows], lr=1e-3)
    recorder = MapRecorder("cross", tuple(job.options["map_size"]))
    control = AttentionControl(job.size, recorders=[recorder])
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


def first_tokens(pipe: Any, inversion: Inversion, words: Sequence[str]) -> list[int]:
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
    return [known_tokens(prompt, word, tokenizer, "words")[0] for word in words]


def resized(masks: torch.Tensor, size: Size) -> torch.Tensor:
    """Masks ``(K, H, W)`` on the grid of the maps, where most of a cell counts."""
    if tuple(masks.shape[-2:]) == size:
        return masks
    return (torch.nn.functional.adaptive_avg_pool2d(masks.float(), size) > 0.5).to(masks.dtype)
