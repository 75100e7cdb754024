"""Deterministic DDIM along a schedule, in both directions."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_attn.core.errors import UnsupportedModelError


class DdimPath:
    """The noise levels that a run passes, from the noisiest down to the picture.

    Source: DDIM, equation 12 with sigma 0; arXiv 2010.02502. The arithmetic of `DDIMScheduler` and
    `DDIMInverseScheduler` without clipping, for any list of timesteps.

    Args:
        scheduler: of any kind that has ``alphas_cumprod``.
        timesteps: noisiest first; ``None``: those that ``scheduler`` sets for ``num_inference_steps``.

    Raises:
        UnsupportedModelError: the scheduler is not one of a diffusion of that kind.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int = 50, timesteps: torch.Tensor | None = None) -> None:
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise UnsupportedModelError(
                f"{type(scheduler).__name__} has no alphas_cumprod; inversion takes a scheduler of the DDPM family, "
                "for example DDIMScheduler.from_config(pipe.scheduler.config)."
            )
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps)
            # PNDM names timesteps twice, and Euler gives fractions.
            timesteps = scheduler.timesteps.cpu().double().round().long().unique().flip(0)
            if len(timesteps) != num_inference_steps:
                raise UnsupportedModelError(
                    f"{type(scheduler).__name__} sets {len(timesteps)} timesteps for {num_inference_steps} steps; "
                    "inversion takes one for each, as DDIMScheduler.from_config(pipe.scheduler.config) does."
                )
        self.timesteps: list[int] = timesteps.tolist()
        clean = getattr(scheduler, "final_alpha_cumprod", alphas[0])
        self._levels = [float(alphas[t]) for t in self.timesteps] + [float(clean)]
        self._prediction = scheduler.config.get("prediction_type", "epsilon")

    def __len__(self) -> int:
        return len(self.timesteps)

    def down(self, step: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """What the network's ``output`` at ``step`` makes of ``sample``: the latent of the next level."""
        return self._move(self._levels[step], self._levels[step + 1], output, sample)

    def up(self, step: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The way back: from the latent after ``step`` to that before it."""
        return self._move(self._levels[step + 1], self._levels[step], output, sample)

    def _move(self, start: float, end: float, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        signal, noise = start**0.5, (1 - start) ** 0.5
        if self._prediction == "v_prediction":
            clean, error = signal * sample - noise * output, signal * output + noise * sample
        elif self._prediction == "sample":
            clean, error = output, (sample - signal * output) / noise if noise else torch.zeros_like(sample)
        else:
            clean, error = (sample - noise * output) / signal, output
        return end**0.5 * clean + (1 - end) ** 0.5 * error
