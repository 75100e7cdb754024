"""Prompts as a denoiser is given them, with embeddings of words that were learned for a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_attn.core.enable import eager
from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.editing.prompts import known_tokens, word_tokens


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is told of several prompts.

    Attributes:
        embeds: ``(rows, L, D)``.
        pooled: ``(rows, P)``, of SDXL.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None

    def rows(self, indices: torch.Tensor) -> Conditioning:
        """Some of them."""
        return Conditioning(self.embeds[indices], None if self.pooled is None else self.pooled[indices])

    @staticmethod
    def join(*parts: Conditioning) -> Conditioning:
        """The rows of all ``parts``."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditioning(torch.cat([part.embeds for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class LearnedWords:
    """Input embeddings that some words have instead of their own.

    Attributes:
        words: pieces of ``prompt.split(" ")``.
        rows: ``(K, D)``, one for each token of each word in order; of two text encoders side by side in ``D``.
        prompt: that they were learned in, where a word's tokens are counted.
    """

    words: tuple[str, ...]
    rows: torch.Tensor
    prompt: str

    def places(self, prompt: str, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Positions in the tokenised ``prompt``, and which row belongs to each."""
        positions: list[int] = []
        rows: list[int] = []
        first = 0
        for word in self.words:
            known = occurrences(self.prompt, word, tokenizer)
            end = first + len(known[0] if known else ())
            for found in occurrences(prompt, word, tokenizer):
                # The end of a prompt may cut a word.
                pairs = list(zip(found, range(first, end), strict=False))
                positions += [position for position, _ in pairs]
                rows += [row for _, row in pairs]
            first = end
        return positions, rows


def encode(pipe: Any, prompts: Sequence[str], learned: LearnedWords | None = None) -> Conditioning:
    """Encode ``prompts`` with the one or two text encoders of a Stable Diffusion pipeline, as the pipeline does.

    Gradients flow to the rows of ``learned``, where they are on.
    """
    encoders = text_encoders(pipe)
    states, pooled, first = [], None, 0
    for tokenizer, encoder in encoders:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = device_of(pipe)
        inputs: dict[str, Any] = {"input_ids": tokens.input_ids.to(device)}
        if getattr(encoder.config, "use_attention_mask", False):
            inputs["attention_mask"] = tokens.attention_mask.to(device)
        width = encoder.get_input_embeddings().embedding_dim
        with eager(encoder), _overwritten(encoder, tokenizer, prompts, learned, slice(first, first + width)):
            out = encoder(**inputs, output_hidden_states=is_xl(pipe))
        first += width
        states.append(out.hidden_states[-2] if is_xl(pipe) else out[0])
        pooled = out[0]
    embeds = torch.cat(states, -1)
    return Conditioning(embeds, pooled) if is_xl(pipe) else Conditioning(embeds)


def encode_negative(pipe: Any, prompt: str | None) -> Conditioning:
    """Encode a negative prompt; none is the empty one, or zeros where the pipeline of SDXL has been told so.

    Raises:
        ValueError: there are several.
    """
    if not isinstance(prompt, (str, type(None))):
        raise ValueError(f"negative_prompt is {prompt!r}; give one text for all rows.")
    conditioning = encode(pipe, [prompt or ""])
    zeros = is_xl(pipe) and getattr(pipe, "config", {}).get("force_zeros_for_empty_prompt", True)
    if prompt is not None or not zeros:
        return conditioning
    assert conditioning.pooled is not None
    return Conditioning(torch.zeros_like(conditioning.embeds), torch.zeros_like(conditioning.pooled))


def named(prompt: str | None, words: Sequence[str | int]) -> Sequence[str]:
    """Words by their text, where indices in ``prompt.split(" ")`` may be among them.

    Raises:
        ValueError: there is no such index.
    """
    if isinstance(words, str):
        return words
    pieces = (prompt or "").split(" ")
    for word in words:
        if isinstance(word, int) and not 0 <= word < len(pieces):
            raise ValueError(f"words names index {word}, and the prompt {prompt!r} has {len(pieces)} words, from 0.")
    return [pieces[word] if isinstance(word, int) else word for word in words]


def word_rows(pipe: Any, prompt: str, words: Sequence[str]) -> torch.Tensor:
    """``(K, D)`` float32: the input embeddings that the words of ``prompt`` have, one for each token.

    Raises:
        ValueError: a word is not in the prompt.
    """
    sides = []
    for tokenizer, encoder in text_encoders(pipe):
        ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
        tokens = []
        for word in words:
            known_tokens(prompt, word, tokenizer, "words")
            tokens += [ids[position] for position in occurrences(prompt, word, tokenizer)[0]]
        # Called, not read: with offloading its weights come when it is.
        rows = encoder.get_input_embeddings()(torch.tensor(tokens, device=device_of(pipe)))
        sides.append(rows.detach().float())
    return torch.cat(sides, -1)


def occurrences(prompt: str, word: str, tokenizer: Any) -> list[list[int]]:
    """The token positions of each place where ``word`` stands in ``prompt``."""
    places = [index for index, piece in enumerate(prompt.split(" ")) if piece == word]
    return [tokens for place in places if (tokens := word_tokens(prompt, place, tokenizer))]


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """``(tokenizer, text encoder)``, one or two.

    Raises:
        UnsupportedModelError: the pipeline's text is not that of Stable Diffusion.
    """
    pairs = [
        (getattr(pipe, f"tokenizer{suffix}", None), getattr(pipe, f"text_encoder{suffix}", None))
        for suffix in ("", "_2")
    ]
    pairs = [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]
    if not pairs or not hasattr(pipe, "unet"):
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no UNet with text encoders; editing takes a pipeline of Stable Diffusion 1, 2 "
            "or XL."
        )
    return pairs


def is_xl(pipe: Any) -> bool:
    """Whether the UNet asks for SDXL's pooled text and sizes."""
    return getattr(pipe.unet.config, "addition_embed_type", None) == "text_time"


def device_of(pipe: Any) -> torch.device:
    """Where the pipeline computes, offloaded or not."""
    device = getattr(pipe, "_execution_device", None)
    return pipe.unet.device if device is None else device


@contextmanager
def _overwritten(
    encoder: Any, tokenizer: Any, prompts: Sequence[str], learned: LearnedWords | None, columns: slice
) -> Iterator[None]:
    """Learned rows in place of what the token embedding gives: vocabulary and weights stay as they are."""
    if learned is None:
        yield
        return
    places = [learned.places(prompt, tokenizer) for prompt in prompts]

    def overwrite(embedding: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        rows = learned.rows[:, columns].to(output)
        output = output.clone()
        for index, (positions, which) in enumerate(places):
            output[index, positions] = rows[which]
        return output

    with ExitStack() as stack:
        stack.callback(encoder.get_input_embeddings().register_forward_hook(overwrite).remove)
        yield
