"""Everything random, as a function of seed and step: the same for any number of processes, and after a restart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def generator(*key: int | str) -> torch.Generator:
    """A random source of its own for every ``key``."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


@dataclass(frozen=True)
class Draws:
    """The random part of a batch.

    Attributes:
        timesteps: ``(batch,)``, long.
        noise: ``(batch, channels, height, width)``, what the latents are mixed with.
        posterior: as ``noise``, which of the autoencoder's possible latents is taken.
        dropped: ``(batch,)``, bool, whose caption is replaced by the empty one.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    posterior: torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def of(
        cls, seed: int, step: int, batch: int, latent: Sequence[int], timesteps: int, dropout: float, *, sampled: bool
    ) -> Draws:
        """The draws of optimiser step ``step`` for its whole batch.

        Args:
            seed: of the run.
            step: number of the step.
            batch: pictures of the step.
            latent: channels, height and width of one latent.
            timesteps: how many the model was trained on; all are as likely.
            dropout: share of captions that are dropped.
            sampled: latents are samples of the posterior; else they are its mean.
        """
        source = generator(seed, "step", step)
        shape = (batch, *latent)
        return cls(
            torch.randint(timesteps, (batch,), generator=source),
            torch.randn(shape, generator=source),
            torch.randn(shape, generator=source) * sampled,
            torch.rand(batch, generator=source) < dropout,
        )

    def share(self, start: int, count: int) -> Draws:
        """The part of ``count`` pictures from ``start``."""
        parts = (self.timesteps, self.noise, self.posterior, self.dropped)
        return Draws(*(part[start : start + count].contiguous() for part in parts))

    def to(self, device: torch.device) -> Draws:
        """The same on another device."""
        return Draws(*(x.to(device) for x in (self.timesteps, self.noise, self.posterior, self.dropped)))
