"""Pictures with captions: a folder of files, or scenes of the shapes world, by position in an endless sequence."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.draws import generator
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.renderer import rasterize
from diffusion_attn.shapes.scenes import sample_scene

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Files that are pictures."""

CAPTION_FILES = ("metadata.jsonl", "captions.csv", "metadata.csv")
"""Where a folder's captions are looked for, in this order; without any of them in a text file beside each picture."""


class DataError(DiffusionAttnError):
    """The training pictures are not there or cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One picture with its caption.

    Attributes:
        pixels: ``(3, size, size)``, float32 in -1..1.
        caption: what it shows.
        original: height and width of the file, in pixels.
        corner: top and left of the crop, in pixels of the resized picture.
        broken: files that were tried before this one and cannot be read, with the reason.
    """

    pixels: torch.Tensor
    caption: str
    original: tuple[int, int]
    corner: tuple[int, int] = (0, 0)
    broken: tuple[tuple[str, str], ...] = ()


class Data(Protocol):
    """An endless sequence of samples; the same position always gives the same sample."""

    def __getitem__(self, position: int) -> Sample:
        """The sample at ``position``, 0 or more."""
        ...

    def check_broken(self, count: int) -> None:
        """Stop the run if ``count`` broken files are too many.

        Raises:
            DataError: they are.
        """
        ...


def open_data(config: DataConfig, size: int, seed: int) -> Data:
    """The data of a run, at ``size`` pixels.

    Raises:
        DataError: they are not there.
    """
    if config.source == "shapes":
        return ShapesData(size, seed)
    return FolderData(find_pictures(config.path), size, seed, config.fit, config.max_broken)


# ---- shapes


@dataclass(frozen=True)
class ShapesData:
    """Scenes of the training split, drawn by code."""

    size: int
    seed: int

    def __getitem__(self, position: int) -> Sample:
        """The scene at ``position``."""
        scene = sample_scene(random.Random(f"{self.seed}/scene/{position}"), held_out=False)
        pixels = torch.from_numpy(rasterize(scene, self.size)).permute(2, 0, 1) * 2 - 1
        return Sample(pixels.contiguous(), caption(scene), (self.size, self.size))

    def check_broken(self, count: int) -> None:
        """There are none."""


# ---- a folder


def find_pictures(folder: str | None) -> list[tuple[Path, str]]:
    """The pictures of a folder and below with their captions, by name.

    Captions are in ``metadata.jsonl`` (``file_name`` and ``text``), ``captions.csv`` or ``metadata.csv`` (the same
    columns), or in a ``.txt`` beside each picture. Pictures without a caption are left out.

    Raises:
        DataError: there is no such folder, no picture with a caption in it, or a caption file is not of its format.
    """
    if folder is None:
        raise DataError("data.path is not given: expected a folder of pictures with captions; add --data FOLDER.")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"data.path={folder!r}: expected a folder of pictures with captions, and there is none.")
    listed = next((root / name for name in CAPTION_FILES if (root / name).is_file()), None)
    found = list(_beside(root)) if listed is None else [(root / name, text) for name, text in _rows(listed)]
    if not found:
        raise DataError(
            f"data.path={folder!r} has no pictures with captions: expected {', '.join(SUFFIXES)} with a .txt beside "
            f"each, or a {' or '.join(CAPTION_FILES)} with file_name and text."
        )
    return sorted(found)


def _beside(root: Path) -> Iterator[tuple[Path, str]]:
    for path in root.rglob("*"):
        text = path.with_suffix(".txt")
        if path.suffix.lower() in SUFFIXES and text.is_file():
            yield path, text.read_text(encoding="utf-8").strip()


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows: Any = csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, filter(str.strip, lines))
            for row in rows:
                yield str(row["file_name"]), str(row["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{str(file)!r} cannot be read ({type(error).__name__}: {error}); expected file_name and text in every row."
        ) from error


class FolderData:
    """Pictures of a folder, each once an epoch, in an order that seed and epoch decide.

    A picture that cannot be read is replaced by the one after it, and told in `Sample.broken`.

    Args:
        pictures: files and captions.
        size: side of the samples, in pixels.
        seed: decides the order.
        fit: see `DataConfig`.
        max_broken: see `DataConfig`.
    """

    def __init__(
        self, pictures: Sequence[tuple[Path, str]], size: int, seed: int, fit: str = "squash", max_broken: float = 0.01
    ) -> None:
        self.pictures, self.size, self.seed, self.fit, self.max_broken = pictures, size, seed, fit, max_broken
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def __getitem__(self, position: int) -> Sample:
        """The picture at ``position`` of the endless sequence.

        Raises:
            DataError: none can be read.
        """
        broken: list[tuple[str, str]] = []
        for offset in range(len(self.pictures)):
            path, text = self.pictures[self._index(position + offset)]
            try:
                with Image.open(path) as file:
                    image = ImageOps.exif_transpose(file).convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                broken.append((str(path), str(error) or type(error).__name__))
                continue
            return replace(fit_picture(image, self.size, self.fit), caption=text, broken=tuple(broken))
        raise DataError(f"none of {len(self.pictures)} pictures can be read ({broken[0][1]}); check the folder.")

    def check_broken(self, count: int) -> None:
        """Stop the run if ``count`` broken files are more than `DataConfig` allows.

        Raises:
            DataError: they are.
        """
        if count > self.max_broken * len(self.pictures):
            raise DataError(
                f"{count} of {len(self.pictures)} pictures cannot be read, and data.max_broken={self.max_broken} "
                f"allows {int(self.max_broken * len(self.pictures))}; mend or remove them, or allow more."
            )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.pictures))
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.pictures), generator=generator(self.seed, "epoch", epoch)))
        return int(self._order[1][place])


def fit_picture(image: Image.Image, size: int, fit: str) -> Sample:
    """An RGB picture as a square sample without a caption; ``fit`` as in `DataConfig`."""
    width, height = image.size
    top = left = 0
    if fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        scale = size / min(width, height)
        resized = image.resize(
            (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BILINEAR
        )
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        image = resized.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)
    return Sample(pixels.contiguous(), "", (height, width), (top, left))


# ---- batches


def load_batches(data: Data, positions: Iterable[range], workers: int) -> Iterator[list[Sample]]:
    """Batches of samples, one for each range of ``positions``, loaded ahead by ``workers`` processes."""
    # A generator of its own: the loader would take its seed from the user's.
    return iter(
        DataLoader(
            data,  # type: ignore[arg-type]
            batch_sampler=positions,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),
        )
    )
