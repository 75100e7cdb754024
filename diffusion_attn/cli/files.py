"""Names of pictures, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_attn.cli.errors import CommandError

TEXT_KEY = "diffusion-attn"
"""Key of the text chunk in a PNG that holds the settings it was made with, as JSON."""

_SLUG_LENGTH = 60


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case ASCII letters, digits and dashes, 60 at most, never empty."""
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only)[:_SLUG_LENGTH].strip("-") or "prompt"


def picture_name(index: int, prompt: str, seed: int, variant: str = "") -> str:
    """The file name, without extension, of picture number ``index`` (from 0); ``variant`` names the methods."""
    return "-".join(filter(None, (f"{index:04d}", slug(prompt), f"seed{seed}", variant)))


def prepare_folder(folder: Path, option: str = "--output") -> None:
    """Make ``folder``, given as ``option``, and prove that files can be written in it.

    Raises:
        CommandError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CommandError(
            f"{option} {str(folder)!r} cannot be written ({error.strerror}); choose another folder."
        ) from error


def save_png(path: Path, image: Image.Image, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings in the text chunk `TEXT_KEY`."""
    info = PngInfo()
    info.add_text(TEXT_KEY, json.dumps(settings))
    _write(path, lambda file: image.save(file, "PNG", pnginfo=info))


def save_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON."""
    save_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8."""
    _write(path, lambda file: file.write(text.encode()))


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside ``path`` and rename, so that an interrupted run leaves no half of a file under its name."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
