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
        cls,
        seed: int,
        step: int,
        batch: int,
        latent: Sequence[int],
        timesteps: int,
        dropout: float,
        *,
        sampled: bool,
        shift: float = 1.0,
    ) -> Draws:
        """The draws of optimiser step ``step`` for its whole batch.

        Args:
            seed: of the run.
            step: number of the step.
            batch: pictures of the step.
            latent: channels, height and width of one latent.
            timesteps: how many the model was trained on.
            dropout: share of captions that are dropped.
            sampled: latents are samples of the posterior; else they are its mean.
            shift: every timestep is as likely at 1; above, those with more noise are likelier, in the manner of a
                scheduler's shift: the share ``u`` of all timesteps becomes ``shift * u / (1 + (shift - 1) * u)``
                (Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23).
        """
        source = generator(seed, "step", step)
        shape = (batch, *latent)
        even = (torch.randint(timesteps, (batch,), generator=source) + 0.5) / timesteps
        return cls(
            (shift * even / (1 + (shift - 1) * even) * timesteps).long().clamp(max=timesteps - 1),
            torch.randn(shape, generator=source),
            torch.randn(shape, generator=source) * sampled,
            torch.rand(batch, generator=source) < dropout,
        )

    def share(self, start: int, count: int) -> Draws:
        """The part of ``count`` pictures from ``start``."""
        parts = (self.timesteps, self.noise, self.posterior, self.dropped)
        return Draws(*(part[start : start + count].contiguous() for part in parts))

    def paired(self) -> Draws:
        """The same draws twice, ``2 * batch``: with every caption, then without."""
        kept = torch.zeros_like(self.dropped)
        parts = ((self.timesteps,) * 2, (self.noise,) * 2, (self.posterior,) * 2, (kept, ~kept))
        return Draws(*(torch.cat(part) for part in parts))

    def to(self, device: torch.device) -> Draws:
        """The same on another device."""
        return Draws(*(x.to(device) for x in (self.timesteps, self.noise, self.posterior, self.dropped)))
