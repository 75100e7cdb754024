"""How a picture is inverted before Prompt-to-Prompt edits it, by the names that commands have for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS = ("p2p", "direct", "null-text", "dpl")

_NULL_TEXT: dict[str, Any] = {"num_null_steps": 10, "null_start": "previous", "null_tolerance": 1e-5}


def invert(
    pipe: Any,
    image: Any,
    prompt: str,
    method: str,
    words: Sequence[str],
    *,
    steps: int,
    guidance: float,
    begun: Any = None,
    checkpoint: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> Any:
    """The inversion of a picture.

    Args:
        pipe: a `DPLPipeline`.
        image: the picture.
        prompt: describes it.
        method: one of `METHODS`.
        words: that ``dpl`` learns.
        steps, guidance: of the schedule, and of what is learned.
        begun: an inversion by the same method that is not finished.
        checkpoint: the file that what is learned is kept in, step by step.
        settings: kept with the inversion.
    """
    from diffusion_attn.editing.inversion import ddim_invert, direct_inversion, dynamic_prompts, null_text

    inversion, background = begun, None if begun is None else begun.background
    if begun is None and method == "dpl":
        inversion, background = pipe.segment(image, prompt, words, num_inference_steps=steps)
    elif begun is None:
        inversion = ddim_invert(pipe, pipe.encode_image(image), prompt, num_inference_steps=steps)
    inversion.settings.update(settings or {})
    options = {**_NULL_TEXT, "guidance_scale": guidance, "checkpoint": checkpoint}
    if method == "dpl":
        return dynamic_prompts(pipe, inversion, words, background=background, **options)
    if method == "null-text":
        return null_text(pipe, inversion, **options)
    return direct_inversion(pipe, inversion) if method == "direct" else inversion
