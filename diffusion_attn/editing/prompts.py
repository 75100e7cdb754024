"""Which token belongs to which word, and what of a source's cross-attention goes where in a target's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

Word = str | int
"""A piece of ``prompt.split(" ")``, by its text or by its index in that list."""

Window = float | Sequence[float]
"""A part of the schedule in fractions of it: the end, or the start and the end."""

ReplaceSteps = Window | Mapping[Word, Window]
"""One window, or one for some words and ``"default_"`` for all the others."""

_LONGEST = 2**14
"""Tables are ``(L, L)``, and a tokenizer that was never told its ``model_max_length`` has one of 10**30."""


def word_tokens(prompt: str, word: Word, tokenizer: Any) -> list[int]:
    """Positions of the tokens that share a character with ``word``.

    Source: Prompt-to-Prompt, whose code adds up decoded lengths; arXiv 2208.01626. Here the tokenizer's own character
    offsets decide, which neither punctuation nor text normalisation can shift.

    Args:
        prompt: the text; what the tokenizer truncates has no position.
        word: a piece of ``prompt.split(" ")``: its text, for every occurrence, or its index.
        tokenizer: any fast ``transformers`` tokenizer.

    Returns:
        Ascending positions, 0 being the start token; empty if the word does not occur or is truncated.

    Raises:
        ValueError: the tokenizer has no character offsets.
    """
    words, _ = _words(prompt, _encode(prompt, tokenizer))
    pieces = prompt.split(" ")
    return sorted({token for n, tokens in enumerate(words) if word in (n, pieces[n]) for token in tokens})


def known_tokens(prompt: str, word: Word, tokenizer: Any, argument: str) -> list[int]:
    """`word_tokens` of a word that has to be there.

    Args:
        prompt, word, tokenizer: as in `word_tokens`.
        argument: that names it, for the error.

    Raises:
        ValueError: it is not in the prompt.
    """
    tokens = word_tokens(prompt, word, tokenizer)
    if not tokens:
        raise ValueError(f"{argument} names {word!r}, which is not a word of the prompt {prompt!r}.")
    return tokens


def replacement_matrix(
    source: str, target: str, tokenizer: Any, alignment: Literal["aligned", "reference"] = "aligned"
) -> torch.Tensor:
    """Which share of each source token's attention goes to each target token when words are swapped one for one.

    Tokens of an unchanged word, or of one that has as many in both prompts, go to their counterparts; otherwise each
    spreads evenly over the new word. Those of a word that is empty or truncated in the target go to the start token,
    which says nothing about a prompt. Source: Prompt-to-Prompt, section 3.2, "Word Swap"; arXiv 2208.01626.

    Args:
        source: the prompt whose maps are used.
        target: the prompt whose maps are replaced, of as many words.
        tokenizer: any fast ``transformers`` tokenizer.
        alignment: ``"reference"`` is as published: after the last changed word every target token takes the map of the
            source's token at its own position, which belongs to another word where token counts differ.

    Returns:
        ``(L, L)`` float, ``edited_map = source_map @ matrix``. Aligned rows sum to 1, except those of padding that a
        longer target pushes out at the end.

    Raises:
        ValueError: the prompts have not as many words, ``alignment`` is unknown, or the tokenizer as in `word_tokens`.
    """
    if alignment not in ("aligned", "reference"):
        raise ValueError(f"alignment={alignment!r}: expected 'aligned' or 'reference'.")
    words = source.split(" "), target.split(" ")
    if len(words[0]) != len(words[1]):
        raise ValueError(
            f"source={source!r} has {len(words[0])} words and target={target!r} has {len(words[1])}: words are swapped "
            "one for one; use as many, or refinement_map for words that are added or removed."
        )
    length = _length(tokenizer)
    cuts = list(zip(_cuts(source, tokenizer), _cuts(target, tokenizer), strict=True))
    matrix = torch.zeros(length, length)
    for (top, left), (bottom, right) in pairwise(cuts):
        if left == right:  # no counterpart
            left, right = 0, 1
        rows, columns = bottom - top, right - left
        matrix[top:bottom, left:right] = torch.eye(rows) if rows == columns else 1 / columns
    row, column = cuts[-1]
    size = length - max(row, column)
    if alignment == "reference":
        changed = [n for n, (a, b) in enumerate(zip(*words, strict=True)) if a != b]
        row, column = cuts[2 * changed[-1] + 3] if changed else (0, 0)  # two lead, then two for each word
        size, row = length - max(row, column), column
        matrix[:, column:] = 0
    matrix[row : row + size, column : column + size] = torch.eye(size)
    return matrix


def refinement_map(source: str, target: str, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each target token stands in the source, when words are added or removed.

    The longest common subsequence of both prompts' token ids; past the target's tokens positions stand for themselves.
    Source: Prompt-to-Prompt, section 3.2, "Adding a New Phrase"; arXiv 2208.01626.

    Args:
        source: the prompt whose maps are used.
        target: the prompt whose maps are replaced where it repeats the source.
        tokenizer: any fast ``transformers`` tokenizer.

    Returns:
        ``mapper (L,)`` long, positions in the source, -1 for a new token, and ``alphas (L,)`` float, 1 where the map is
        copied and 0 where the token is new: ``source_map[..., mapper] * alphas + target_map * (1 - alphas)``.

    Raises:
        ValueError: the tokenizer as in `word_tokens`.
    """
    ids = [_encode(prompt, tokenizer)["input_ids"] for prompt in (source, target)]
    mapper = torch.arange(_length(tokenizer))
    mapper[: len(ids[1])] = torch.tensor(_align(*ids))
    return mapper, (mapper >= 0).float()


def word_schedule(prompt: str, replace_steps: ReplaceSteps, num_inference_steps: int, tokenizer: Any) -> torch.Tensor:
    """At which steps the source's map is injected for each token of a target ``prompt``.

    A window begins with step ``int(start * (N + 1))`` and ends before ``int(end * (N + 1))``. Source: Prompt-to-Prompt,
    section 3.2, equation for "Word Swap", with windows for single words as in its code; arXiv 2208.01626.

    Args:
        prompt: the target.
        replace_steps: the end of the window or its ``(start, end)``, as fractions of the schedule; or a dict of windows
            for words of ``prompt``, by text or index, ``"default_"`` being that of all other tokens: always, if it is
            missing.
        num_inference_steps: ``N``.
        tokenizer: any fast ``transformers`` tokenizer.

    Returns:
        ``(N, L)`` float, 1 where the source's map is injected, else 0.

    Raises:
        ValueError: a word is not in the prompt, a window is not one, ``num_inference_steps`` is below 1, or the
            tokenizer as in `word_tokens`.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: expected at least 1.")
    windows: Mapping[Any, Any] = replace_steps if isinstance(replace_steps, Mapping) else {"default_": replace_steps}
    schedule = torch.zeros(num_inference_steps, _length(tokenizer))
    step = torch.arange(num_inference_steps)[:, None]
    for word, window in {"default_": (0.0, 1.0), **windows}.items():
        start, end = (int(bound * (num_inference_steps + 1)) for bound in _bounds(window))
        tokens = slice(None) if word == "default_" else word_tokens(prompt, word, tokenizer)
        if not tokens:
            raise ValueError(
                f"replace_steps names {word!r}, which has no token in {prompt!r}; name a word of the prompt as it "
                f"stands between spaces, or its index, within the first {schedule.shape[1]} tokens."
            )
        schedule[:, tokens] = ((start <= step) & (step < end)).float()
    return schedule


def _length(tokenizer: Any) -> int:
    """``L``, of padded prompts."""
    length = tokenizer.model_max_length
    if length > _LONGEST:
        raise ValueError(
            f"tokenizer.model_max_length is {length}: expected the length of a padded prompt; set it, for example to "
            "77, which is CLIP's."
        )
    return length


def _encode(prompt: str, tokenizer: Any) -> Mapping[str, Any]:
    """Ids, offsets and flags of the truncated prompt, not padded."""
    encoded = tokenizer(
        prompt,
        truncation=True,
        max_length=min(tokenizer.model_max_length, _LONGEST),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    if "offset_mapping" not in encoded:
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, which does not tell which characters a token stands for; load "
            "the fast one (AutoTokenizer, use_fast=True)."
        )
    return encoded


def _words(prompt: str, encoded: Mapping[str, Any]) -> tuple[list[list[int]], list[int]]:
    """The tokens of each word, and those of the whole text: all but the special ones."""
    text = [n for n, special in enumerate(encoded["special_tokens_mask"]) if not special]
    words, start = [], 0
    for word in prompt.split(" "):
        end = start + len(word)
        spans = ((n, encoded["offset_mapping"][n]) for n in text)
        words.append([n for n, (first, past) in spans if max(first, start) < min(past, end)])
        start = end + 1
    return words, text


def _cuts(prompt: str, tokenizer: Any) -> list[int]:
    """Where each part of a prompt begins: start, text, then word and what follows it in turns, and the special end."""
    words, text = _words(prompt, _encode(prompt, tokenizer))
    cuts = [0, text[0] if text else 1]
    for tokens in words:
        # A word without tokens lies, empty, where the one before it ends.
        cuts += [max(cuts[-1], tokens[0]), tokens[-1] + 1] if tokens else [cuts[-1]] * 2
    return [*cuts, max(cuts[-1], text[-1] + 1 if text else 1)]


def _align(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """For each of ``target`` its place in ``source``, or -1, along a longest common subsequence.

    Equal to the published alignment with scores 0, 1, -1 for gap, match, mismatch, since two gaps beat any mismatch.
    """
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            best[i + 1][j + 1] = max(best[i + 1][j], best[i][j + 1], best[i][j] + (a == b))
    places, i, j = [-1] * len(target), len(source), len(target)
    while i and j:
        # Of equally long subsequences the published one: leave out a target token first, then a source token.
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            places[j] = i
    return places


def _bounds(window: Window) -> tuple[float, float]:
    bounds = (0.0, window) if isinstance(window, (int, float)) else tuple(window)
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
        raise ValueError(
            f"replace_steps has the window {window!r}: expected its end, or (start, end), as fractions of the schedule."
        )
    return bounds[0], bounds[1]
