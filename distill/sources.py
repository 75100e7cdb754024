"""Where pictures with captions come from: a folder, tar files, or a dataset in Hugging Face's format."""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.reading import LARGEST_CAPTION, parse_json, read_lines, read_text
from diffusion_attn.distill.config import DataConfig

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Files that are pictures."""

CAPTION_FILES = ("metadata.jsonl", "captions.csv", "metadata.csv")
"""Where a folder's captions are looked for, in this order; without any of them in a text file beside each picture."""


class DataError(DiffusionAttnError):
    """The training pictures are not there or cannot be read."""


class Pictures(Protocol):
    """A list of pictures with captions, none of which has been opened."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def name(self, index: int) -> str:
        """What a picture is called in messages."""
        ...

    def caption(self, index: int) -> str:
        """What it shows."""
        ...

    def open(self, index: int) -> BinaryIO:
        """Its file, encoded.

        Raises:
            OSError: it cannot be opened.
        """
        ...


def find_pictures(config: DataConfig) -> Pictures:
    """The pictures of ``config``, for the sources ``"folder"``, ``"webdataset"`` and ``"hub"``.

    Raises:
        DataError: there are none, or what lists them cannot be read.
    """
    if config.path is None:
        raise DataError("data.path is not given: expected where the pictures are; add --data FOLDER.")
    pictures = _FINDERS[config.source](config.path, config)
    if not len(pictures):
        raise DataError(f"data.path={config.path!r} has no pictures with captions: expected {_EXPECTED[config.source]}")
    return pictures


def digest(pictures: Pictures) -> str:
    """A short hash of names, without their folders, and captions: other pictures are another run."""
    hasher = hashlib.sha256()
    for index in range(len(pictures)):
        hasher.update(f"{Path(pictures.name(index)).name}\t{pictures.caption(index)}\n".encode())
    return hasher.hexdigest()[:16]


# ---- a folder


@dataclass(frozen=True)
class FolderPictures:
    """Files with their captions."""

    entries: list[tuple[Path, str]]

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """The path."""
        return str(self.entries[index][0])

    def caption(self, index: int) -> str:
        """What the picture shows."""
        return self.entries[index][1]

    def open(self, index: int) -> BinaryIO:
        """The file."""
        return self.entries[index][0].open("rb")


def find_in_folder(path: str, config: DataConfig) -> FolderPictures:
    """The pictures of a folder and below, by name; those without a caption are left out.

    Captions are in one of `CAPTION_FILES` (``file_name`` and the caption column), or in a ``.txt`` beside each picture.

    Raises:
        DataError: there is no such folder, or a caption file is not of its format.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"data.path={path!r}: expected a folder of pictures with captions, and there is none.")
    listed = next((root / name for name in CAPTION_FILES if (root / name).is_file()), None)
    if listed is not None:
        return FolderPictures(sorted((root / name, text) for name, text in _rows(listed, config.caption_column)))
    return FolderPictures(sorted(_beside(root)))


def _beside(root: Path) -> Iterator[tuple[Path, str]]:
    for path in root.rglob("*"):
        text = path.with_suffix(".txt")
        if path.suffix.lower() in SUFFIXES and text.is_file():
            try:
                yield path, read_text(text, LARGEST_CAPTION).strip()
            except ValueError as error:
                raise DataError(f"{str(text)!r} cannot be read ({error}); save it as UTF-8, or remove it.") from error


def _rows(file: Path, column: str) -> Iterator[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            lines = read_lines(opened)
            rows: Any = csv.DictReader(lines) if file.suffix == ".csv" else map(parse_json, filter(str.strip, lines))
            for row in rows:
                if row[column] is not None:
                    yield str(row["file_name"]), str(row[column])
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{str(file)!r} cannot be read ({type(error).__name__}: {error}); expected file_name and {column} in every "
            "row, or name the caption's column with --data.caption_column."
        ) from error


# ---- tar files


@dataclass(frozen=True)
class TarPictures:
    """Members of tar files in WebDataset's layout, found once and read where they lie."""

    entries: list[tuple[Path, str, int, int, str]]  # file, member, offset and length in bytes, caption

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """The tar file and the member's name."""
        file, member, *_ = self.entries[index]
        return f"{file}/{member}"

    def caption(self, index: int) -> str:
        """What the picture shows."""
        return self.entries[index][4]

    def open(self, index: int) -> BinaryIO:
        """The member's bytes."""
        path, _, offset, length, _ = self.entries[index]
        with path.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(length))


def find_in_tars(path: str, config: DataConfig) -> TarPictures:
    """The pictures of a tar file, of all in a folder, or of all that fit a pattern.

    As in WebDataset, members whose names are the same up to the first dot belong together; the caption is a ``.txt``,
    or the caption column of a ``.json``. Pictures without one are left out.

    Raises:
        DataError: there is no such file, or one of them is no uncompressed tar file.
    """
    root = Path(path).expanduser()
    files = sorted(root.glob("*.tar")) if root.is_dir() else sorted(root.parent.glob(root.name))
    if not files:
        raise DataError(f"data.path={path!r}: expected a tar file, a folder of them, or a pattern; there is none here.")
    return TarPictures([entry for file in files for entry in _members(file, config.caption_column)])


def _members(file: Path, column: str) -> Iterator[tuple[Path, str, int, int, str]]:
    pictures: dict[str, tuple[str, int, int]] = {}
    captions: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as archive:  # compressed ones cannot be read from the middle
            for member in archive:
                if member.size < 0:  # the next one would be this again
                    raise ValueError(f"{member.name} has {member.size} bytes")
                place = PurePosixPath(member.name)
                if not member.isfile() or place.name.startswith("."):  # what macOS keeps beside a file
                    continue
                stem, _, ending = place.name.partition(".")
                key, suffix = str(place.with_name(stem)), f".{ending.lower()}"
                if suffix in SUFFIXES:
                    pictures[key] = (member.name, member.offset_data, member.size)
                elif suffix in (".txt", ".json") and (content := archive.extractfile(member)):
                    if member.size > LARGEST_CAPTION:
                        raise ValueError(f"{member.name} has {member.size} bytes, more than a caption")
                    text = content.read().decode("utf-8")
                    found = text.strip() if suffix == ".txt" else parse_json(text)[column]
                    captions |= {} if found is None else {key: str(found)}
    except Exception as error:  # of damage tarfile tells by whatever goes wrong, of memory and recursion too
        raise DataError(
            f"{str(file)!r} cannot be read ({type(error).__name__}: {error}); expected an uncompressed tar file with a "
            f".txt, or a .json with {column!r}, for each picture."
        ) from error
    for key, (member_name, offset, length) in pictures.items():
        if key in captions:
            yield file, member_name, offset, length, captions[key]


# ---- Hugging Face datasets


@dataclass(frozen=True)
class HubPictures:
    """Rows of a dataset whose pictures are left encoded."""

    rows: Any
    path: str
    image_column: str
    captions: Any
    kept: list[int]  # rows that have a caption

    def __len__(self) -> int:
        return len(self.kept)

    def name(self, index: int) -> str:
        """The dataset and the row's number."""
        return f"{self.path}[{self.kept[index]}]"

    def caption(self, index: int) -> str:
        """What the picture shows; the first of several captions."""
        caption = self.captions[self.kept[index]]
        return str(caption[0] if isinstance(caption, list) else caption)

    def open(self, index: int) -> BinaryIO:
        """The encoded picture."""
        image = self.rows[self.kept[index]][self.image_column]
        if image is None:
            raise OSError("the row has no picture")
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        return Path(image["path"]).open("rb")


def find_on_hub(path: str, config: DataConfig) -> HubPictures:
    """The rows of a dataset: an id, a folder of data files, or what ``save_to_disk`` wrote.

    Raises:
        DataError: ``datasets`` is not installed, there is no such dataset or split, or it has other columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.source='hub' needs datasets, which is not installed; pip install diffusion-attn[train]."
        ) from error
    folder = Path(path).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(folder))
            rows = rows[config.split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(path, split=config.split)
        if missing := {config.image_column, config.caption_column} - set(rows.column_names):
            raise ValueError(f"it has no column {min(missing)!r} but {', '.join(rows.column_names)}")
        rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
        captions = rows[config.caption_column]
        kept = [number for number, caption in enumerate(captions) if caption not in (None, [])]
    except Exception as error:  # it raises whatever the files, the connection or pyarrow made it raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise DataError(
            f"data.path={path!r} could not be loaded ({reason}); expected a dataset with the split {config.split!r} "
            f"and the columns {config.image_column!r} and {config.caption_column!r}: see --data.split, "
            "--data.image_column and --data.caption_column."
        ) from error
    return HubPictures(rows, path, config.image_column, captions, kept)


_FINDERS: dict[str, Any] = {"folder": find_in_folder, "webdataset": find_in_tars, "hub": find_on_hub}
_EXPECTED = {
    "folder": (
        f"{', '.join(SUFFIXES)} with a .txt beside each, or a {' or '.join(CAPTION_FILES)} with file_name and text; "
        "tar files and cached latents are other sources, see --data.source."
    ),
    "webdataset": f"members {', '.join(SUFFIXES)} with a .txt or .json of the same name each.",
    "hub": "rows.",
}
