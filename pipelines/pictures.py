"""Large pictures between PIL and tensors: band by band, so that no copy of the whole stands beside another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

_BAND = 256  # rows


def to_pixels(image: Image.Image) -> torch.Tensor:
    """``(1, 3, height, width)`` float32, 0 to 1, of an RGB picture."""
    pixels = torch.empty(1, 3, image.height, image.width)
    for top in range(0, image.height, _BAND):
        band = np.asarray(image.crop((0, top, image.width, min(top + _BAND, image.height))))
        pixels[0, :, top : top + _BAND] = torch.from_numpy(band.copy()).permute(2, 0, 1)
    return pixels.div_(255)


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """The RGB picture of ``(3, height, width)``, 0 to 1, any float dtype and device."""
    picture = np.empty((*pixels.shape[1:], 3), np.uint8)
    for top in range(0, len(picture), _BAND):
        band = pixels[:, top : top + _BAND].float().mul(255).round_().to(torch.uint8)
        picture[top : top + _BAND] = band.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(picture)


def open_png(path: Path, size: tuple[int, int]) -> Image.Image:
    """The RGB picture in a PNG that has to be of ``size`` (height, width).

    Pillow's own way in refuses very large pictures, which may be made to fill memory; of one that is known to be as
    large as it is, nothing has to be feared.

    Raises:
        OSError: it is no PNG, or of another size.
    """
    try:
        image = PngImageFile(path)
        if image.size == size[::-1]:
            return image.convert("RGB")
    except Exception as error:  # each kind of damage makes Pillow raise something else
        raise OSError(f"{path} is no PNG ({error})") from error
    raise OSError(f"{path} is {image.height}x{image.width}, and {size[0]}x{size[1]} was expected")
