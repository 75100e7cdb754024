"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

TEXT_KEY = "diffusion-attn"
"""Key of the text chunk in a PNG that holds the settings it was made with, as JSON."""


def save_png(path: Path, image: Image.Image, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings in the text chunk `TEXT_KEY`."""
    info = PngInfo()
    info.add_text(TEXT_KEY, json.dumps(settings))
    with written(path) as part:
        image.save(part, "PNG", pnginfo=info)


def save_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON."""
    save_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8."""
    with written(path) as part:
        part.write_bytes(text.encode())


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; then the file is renamed, so that none is left by halves under its name."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # of an interrupted run, or a link that somebody has put there
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
