"""Latents and conditions kept on disk, so that training needs neither the autoencoder nor the text encoders."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusion_attn.core.errors import CheckpointFormatError
from diffusion_attn.core.files import save_json, written
from diffusion_attn.core.tensors import open_tensors, read_tensors
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.data import Order, PictureData, Sample, ShapesData
from diffusion_attn.distill.encoding import Encoded, encode, encode_nothing, fingerprint
from diffusion_attn.distill.families import denoiser_of, family_of
from diffusion_attn.distill.sources import DataError, find_pictures
from diffusion_attn.distill.teacher import size_step, training_size
from diffusion_attn.methods.checkpoints import read_json

INDEX = "cache.json"
EMPTY = "empty.safetensors"
SHARD = 256
"""Samples of a file."""

LARGEST_INDEX = 2**30
"""Bytes; those of ten million pictures."""

_FILE = re.compile(r"shard-\d{6,}\.safetensors")


@dataclass
class Index:
    """What a cache holds.

    Attributes:
        made_of: the model's fingerprint, the pictures' and how they were fitted: all that a cache depends on.
        shards: file names, each with the numbers and latent shapes of its samples.
        broken: names of pictures that cannot be read, each with the reason.
        total: pictures to be kept, broken ones included.
    """

    made_of: dict[str, Any]
    total: int
    shards: dict[str, list[list[int]]] = field(default_factory=dict)
    broken: list[list[str]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every picture was seen."""
        return sum(map(len, self.shards.values())) + len(self.broken) == self.total

    def write(self, folder: Path) -> None:
        """Put it into ``folder`` as a whole."""
        save_json(folder / INDEX, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Index:
        """That of ``folder``.

        Raises:
            DataError: there is none, or it is damaged.
        """
        if not (folder / INDEX).is_file():
            raise DataError(
                f"data.path={str(folder)!r} holds no {INDEX}: expected what diffusion-attn distill cache made; run it, "
                "or give another --data.source."
            )
        try:
            index = cls(**read_json(folder / INDEX, LARGEST_INDEX))
            index._check()
            return index
        except (CheckpointFormatError, TypeError, ValueError) as error:
            raise DataError(f"{str(folder / INDEX)!r} is damaged ({error}); make the cache again.") from error

    def _check(self) -> None:
        if not isinstance(self.made_of, dict) or not isinstance(self.total, int):
            raise ValueError("it does not tell what it was made of")
        if not isinstance(self.shards, dict) or not all(map(_FILE.fullmatch, self.shards)):
            raise ValueError("it names files that are no shards")
        for row in chain.from_iterable(self.shards.values()):
            if [type(number) for number in row] != [int, int, int]:
                raise ValueError(f"{row!r} is not a number, a height and a width")
        if not all(len(entry) == 2 and all(isinstance(x, str) for x in entry) for entry in self.broken):
            raise ValueError("it does not tell which pictures are broken")


# ---- making one


def make_cache(
    pipe: Any,
    config: DataConfig,
    output: Path,
    count: int | None = None,
    dtype: torch.dtype = torch.float16,
    batch: int = 8,
    seed: int = 0,
    quiet: bool = False,
) -> Index:
    """Encode pictures and captions into files of ``output``; goes on where an earlier run stopped.

    Args:
        pipe: the teacher, on the device to compute on.
        config: the pictures.
        output: folder.
        count: pictures, from the first; by default all, of drawn scenes it has to be given.
        dtype: of what is kept; from float32 training goes on exactly as without a cache.
        batch: pictures encoded together.
        seed: of drawn scenes.
        quiet: show no progress.

    Raises:
        ConfigError: the model takes no pictures of that size, or no captions of that length.
        DataError: the pictures are not there, too many of them are broken, or ``output`` holds another cache.
    """
    size, text_tokens = training_size(pipe, config.size), family_of(pipe).text_tokens(config.text_tokens)
    read, names = _open(config, size, size_step(pipe), count, seed)
    made_of = {
        "model": fingerprint(pipe),
        "source": config.source,
        "split": config.split,
        "image_column": config.image_column,
        "pictures": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
        "fit": config.fit,
        "max_aspect": config.max_aspect,
        "size": size,
        "text_tokens": text_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed if config.source == "shapes" else None,
    }
    index = _begin(output, made_of, len(names))
    _check_broken(index, config)
    device = denoiser_of(pipe).device
    with torch.no_grad(), tqdm(total=len(names), desc="cache", unit="picture", disable=quiet) as bar:
        if not (output / EMPTY).exists():
            _write_tensors(output / EMPTY, encode_nothing(pipe, device, text_tokens), dtype)
        for start in range(0, len(names), SHARD):
            numbers = range(start, min(start + SHARD, len(names)))
            file = f"shard-{start // SHARD:06d}.safetensors"
            if file not in index.shards:
                tensors, shapes, broken = _encode_shard(pipe, read, names, numbers, batch, device, text_tokens)
                _write_tensors(output / file, tensors, dtype)
                index.shards[file] = shapes
                index.broken += broken
                index.write(output)
                _check_broken(index, config)
            bar.update(len(numbers))
    return index


def _open(config: DataConfig, size: int, step: int, count: int | None, seed: int) -> tuple[Any, list[str]]:
    """A function from numbers to samples, and what each is called."""
    if config.source == "shapes":
        if count is None:
            raise DataError("data.source='shapes' has no end; say how many scenes with --count.")
        return ShapesData(size, seed).__getitem__, [f"scene {number}" for number in range(count)]
    if config.source == "cache":
        raise DataError("data.source='cache' is a cache already; give the source of its pictures.")
    pictures = find_pictures(config)
    names = [f"{pictures.name(i)}\t{pictures.caption(i)}" for i in range(min(len(pictures), count or len(pictures)))]
    return PictureData(pictures, config, size, step).read, names


def _begin(output: Path, made_of: dict[str, Any], total: int) -> Index:
    if not (output / INDEX).exists():
        output.mkdir(parents=True, exist_ok=True)
        index = Index(made_of, total)
        index.write(output)
        return index
    index = Index.read(output)
    if (index.made_of, index.total) != (made_of, total):
        changed = sorted(name for name in made_of if index.made_of.get(name) != made_of[name]) or ["number of pictures"]
        raise DataError(
            f"--output {str(output)!r} holds a cache with another {', '.join(changed)}; choose another folder, or "
            "remove it."
        )
    return index


def _encode_shard(
    pipe: Any,
    read: Any,
    names: list[str],
    numbers: range,
    batch: int,
    device: torch.device,
    text_tokens: int | None,
) -> tuple[dict[str, torch.Tensor], list[list[int]], list[list[str]]]:
    """Tensors by sample and name, ``[number, height, width]`` of each sample, and what cannot be read."""
    tensors, shapes, broken = {}, [], []
    good: list[tuple[int, Sample]] = []
    for number in numbers:
        try:
            good.append((number, read(number)))
        except DataError as error:
            broken.append([names[number].split("\t")[0], str(error)])
    good.sort(key=lambda pair: (pair[1].pixels.shape, pair[0]))
    for _, group in groupby(good, key=lambda pair: pair[1].pixels.shape):
        same = iter(group)
        while part := list(islice(same, batch)):
            encoded = encode(pipe, [sample for _, sample in part], device, text_tokens)
            for i, (number, _) in enumerate(part):
                shapes.append([number, *encoded.mean.shape[-2:]])
                tensors[f"{number}/mean"], tensors[f"{number}/std"] = encoded.mean[i], encoded.std[i]
                tensors |= {f"{number}/{name}": x[i] for name, x in encoded.conditions.items()}
    return tensors, sorted(shapes), broken


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    # Sizes and crops are thousands of pixels, more than 16 bit can tell apart.
    kept = {
        name: x.to("cpu", torch.float32 if name.endswith("time_ids") else dtype).contiguous().clone()
        for name, x in tensors.items()
    }
    try:
        with written(path) as part:
            save_file(kept, part)
    except Exception as error:  # safetensors tells a full disk by an error of its own
        raise DataError(
            f"{str(path)!r} cannot be written ({error}); make room, and run the same command again to go on."
        ) from error


def _check_broken(index: Index, config: DataConfig) -> None:
    allowed = int(config.max_broken * index.total)
    if len(index.broken) > allowed:
        name, reason = index.broken[0]
        raise DataError(
            f"{len(index.broken)} of {index.total} pictures cannot be read, the first {name!r} ({reason}), and "
            f"data.max_broken={config.max_broken} allows {allowed}; mend or remove them, or allow more."
        )


# ---- training from one


class CachedData:
    """The samples of a cache, each once an epoch.

    Args:
        folder: of the cache.
        batch: samples of one shape in a row.
        seed: decides the order.

    Raises:
        DataError: there is no complete cache.
    """

    def __init__(self, folder: str | None, batch: int = 1, seed: int = 0) -> None:
        if folder is None:
            raise DataError("data.path is not given: expected the folder of a cache; add --data FOLDER.")
        self.folder = Path(folder).expanduser()
        self.contents = Index.read(self.folder)
        if not self.contents.complete or not self.contents.shards:
            raise DataError(
                f"the cache in {str(self.folder)!r} is not complete; run diffusion-attn distill cache again to go on."
            )
        if not any(self.contents.shards.values()):
            raise DataError(f"the cache in {str(self.folder)!r} holds nothing: all its pictures are broken; mend them.")
        self._places = [(file, number) for file, rows in self.contents.shards.items() for number, *_ in rows]
        self.order = Order([tuple(shape) for rows in self.contents.shards.values() for _, *shape in rows], batch, seed)
        self._files: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to worker processes

    def __getitem__(self, position: int) -> Encoded:
        """The sample at ``position`` of the endless sequence, on the CPU.

        Raises:
            DataError: its file is gone or damaged.
        """
        file, number = self._places[self.order.index(position)]
        try:
            shard, names = self._shard(file)
            tensors = {name: shard.get_tensor(f"{number}/{name}") for name in names}
            return Encoded(tensors.pop("mean"), tensors.pop("std"), tensors)
        except Exception as error:  # safetensors has an error of its own for each kind of damage
            raise DataError(
                f"{str(self.folder / file)!r} is gone or damaged ({error}); remove the folder and make the cache again."
            ) from error

    def check_broken(self, count: int) -> None:
        """There are none: they were left out."""

    def check(self, pipe: Any, config: DataConfig, size: int) -> None:
        """Make sure that the cache is of this model, in float32, and has what ``config`` asks for at ``size`` pixels.

        Raises:
            DataError: it is not, or has not.
        """
        text_tokens = family_of(pipe).text_tokens(config.text_tokens)
        asked = {"model": fingerprint(pipe), "size": size, "text_tokens": text_tokens, "fit": config.fit}
        if config.fit == "bucket":
            asked["max_aspect"] = config.max_aspect
        for name, wanted in asked.items():
            found = self.contents.made_of.get(name)
            if found != wanted:
                raise DataError(
                    f"the cache in {str(self.folder)!r} was made with another {name} ({found}, not {wanted}): it does "
                    "not fit this run; make it again for this one."
                )

    def empty(self) -> dict[str, torch.Tensor]:
        """Conditions of the empty caption, ``(1, ...)`` each.

        Raises:
            CheckpointFormatError: the file is gone or damaged.
        """
        return read_tensors(self.folder / EMPTY)

    def digest(self) -> str:
        """A short hash of what the cache was made of."""
        return hashlib.sha256(json.dumps(self.contents.made_of, sort_keys=True).encode()).hexdigest()[:16]

    def _shard(self, file: str) -> tuple[Any, set[str]]:
        """An open file, and the names of a sample's tensors."""
        if file not in self._files:
            shard = open_tensors(self.folder / file)
            keys = shard.keys()
            self._files[file] = shard, {key.partition("/")[2] for key in keys}
        return self._files[file]
