"""Training data as an endless sequence: any position can be asked for, and always gives the same sample."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion_attn.core.pictures import FORMATS, open_picture
from diffusion_attn.distill.buckets import bucket_shapes, nearest_shape
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.draws import generator
from diffusion_attn.distill.sources import DataError, Pictures
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.renderer import rasterize
from diffusion_attn.shapes.scenes import sample_scene

Broken = tuple[tuple[str, str], ...]
"""Names of pictures that cannot be read, each with the reason."""


@dataclass(frozen=True)
class Sample:
    """One picture with its caption.

    Attributes:
        pixels: ``(3, height, width)``, float32 in -1..1.
        caption: what it shows.
        original: height and width of the file, in pixels.
        corner: top and left of the crop, in pixels of the resized picture.
        broken: pictures that were tried before this one and cannot be read.
    """

    pixels: torch.Tensor
    caption: str
    original: tuple[int, int]
    corner: tuple[int, int] = (0, 0)
    broken: Broken = ()


class Data(Protocol):
    """An endless sequence of samples; the same position always gives the same sample."""

    def __getitem__(self, position: int) -> Any:
        """The sample at ``position``, 0 or more; those of one batch have the same shape."""
        ...

    def check_broken(self, count: int) -> None:
        """Stop the run if ``count`` broken files are too many.

        Raises:
            DataError: they are.
        """
        ...


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


# ---- pictures


class Order:
    """The order in which items are taken: each once an epoch, as seed and epoch decide.

    Where items differ in shape, batches are of one shape each, and items of a shape that does not fill its last batch
    are taken again to fill it.

    Args:
        shapes: of each item.
        batch: items of a batch.
        seed: decides the order.
    """

    def __init__(self, shapes: Sequence[Hashable], batch: int, seed: int) -> None:
        self.shapes, self.batch, self.seed = shapes, batch, seed
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for index, shape in enumerate(shapes):
            groups[shape].append(index)
        self._groups = list(groups.values())
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Positions of an epoch."""
        if len(self._groups) == 1:
            return len(self.shapes)
        return sum(-(-len(group) // self.batch) * self.batch for group in self._groups)

    def index(self, position: int) -> int:
        """The item at ``position`` of the endless sequence."""
        epoch, place = divmod(position, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffle(epoch))
        return self._epoch[1][place]

    def candidates(self, position: int) -> Iterator[int]:
        """The item at ``position``, then those of its shape that come after it, each once."""
        first = self.index(position)
        seen = set()
        for offset in range(2 * len(self)):
            index = self.index(position + offset)
            if index not in seen and self.shapes[index] == self.shapes[first]:
                seen.add(index)
                yield index

    def _shuffle(self, epoch: int) -> list[int]:
        source = generator(self.seed, "epoch", epoch)
        orders = [[group[i] for i in torch.randperm(len(group), generator=source).tolist()] for group in self._groups]
        if len(orders) == 1:
            return orders[0]
        batches = [
            list(islice(cycle(order), start, start + self.batch))
            for order in orders
            for start in range(0, len(order), self.batch)
        ]
        return [index for i in torch.randperm(len(batches), generator=source).tolist() for index in batches[i]]


class PictureData:
    """Pictures, read when they are asked for.

    A picture that cannot be read is replaced by the one of its shape after it, and told in `Sample.broken`.

    Args:
        pictures: where they come from.
        config: how they are fitted, and how many may be broken.
        size: side of the samples in pixels, or of the square with as many pixels as a bucket.
        step: sides of buckets are multiples of this, in pixels.
        batch: samples of one shape in a row.
        seed: decides the order.
        quiet: show no progress while the pictures of buckets are looked at.
    """

    def __init__(
        self,
        pictures: Pictures,
        config: DataConfig,
        size: int,
        step: int = 8,
        batch: int = 1,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        self.pictures, self.config = pictures, config
        self.shapes = [(size, size)] * len(pictures)
        if config.fit == "bucket":
            buckets = bucket_shapes(size, step, config.max_aspect)
            bar = tqdm(range(len(pictures)), desc="shapes", unit="picture", disable=quiet)
            found = [self._bucket(index, buckets) for index in bar]
            # One that cannot be read is replaced by another of its shape, so it is given the shape of most.
            common = Counter(shape for shape in found if shape).most_common(1)
            self.shapes = [shape or (common[0][0] if common else buckets[0]) for shape in found]
        self.order = Order(self.shapes, batch, seed)

    def __getitem__(self, position: int) -> Sample:
        """The picture at ``position`` of the endless sequence.

        Raises:
            DataError: none can be read.
        """
        broken: list[tuple[str, str]] = []
        for index in self.order.candidates(position):
            try:
                return replace(self.read(index), broken=tuple(broken))
            except DataError as error:
                broken.append((self.pictures.name(index), str(error)))
        raise DataError(
            f"none of {len(broken)} pictures can be read, the first is {broken[0][0]} ({broken[0][1]}); check the data."
        )

    def read(self, index: int) -> Sample:
        """Picture number ``index`` as a sample.

        Raises:
            DataError: it cannot be read, with the reason alone as message.
        """
        try:
            with self.pictures.open(index) as file:
                image = open_picture(file)
        except Exception as error:  # what is listed may be nowhere, or anything
            raise DataError(str(error) or type(error).__name__) from error
        return replace(fit_picture(image, self.shapes[index], self.config.fit), caption=self.pictures.caption(index))

    def check_broken(self, count: int) -> None:
        """Stop the run if ``count`` broken files are more than `DataConfig` allows.

        Raises:
            DataError: they are.
        """
        allowed = int(self.config.max_broken * len(self.pictures))
        if count > allowed:
            raise DataError(
                f"{count} of {len(self.pictures)} pictures cannot be read, and data.max_broken="
                f"{self.config.max_broken} allows {allowed}; mend or remove them, or allow more."
            )

    def _bucket(self, index: int, buckets: list[tuple[int, int]]) -> tuple[int, int] | None:
        """The bucket of a picture, of which the header alone is read, or ``None`` if that cannot be."""
        try:
            with self.pictures.open(index) as file, Image.open(file, formats=FORMATS) as picture:
                width, height = picture.size
                turned = picture.getexif().get(_ORIENTATION, 1) >= 5
        except Exception:  # as in `read`, which will tell the reason
            return None
        return nearest_shape((width, height) if turned else (height, width), buckets)


_ORIENTATION = 0x0112  # EXIF


def fit_picture(image: Image.Image, shape: tuple[int, int], fit: str) -> Sample:
    """An RGB picture as a sample of ``shape`` (height, width) without a caption; ``fit`` as in `DataConfig`."""
    width, height = image.size
    top = left = 0
    if fit == "squash":
        image = image.resize(shape[::-1], Image.Resampling.BICUBIC)
    else:
        scale = max(shape[0] / height, shape[1] / width)
        resized = image.resize(
            (max(shape[1], round(width * scale)), max(shape[0], round(height * scale))), Image.Resampling.BILINEAR
        )
        left, top = (resized.width - shape[1]) // 2, (resized.height - shape[0]) // 2
        image = resized.crop((left, top, left + shape[1], top + shape[0]))
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)
    return Sample(pixels.contiguous(), "", (height, width), (top, left))


# ---- batches


def load_batches(data: Data, positions: Iterable[range], workers: int) -> Iterator[list[Any]]:
    """Batches of samples, one for each range of ``positions``, loaded ahead by ``workers`` processes.

    Raises:
        DataError: a sample cannot be had.
    """
    loader: DataLoader[Any] = DataLoader(
        _Careful(data),  # type: ignore[arg-type]
        batch_sampler=positions,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # the loader would take its seed from the user's
    )
    for batch in loader:
        for sample in batch:
            if isinstance(sample, DataError):
                raise sample
        yield batch


@dataclass(frozen=True)
class _Careful:
    """Data whose errors are results: a worker process would wrap what it raises in its whole traceback."""

    data: Data

    def __getitem__(self, position: int) -> Any:
        try:
            return self.data[position]
        except DataError as error:
            return error
