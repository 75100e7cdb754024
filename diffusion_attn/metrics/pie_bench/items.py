"""The pictures of PIE-Bench and of what is laid out like it: prompts, words, and where a picture is edited."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from PIL import Image

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.pictures import open_picture
from diffusion_attn.core.reading import read_json

MAPPING = "mapping_file.json"
PICTURES = "annotation_images"
KINDS = (
    "random",
    "change object",
    "add object",
    "delete object",
    "change content",
    "change pose",
    "change colour",
    "change material",
    "change background",
    "change style",
)
"""Of edits, by their ``editing_type_id``."""

_TEXTS = ("image_path", "original_prompt", "editing_prompt")
_FIELDS = (*_TEXTS, "editing_type_id", "mask")
_OPTIONAL = ("editing_instruction", "blended_word")
_NAME = re.compile(r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))\w(?:[\w.-]{0,98}[\w-])?", re.ASCII | re.IGNORECASE)
"""None that Windows keeps for devices, or writes without its last dot."""


@dataclass(frozen=True)
class Item:
    """One picture and its edit.

    Attributes:
        name: the key in the mapping, twelve digits in PIE-Bench.
        path: of the picture.
        source_prompt, target_prompt: without the brackets around what changes.
        instruction: the edit as an order.
        kind: an index of `KINDS`.
        blend_words: ``(source, target)``, or ``None`` where there are none or the prompts do not have them.
        code: of the mask, as in `decode_mask`.
    """

    name: str
    path: Path
    source_prompt: str
    target_prompt: str
    instruction: str
    kind: int
    blend_words: tuple[str, str] | None
    code: tuple[int, ...]

    def image(self) -> Image.Image:
        """The picture, RGB.

        Raises:
            DiffusionAttnError: it cannot be read.
        """
        try:
            return open_picture(self.path, turn=False)  # masks are of the picture as it is stored
        except (OSError, ValueError) as error:
            raise DiffusionAttnError(
                f"item {self.name!r}: {str(self.path)!r} cannot be read as a picture ({error}); get it again."
            ) from error

    def mask(self, size: tuple[int, int], border: bool = True) -> torch.Tensor:
        """Where it is edited, as in `decode_mask`; ``size`` is ``(height, width)``."""
        return decode_mask(self.code, size, border)


def load(folder: str | Path) -> list[Item]:
    """Read a folder that is laid out like PIE-Bench: ``mapping_file.json`` and ``annotation_images``.

    Brackets are taken off prompts, as the benchmark asks for, and ``blended_word`` is parted at its space.

    Raises:
        DiffusionAttnError: it is not laid out like that.
    """
    folder = Path(folder).expanduser()
    path = folder / MAPPING
    try:
        mapping = read_json(path)
    except FileNotFoundError as error:
        raise DiffusionAttnError(
            f"{str(folder)!r} has no {MAPPING}; give the folder of PIE-Bench_v1, or one laid out like it."
        ) from error
    except ValueError as error:
        raise DiffusionAttnError(f"{str(path)!r} is not JSON ({error}); download it again.") from error
    if not isinstance(mapping, dict) or not mapping:
        raise DiffusionAttnError(f"{str(path)!r} holds no items; give that of PIE-Bench, an object of them.")
    return [_item(folder, name, entry) for name, entry in mapping.items()]


def decode_mask(code: Sequence[int], size: tuple[int, int] = (512, 512), border: bool = True) -> torch.Tensor:
    """The edited part of a picture, ``size``-shaped float32, 1 where it is edited.

    Args:
        code: ``[start, length, start, length, ...]`` over the picture row by row; runs end with the picture.
        size: ``(height, width)``.
        border: the outermost pixels count as edited, as they are often badly annotated.

    Raises:
        ValueError: a start has no length, or a number is negative.
    """
    if len(code) % 2 or any(number < 0 for number in code):
        raise ValueError(f"code has {len(code)} numbers; give pairs of a start and a length, none of them negative.")
    count = size[0] * size[1]
    runs = torch.tensor([min(number, count) for number in code], dtype=torch.long).view(-1, 2)
    change = torch.zeros(2 * count + 1, dtype=torch.long)
    one = torch.ones(len(runs), dtype=torch.long)
    change.index_add_(0, runs[:, 0], one).index_add_(0, runs.sum(1), -one)
    mask = (change.cumsum(0)[:count] > 0).float().view(size)
    if border:
        mask[[0, -1]] = 1
        mask[:, [0, -1]] = 1
    return mask


def encode_mask(mask: torch.Tensor) -> list[int]:
    """``[start, length, start, length, ...]`` of a mask ``(height, width)``, which `decode_mask` reads."""
    flat = torch.nn.functional.pad(mask.flatten().bool().int(), (1, 1))
    change = flat.diff()
    starts, ends = (change == 1).nonzero().flatten(), (change == -1).nonzero().flatten()
    return torch.stack([starts, ends - starts], 1).flatten().tolist()


def _item(folder: Path, name: str, entry: Any) -> Item:
    missing = [key for key in _FIELDS if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise DiffusionAttnError(f"item {name!r} of {MAPPING} has no {missing[0]!r}; give the file of PIE-Bench_v1.")
    texts = {key: entry[key] for key in _TEXTS} | {key: entry.get(key) or "" for key in _OPTIONAL}
    if wrong := [key for key, text in texts.items() if not isinstance(text, str)]:
        raise DiffusionAttnError(f"item {name!r} of {MAPPING} has a {wrong[0]!r} that is no text.")
    if not _NAME.fullmatch(name):  # results go by it
        raise DiffusionAttnError(f"item {name!r} of {MAPPING} is called what no file can be; rename it.")
    place = PurePath(texts["image_path"])
    path = folder / PICTURES / place
    if place.is_absolute() or ".." in place.parts or not os.path.isfile(path):  # Path's own fails at some names
        raise DiffusionAttnError(f"item {name!r} of {MAPPING} is {str(path)!r}, which is not there.")
    code = entry["mask"]
    if not isinstance(code, list) or len(code) % 2 or not all(type(number) is int and number >= 0 for number in code):
        raise DiffusionAttnError(f"item {name!r} of {MAPPING} has a mask that is no list of starts and lengths.")
    kind = str(entry["editing_type_id"])
    if not re.fullmatch("[0-9]", kind):
        raise DiffusionAttnError(f"item {name!r} of {MAPPING} has the type {kind!r}; expected 0 to {len(KINDS) - 1}.")
    source, target = (texts[key].replace("[", "").replace("]", "") for key in ("original_prompt", "editing_prompt"))
    words = texts["blended_word"].split(" ")
    there = len(words) == 2 and words[0] in source.split(" ") and words[1] in target.split(" ")
    return Item(
        name=name,
        path=path,
        source_prompt=source,
        target_prompt=target,
        instruction=texts["editing_instruction"],
        kind=int(kind),
        blend_words=(words[0], words[1]) if there else None,
        code=tuple(code),
    )
