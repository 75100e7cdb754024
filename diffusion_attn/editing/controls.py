"""What a target's attention becomes, given the source's: Prompt-to-Prompt as pure functions of probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from diffusion_attn.editing.prompts import (
    ReplaceSteps,
    Window,
    refinement_map,
    replacement_matrix,
    word_schedule,
    word_tokens,
)

Kind = Literal["cross", "self", "image"]
EditType = Literal["replace", "refine", "auto"]


class PromptEdit:
    """Prompt-to-Prompt: the attention of edited prompts, made from that of the prompt they edit.

    Rows of maps are the conditional half of a batch, the source first. Nothing is counted: the step is an argument.
    Source: arXiv 2208.01626, section 3.2.

    Args:
        source_prompt: the prompt that is edited.
        target_prompt: what it becomes, or several of that.
        tokenizer: of the text encoder, with character offsets.
        num_inference_steps: ``N``; step 0 is the noisiest.
        edit_type: ``"replace"`` exchanges words and takes the same number of words in both prompts, ``"refine"`` adds
            or removes words, ``"auto"`` replaces where all the prompts have the same number of words.
        alignment: of replaced words, see `replacement_matrix`.
        cross_replace_steps: the window, a fraction of the steps or ``(start, end)``, in which cross-attention is taken
            from the source, or one for each of some words of the targets, as in `word_schedule`.
        self_replace_steps: the window of self-attention.
        image_replace_steps: the window of attention to the tokens of image adapters.
        word_weights: ``{word: factor}`` over words of the targets, by which their maps are multiplied after the edit.
            Rows are not brought back to a sum of 1. With equal prompts this alone is the edit.
        max_queries: layers of more queries keep their self-attention and image attention; ``None``: no limit.

    Raises:
        ValueError: a word is in no target, or the prompts do not suit the edit.
    """

    def __init__(
        self,
        source_prompt: str,
        target_prompt: str | Sequence[str],
        tokenizer: Any,
        num_inference_steps: int,
        *,
        edit_type: EditType = "refine",
        alignment: Literal["aligned", "reference"] = "aligned",
        cross_replace_steps: ReplaceSteps = 0.8,
        self_replace_steps: Window = 0.4,
        image_replace_steps: Window = 0.0,
        word_weights: Mapping[str | int, float] | None = None,
        max_queries: int | None = None,
    ) -> None:
        targets = [target_prompt] if isinstance(target_prompt, str) else list(target_prompt)
        if not targets:
            raise ValueError("target_prompt is an empty list; give one prompt or several.")
        if edit_type not in ("replace", "refine", "auto"):
            raise ValueError(f"edit_type is {edit_type!r}; give 'replace', 'refine' or 'auto'.")
        if edit_type == "auto":
            words = {len(prompt.split(" ")) for prompt in (source_prompt, *targets)}
            edit_type = "replace" if len(words) == 1 else "refine"
        self.edit_type = edit_type
        self.num_inference_steps = num_inference_steps
        self.max_queries = max_queries
        self._windows = {
            "self": _steps(self_replace_steps, num_inference_steps, "self_replace_steps"),
            "image": _steps(image_replace_steps, num_inference_steps, "image_replace_steps"),
        }
        schedules = _schedules(targets, cross_replace_steps, num_inference_steps, tokenizer)
        tables = {"schedule": schedules, "weights": _weights(targets, word_weights or {}, tokenizer)}
        if edit_type == "replace":
            matrices = [replacement_matrix(source_prompt, target, tokenizer, alignment) for target in targets]
            tables["matrix"] = torch.stack(matrices)
        else:
            mappers, alphas = zip(
                *(refinement_map(source_prompt, target, tokenizer) for target in targets), strict=True
            )
            tables["mapper"], tables["alphas"] = torch.stack(mappers), torch.stack(alphas)
        self._tables = {torch.device("cpu"): tables}

    def edit(self, maps: torch.Tensor, *, kind: Kind, step: int) -> torch.Tensor:
        """The probabilities of all rows after the edit; those of the source are as they came.

        Args:
            maps: ``(1 + T, heads, queries, keys)``, the source's and the ``T`` targets'.
            kind: attention to the prompt, to the picture itself, or to image adapter tokens.
            step: of the run, from 0.
        """
        source, targets = maps[:1], maps[1:]
        if kind != "cross":
            return source.expand_as(maps) if self.copies(kind, step, maps.shape[2]) else maps
        if not self.edits_words(step):
            return maps
        tables = self._on(maps.device)
        if self.edit_type == "replace":
            edited = torch.einsum("hqs,tsk->thqk", source[0], tables["matrix"].to(maps.dtype))
        else:
            copied = source[0][..., tables["mapper"].clamp(min=0)].permute(2, 0, 1, 3)
            edited = targets.lerp(copied, _columns(tables["alphas"], maps))
        edited = edited * _columns(tables["weights"], maps)
        return torch.cat([source, targets.lerp(edited, _columns(tables["schedule"][:, step], maps))])

    def copies(self, kind: Literal["self", "image"], step: int, queries: int) -> bool:
        """Whether targets take the source's map as it is, which needs no map: ``softmax(q_source k_source) v``."""
        start, end = self._windows[kind]
        return start <= step < end and (self.max_queries is None or queries <= self.max_queries)

    def edits_words(self, step: int) -> bool:
        """Whether cross-attention is edited at ``step``."""
        return bool(self._tables[torch.device("cpu")]["schedule"][:, step].any())

    def ever_copies(self, queries: int) -> bool:
        """Whether there is a step at which the self-attention of a layer is the source's."""
        start, end = self._windows["self"]
        return start < end and self.copies("self", start, queries)

    def _on(self, device: torch.device) -> dict[str, torch.Tensor]:
        if device not in self._tables:
            tables = self._tables[torch.device("cpu")]
            self._tables[device] = {name: table.to(device) for name, table in tables.items()}
        return self._tables[device]


def _columns(table: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """A table ``(T, keys)`` beside maps ``(T, heads, queries, keys)``."""
    return table[:, None, None].to(maps.dtype)


def _steps(window: Window, num_inference_steps: int, name: str) -> tuple[int, int]:
    start, end = (0.0, window) if isinstance(window, (int, float)) else window
    if not 0 <= start <= end:
        raise ValueError(f"{name} is {window!r}; give the end, or (start, end), as fractions of the steps.")
    return int(num_inference_steps * start), int(num_inference_steps * end)


def _schedules(
    targets: list[str], replace_steps: ReplaceSteps, num_inference_steps: int, tokenizer: Any
) -> torch.Tensor:
    """``(T, N, L)``; a word with a window of its own need not be in every target, but in one."""
    if not isinstance(replace_steps, Mapping):
        return torch.stack([word_schedule(t, replace_steps, num_inference_steps, tokenizer) for t in targets])
    words = [word for word in replace_steps if word != "default_"]
    known = {word: _targets_with(word, targets, tokenizer, "cross_replace_steps") for word in words}
    schedules = []
    for target in targets:
        absent = {word for word in words if target not in known[word]}
        windows = {word: window for word, window in replace_steps.items() if word not in absent}
        schedules.append(word_schedule(target, windows, num_inference_steps, tokenizer))
    return torch.stack(schedules)


def _weights(targets: list[str], word_weights: Mapping[str | int, float], tokenizer: Any) -> torch.Tensor:
    """``(T, L)``, ones where a token has no weight."""
    weights = torch.ones(len(targets), tokenizer.model_max_length)
    for word, factor in word_weights.items():
        found = _targets_with(word, targets, tokenizer, "word_weights")
        for row, target in enumerate(targets):
            weights[row, found.get(target, [])] = factor
    return weights


def _targets_with(word: str | int, targets: list[str], tokenizer: Any, argument: str) -> dict[str, list[int]]:
    """The targets in which ``word`` occurs, with its tokens."""
    found = {target: word_tokens(target, word, tokenizer) for target in targets}
    found = {target: tokens for target, tokens in found.items() if tokens}
    if not found:
        raise ValueError(f"{argument} names {word!r}, which is not a word of {', '.join(map(repr, targets))}.")
    return found
