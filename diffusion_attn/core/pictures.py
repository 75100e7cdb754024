"""Pictures that somebody else may have made, opened within bounds."""

from __future__ import annotations

import os
from typing import BinaryIO

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is opened. Pillow has readers of more, and one of them (EPS) has another program run what is in the file."""

MOST_PIXELS = 2**28
"""Pillow lets in two thirds of that, lest a small file fill the memory; 16384 pixels a side are our work."""


def open_picture(file: str | os.PathLike[str] | BinaryIO, turn: bool = True) -> Image.Image:
    """The RGB picture in a file.

    Args:
        file: a path or an open file.
        turn: as its camera was held.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no picture of one of `FORMATS`, damaged, or has more than `MOST_PIXELS` pixels.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the size is looked at here
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels, and {MOST_PIXELS} in all is the most")
            return (ImageOps.exif_transpose(image) if turn else image).convert("RGB")
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # each kind of damage makes Pillow raise something else
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
