"""The UNet of a pipeline as a function of float32 latents, with frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.editing.text import Conditioning, device_of, is_xl


class Network:
    """Calls a pipeline's UNet, and counts that.

    Args:
        pipe: a pipeline of Stable Diffusion 1, 2 or XL.
        size: ``(height, width)`` of the latents.
    """

    def __init__(self, pipe: Any, size: tuple[int, int]) -> None:
        self.unet, self.calls = pipe.unet, 0
        self.device = device_of(pipe)
        self._dtype = pipe.unet.dtype
        self._sizes: torch.Tensor | None = None
        if is_xl(pipe):
            height, width = (side * scale_of(pipe) for side in size)
            self._sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device, dtype=self._dtype)

    def __call__(self, latents: torch.Tensor, timestep: Any, text: Conditioning, **added: Any) -> torch.Tensor:
        """The prediction ``(rows, C, h, w)`` in float32.

        Args:
            latents: ``(rows, C, h, w)``.
            timestep: one for all rows.
            text: of the rows.
            added: further conditions, for example ``image_embeds``.
        """
        if "image_embeds" not in added and has_adapters(self.unet):
            raise UnsupportedModelError(
                "an IP-Adapter is loaded, whose pictures an inversion does not know; call unload_ip_adapter() first."
            )
        self.calls += 1
        if self._sizes is not None:
            assert text.pooled is not None
            added |= {"text_embeds": text.pooled.to(self._dtype), "time_ids": self._sizes.expand(len(latents), -1)}
        return self.unet(
            latents.to(self.device, self._dtype),
            torch.as_tensor(timestep, device=self.device),
            encoder_hidden_states=text.embeds.to(self._dtype),
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0].float()


def has_adapters(unet: Any) -> bool:
    """Whether an IP-Adapter is loaded."""
    return unet.config.encoder_hid_dim_type == "ip_image_proj"


def scale_of(pipe: Any) -> int:
    """How many pixels of the picture a latent cell is wide."""
    vae = getattr(pipe, "vae", None)
    return 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradients for the weights of ``modules`` inside the block; their flags are as before after it."""
    changed = [x for module in modules for x in module.parameters() if x.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
