"""What the denoiser is given instead of pictures and captions: latents, and the conditions of the text encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion_attn.distill.data import Broken, Sample
from diffusion_attn.distill.families import family_of

ADDED = ("text_embeds", "time_ids")
"""Conditions that SDXL's UNet takes as ``added_cond_kwargs``."""


@dataclass(frozen=True)
class Encoded:
    """A batch without its random part; or, without the first dimension, one sample of it.

    Attributes:
        mean: of the latents that the autoencoder holds possible, ``(batch, channels, height, width)``, unscaled.
        std: as ``mean``.
        conditions: what the denoiser is told beside latents and timesteps, by its own names, each ``(batch, ...)``.
        broken: see `Sample.broken`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    conditions: dict[str, torch.Tensor]
    broken: Broken = ()

    def latents(self, noise: torch.Tensor, scaling_factor: float, shift_factor: float | None = None) -> torch.Tensor:
        """Shifted and scaled latents, as ``mean``; ``noise`` decides which of the possible ones."""
        return (self.mean + self.std * noise - (shift_factor or 0.0)) * scaling_factor

    def arguments(self, dropped: torch.Tensor, empty: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The conditions as keyword arguments of the denoiser.

        Args:
            dropped: ``(batch,)``, bool, where the caption is replaced by the empty one.
            empty: conditions of the empty caption, ``(1, ...)`` each.
        """
        given = {
            name: torch.where(dropped.view(-1, *(1,) * (x.ndim - 1)), empty[name], x) if name in empty else x
            for name, x in self.conditions.items()
        }
        added = {name: given.pop(name) for name in ADDED if name in given}
        return {**given, **({"added_cond_kwargs": added} if added else {})}

    def paired(self) -> Encoded:
        """The same batch twice, ``2 * batch``."""
        twice = {name: torch.cat([x, x]) for name, x in self.conditions.items()}
        return Encoded(torch.cat([self.mean, self.mean]), torch.cat([self.std, self.std]), twice, self.broken)

    def to(self, device: torch.device, dtype: torch.dtype) -> Encoded:
        """The same on another device; latents in float32, conditions in ``dtype``."""
        conditions = {
            name: x.to(device, torch.float32 if name == "time_ids" else dtype) for name, x in self.conditions.items()
        }
        return Encoded(self.mean.to(device).float(), self.std.to(device).float(), conditions, self.broken)

    @classmethod
    def stack(cls, samples: Sequence[Encoded]) -> Encoded:
        """Samples as one batch."""
        return cls(
            torch.stack([sample.mean for sample in samples]),
            torch.stack([sample.std for sample in samples]),
            {name: torch.stack([sample.conditions[name] for sample in samples]) for name in samples[0].conditions},
        )


def encode(pipe: Any, samples: Sequence[Sample], device: torch.device, text_tokens: int | None = None) -> Encoded:
    """Pictures of one shape and their captions as the pipeline's autoencoder and text encoders see them."""
    posterior = pipe.vae.encode(torch.stack([sample.pixels for sample in samples]).to(device)).latent_dist
    conditions = encode_captions(pipe, [sample.caption for sample in samples], device, text_tokens)
    if "text_embeds" in conditions:
        ids = [(*sample.original, *sample.corner, *sample.pixels.shape[-2:]) for sample in samples]
        conditions["time_ids"] = torch.tensor(ids, dtype=torch.float32, device=device)
    return Encoded(posterior.mean, posterior.std, conditions)


def encode_captions(
    pipe: Any, captions: Sequence[str], device: torch.device, text_tokens: int | None = None
) -> dict[str, torch.Tensor]:
    """The conditions that ``captions`` make, by the denoiser's own names, each ``(captions, ...)``.

    Args:
        pipe: the teacher.
        captions: one or more.
        device: of the conditions.
        text_tokens: see `DataConfig`.
    """
    return family_of(pipe).encode_captions(captions, device, text_tokens)


def encode_nothing(pipe: Any, device: torch.device, text_tokens: int | None = None) -> dict[str, torch.Tensor]:
    """The conditions, ``(1, ...)`` each, that guidance holds against a prompt: the empty caption's, for SDXL zeros."""
    conditions = encode_captions(pipe, [""], device, text_tokens)
    zeros = getattr(pipe.config, "force_zeros_for_empty_prompt", False)
    return {name: torch.zeros_like(x) for name, x in conditions.items()} if zeros else conditions


def fingerprint(pipe: Any, denoiser: bool = False) -> str:
    """What makes latents and conditions those of this pipeline: its autoencoder, text encoders and tokenizers.

    With ``denoiser`` also the denoiser and its scheduler, which make pictures those of this pipeline.
    """
    hasher = hashlib.sha256()
    if denoiser:
        hasher.update(str(sorted(pipe.scheduler.config.items(), key=str)).encode())
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and (name == "vae" or name.startswith("text_encoder") or denoiser):
            for key, tensor in part.state_dict().items():
                hasher.update(f"{name}.{key}".encode())
                hasher.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        elif name.startswith("tokenizer") and part is not None:
            hasher.update(str(sorted(part.get_vocab().items())).encode())
    return hasher.hexdigest()[:16]
