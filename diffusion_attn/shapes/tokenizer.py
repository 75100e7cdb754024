"""A real ``CLIPTokenizer`` with a small vocabulary: each word of the grammar is one token, all else falls to bytes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from diffusion_attn.shapes.scenes import COLORS, KINDS, RELATIONS, SIZES

_TEXT = " ".join((*COLORS, *KINDS, *RELATIONS, *SIZES, "a an the and on background right below to of with"))
WORDS = tuple(dict.fromkeys(_TEXT.split()))
"""The words of the grammar and a few that people add."""

_END = "</w>"

POSITIONS = 32
"""Length of a tokenised prompt; the longest caption takes 16, and every position costs time in each cross-attention."""


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding learned on the grammar's words until each is one token; padded with the end."""
    words = {word: [*word[:-1], word[-1] + _END] for word in WORDS}
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in words.values()):
        pairs = Counter(pair for pieces in words.values() for pair in pairwise(pieces))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merge(pieces, best) for word, pieces in words.items()}
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + _END for symbol in symbols), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,  # type: ignore[arg-type]
        model_max_length=POSITIONS,
        pad_token="<|endoftext|>",
    )


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _byte_symbols() -> list[str]:
    """One printable character for each byte, in the order of byte-level BPE: printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
