"""Pictures of a run that is not finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from diffusion_attn.cli import models
from diffusion_attn.cli.models import Size
from diffusion_attn.pipelines.autoencoder import decode
from diffusion_attn.pipelines.pictures import to_picture

_LARGEST = 64  # latent cells a side: a preview costs little, however large the picture
_SHARE = 4  # of the time, one part for previews


def by_step(pipe: Any, callback: Callable[..., Any]) -> dict[str, Any]:
    """The argument of a call of ``pipe`` that has ``callback`` called after each step, where it takes one."""
    return {"callback_on_step_end": callback} if "callback_on_step_end" in models.parameters_of(pipe) else {}


class Previews:
    """A ``callback_on_step_end`` that tells of every step, and shows the latents where there is time to.

    Args:
        size: width and height of the picture in pixels.
        tell: takes the number of steps that are done, and the picture or ``None``.

    Attributes:
        seconds: that the pictures took.
    """

    def __init__(self, size: Size, tell: Callable[[int, Image.Image | None], None]) -> None:
        self.size, self.tell = size, tell
        self.done = 0
        self.seconds = 0.0
        self._next = 0.0

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """One step is over."""
        self.done += 1
        began = time.monotonic()
        picture = None
        if began >= self._next:
            picture = preview(pipe, kwargs["latents"], self.size)
            ended = time.monotonic()
            self._next = ended + max(0.3, _SHARE * (ended - began))
            self.seconds += ended - began
        self.tell(self.done, picture)
        return kwargs


def preview(pipe: Any, latents: torch.Tensor, size: Size) -> Image.Image:
    """The first picture of ``latents``, reduced where they are large."""
    width, height = size
    latents = latents[:1]
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    longest = max(latents.shape[-2:])
    if longest > _LARGEST:
        latents = F.interpolate(latents.float(), scale_factor=_LARGEST / longest, mode="area").to(latents.dtype)
    scale = pipe.vae_scale_factor
    return to_picture(decode(pipe, latents, (latents.shape[-2] * scale, latents.shape[-1] * scale))[0])
