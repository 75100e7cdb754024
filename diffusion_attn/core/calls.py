"""How a text-to-image pipeline is called: what differs among families in the arguments for prompts and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any


def call_arguments(pipe: Any, prompts: Sequence[str], guidance: float | None = None) -> dict[str, Any]:
    """The arguments of ``pipe`` that draw ``prompts``.

    FLUX takes the embedded guidance scale where its transformer has that input, and else holds the prompt against the
    empty one; its T5 prompts are as long as the tokenizer says, which for the published models is the default.

    Args:
        pipe: a text-to-image pipeline.
        prompts: one for each picture.
        guidance: scale, 1 for none; ``None`` leaves it to the pipeline.
    """
    call: dict[str, Any] = {"prompt": list(prompts)}
    parameters = signature(pipe.__call__).parameters
    if "max_sequence_length" in parameters:
        longest = parameters["max_sequence_length"].default
        tokenizer = getattr(pipe, "tokenizer_3", None) or getattr(pipe, "tokenizer_2", None)
        call["max_sequence_length"] = min(longest, getattr(tokenizer, "model_max_length", longest))
    if guidance is None:
        return call
    transformer = getattr(pipe, "transformer", None)
    if transformer is None or transformer.config.get("guidance_embeds", True):
        return {**call, "guidance_scale": guidance}
    if guidance <= 1:
        return call
    return {**call, "negative_prompt": [""] * len(call["prompt"]), "true_cfg_scale": guidance}
