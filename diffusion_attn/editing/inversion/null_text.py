"""Null-text inversion: unconditional embeddings for each step that make guided sampling come back to a picture."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from diffusion_attn.editing.inversion.job import Job
from diffusion_attn.editing.inversion.record import Inversion
from diffusion_attn.editing.text import encode

NullStart = Literal["previous", "empty"]


@torch.no_grad()
def null_text(
    pipe: Any,
    inversion: Inversion,
    *,
    negative_prompt_embeds: torch.Tensor | None = None,
    guidance_scale: float = 7.5,
    num_null_steps: int = 10,
    null_start: NullStart = "previous",
    null_tolerance: float | None = 1e-5,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Inversion:
    """Learn an unconditional embedding for each step, so that sampling with guidance returns to the picture.

    Weights stay as they are; what is learned is float32; the prompt's half is computed once for each step. Source:
    Null-text Inversion, section 3.2 and algorithm 1; arXiv 2211.09794.

    Args:
        pipe: the pipeline that ``inversion`` was made with.
        inversion: from `ddim_invert`. An unfinished one, of the file ``checkpoint``, is continued where it stopped.
        negative_prompt_embeds: ``(1, L, D)`` to start from; ``None``: the empty prompt.
        guidance_scale: of the sampling that is to return.
        num_null_steps: most updates of one step.
        null_start: every step starts from the result of the step before it, or from the empty prompt.
        null_tolerance: step ``i`` ends after an update whose loss was below ``null_tolerance + 2e-5 * i``; ``None``:
            never early.
        checkpoint: a file that is written after every step, so that an interrupted run can go on.

    Returns:
        ``inversion`` with ``null_embeds`` and ``reconstruction``.

    Raises:
        DiffusionAttnError: the inversion is of another model, or was begun with other options.
    """
    options = {
        "guidance_scale": guidance_scale,
        "num_null_steps": num_null_steps,
        "null_start": null_start,
        "null_tolerance": null_tolerance,
    }
    job = Job(pipe, inversion, "null_text", options, negative_prompt_embeds)
    with job.running(checkpoint):
        for step in job.steps():
            learned = inversion.learned(step)
            text = job.text if learned is None else encode(pipe, [job.prompt], learned)
            predicted = job.network(job.latents, job.path.timesteps[step], text)
            job.fit_null(step, predicted)
    return job.result
