"""Names of pictures, and the folders that they go to."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from pathlib import Path

from PIL import Image

from diffusion_attn.cli.errors import CommandError
from diffusion_attn.core import pictures
from diffusion_attn.core.files import TEXT_KEY, save_json, save_png, save_text

__all__ = ["TEXT_KEY", "open_picture", "picture_name", "prepare_folder", "save_json", "save_png", "save_text", "slug"]

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


def open_picture(path: str) -> Image.Image:
    """The RGB picture in a file, turned as its camera was held.

    Raises:
        CommandError: it is not there, no picture, or too large.
    """
    try:
        return pictures.open_picture(Path(path).expanduser())
    except FileNotFoundError as error:
        raise CommandError(f"{path!r} was not found; give a picture file.") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"{path!r} cannot be read as a picture ({error}); give a PNG or JPEG file.") from error
