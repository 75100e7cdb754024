"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

TEXT_KEY = "diffusion-attn"
"""Key of the text chunk in a PNG that holds the settings it was made with, as JSON."""


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
