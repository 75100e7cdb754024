"""Attention maps of a run: numbers and pictures of what each word attends to."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from PIL import Image, ImageDraw, ImageOps

from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.prompts import word_tokens

_COLORS = ("#000004", "#fcfdbf", "#b63679")  # of the least, the greatest, and halfway


class Text:
    """A text encoder whose tokens stand in the denoiser's text from ``offset`` on."""

    def __init__(self, tokenizer: Any, encoder: Any, offset: int = 0) -> None:
        self.tokenizer, self.encoder, self.offset = tokenizer, encoder, offset


class AttentionMaps:
    """Cross-attention of one run, averaged over heads, layers and steps: how much each pixel looks at each word.

    Attributes:
        texts: whose tokens the maps have.
        prompts: of the pictures.
        steps: how many were recorded.
        levels: the maps of single levels, where `record` was asked for them, by how many times smaller than the
            latent's their sides are; of one size each, and not brought to that of the finest.
    """

    def __init__(self, texts: Sequence[Text], words: Sequence[str] | None = None, levels: Iterable[int] = ()) -> None:
        self.texts, self._words = texts, words
        self.levels = {factor: AttentionMaps(texts, words) for factor in sorted(set(levels))}
        self.begin()

    def begin(self, prompts: Sequence[str] = ()) -> None:
        """Forget everything: a new run begins, of ``prompts``."""
        for level in self.levels.values():
            level.begin(prompts)
        self.prompts: list[str] = list(prompts)
        self.steps = 0
        self._total: torch.Tensor | None = None
        self._by_step: list[torch.Tensor] = []

    def add(self, maps: torch.Tensor) -> None:
        """Take the maps ``(pictures, height, width, tokens)`` of one step."""
        maps = maps.detach().float().cpu()
        self._total = maps if self._total is None else self._total + maps
        self.steps += 1
        if self._words is not None:
            columns = [self._columns(maps, word, image) for image in range(len(maps)) for word in self._words]
            self._by_step.append(torch.stack(columns).unflatten(0, (len(maps), -1)))

    @property
    def maps(self) -> torch.Tensor:
        """``(pictures, height, width, tokens)`` float32, the mean over the steps.

        Raises:
            RuntimeError: nothing was drawn.
        """
        if self._total is None:
            raise RuntimeError("no attention has been recorded; call the pipeline inside the `with` block.")
        return self._total / self.steps

    def word(self, word: str | int, *, image: int = 0, step: int | None = None) -> torch.Tensor:
        """``(height, width)`` float32: the attention to a word of the prompt, averaged over its tokens.

        Args:
            word: its text, or its index in ``prompt.split(" ")``.
            image: which picture of the batch.
            step: one of them, for words that were given to `record`; ``None``: the mean of all.

        Raises:
            ValueError: the prompt has no such word, or the step was not recorded.
        """
        if step is None:
            return self._columns(self.maps, word, image)
        if word not in (self._words or ()) or not 0 <= step < self.steps:
            raise ValueError(
                f"step {step} of {word!r} was not recorded; steps 0 to {self.steps - 1} are kept of the words that "
                f"record(pipe, words=...) is given: {list(self._words or ())}."
            )
        return self._by_step[step][image, list(self._words or ()).index(cast(str, word))]

    def heatmap(
        self,
        word: str | int,
        *,
        image: int = 0,
        step: int | None = None,
        size: Size = (512, 512),
        over: Image.Image | None = None,
    ) -> Image.Image:
        """The map of a word in colours, from its least to its greatest value.

        Args:
            word, image, step: as in `word`.
            size: ``(height, width)`` in pixels; the longer side keeps to the map's proportions.
            over: a picture to lay it on; the heat map is then of its size.
        """
        grid = self.word(word, image=image, step=step)
        low, high = grid.min(), grid.max()
        gray = ((grid - low) / (high - low).clamp(min=1e-12) * 255).round().byte().numpy()
        longest = max(grid.shape)
        width, height = (
            round(side * cells / longest) for side, cells in zip(size[::-1], grid.shape[::-1], strict=True)
        )
        if over is not None:
            width, height = over.size
        picture = Image.fromarray(gray).resize((width, height), Image.Resampling.BICUBIC)
        colored = ImageOps.colorize(picture, *_COLORS)
        return colored if over is None else Image.blend(over.convert("RGB"), colored, 0.6)

    def grid(
        self, words: Sequence[str] | None = None, *, image: int = 0, over: Image.Image | None = None, size: int = 192
    ) -> Image.Image:
        """The heat maps of several words side by side, each under its word.

        Args:
            words: which; ``None``: those given to `record`, or all of the prompt.
            image, over: as in `heatmap`.
            size: of one of them, in pixels.
        """
        if words is None:
            words = self._words or list(dict.fromkeys(self._prompt(image).split()))
        tiles = [self.heatmap(word, image=image, size=(size, size), over=over) for word in words]
        if over is not None:
            tiles = [tile.resize((size, round(size * over.height / over.width))) for tile in tiles]
        columns = min(len(tiles), 6)
        width, height, line = tiles[0].width, tiles[0].height, 16
        rows = math.ceil(len(tiles) / columns)
        sheet = Image.new("RGB", (columns * width, rows * (height + line)), "white")
        draw = ImageDraw.Draw(sheet)
        for index, (word, tile) in enumerate(zip(words, tiles, strict=True)):
            x, y = index % columns * width, index // columns * (height + line)
            draw.text((x + 4, y + 2), str(word), fill="black")
            sheet.paste(tile, (x, y + line))
        return sheet

    def check_words(self) -> None:
        """Make sure that the words to record are in the prompts.

        Raises:
            ValueError: one is not.
        """
        for image in range(len(self.prompts)):
            for word in self._words or ():
                self._tokens(word, image)

    def _prompt(self, image: int) -> str:
        if not self.prompts:
            raise ValueError(
                "the words of the prompt are not known, since the pipeline was given embeddings; give the text to "
                "record(pipe, prompt=...)."
            )
        # A prompt may be drawn several times.
        return self.prompts[image * len(self.prompts) // len(self.maps)] if self.steps else self.prompts[image]

    def _tokens(self, word: str | int, image: int) -> list[int]:
        prompt = self._prompt(image)
        for spelling in _spellings(word):
            found = [text.offset + t for text in self.texts for t in word_tokens(prompt, spelling, text.tokenizer)]
            if found:
                return found
        raise ValueError(f"{word!r} is not a word of the prompt {prompt!r}.")

    def _columns(self, maps: torch.Tensor, word: str | int, image: int) -> torch.Tensor:
        if not 0 <= image < len(maps):
            raise ValueError(f"image is {image}; the run drew {len(maps)} pictures, counted from 0.")
        tokens = [token for token in self._tokens(word, image) if token < maps.shape[-1]]
        if not tokens:
            raise ValueError(f"{word!r} lies beyond the {maps.shape[-1]} tokens that the pipeline keeps of a prompt.")
        return maps[image][..., tokens].mean(-1)


def _spellings(word: str | int) -> list[str | int]:
    """A word as it is written, and as tokenizers give it back that lower its case and part it from punctuation."""
    if isinstance(word, int):
        return [word]
    return [word, word.lower(), word.lower().strip(string.punctuation)]
