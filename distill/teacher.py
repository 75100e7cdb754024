"""The teacher's pipeline: loaded, checked, and asked for its sizes and its noise schedule."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_attn.core.errors import DiffusionAttnError, UnsupportedModelError
from diffusion_attn.core.loading import WEIGHTS_ONLY, find_model
from diffusion_attn.distill.config import ConfigError
from diffusion_attn.distill.families import family_of
from diffusion_attn.shapes import models


def load_teacher(name: str) -> Any:
    """Load a pipeline in float32 on the CPU: an embedded one, a local folder's or the Hub's, in this order.

    Raises:
        DiffusionAttnError: it cannot be loaded.
        UnsupportedModelError: it is not a text-to-image pipeline of Stable Diffusion, SDXL or FLUX.1.
    """
    from diffusers import DiffusionPipeline

    try:
        if name in models.available():
            pipe = models.load_pipeline(name)
        else:
            pipe = DiffusionPipeline.from_pretrained(find_model(name), dtype=torch.float32, **WEIGHTS_ONLY)
    except Exception as error:  # loaders raise whatever the broken file or the connection made them raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise DiffusionAttnError(
            f"model.name={name!r} could not be loaded ({reason}); give an embedded model "
            f"({', '.join(models.available())}), a diffusers folder, or a Hub id that can be reached."
        ) from error
    check_teacher(pipe, name)
    return pipe


def check_teacher(pipe: Any, name: str) -> None:
    """Make sure that a pipeline can be distilled.

    Raises:
        UnsupportedModelError: it is not a text-to-image pipeline of Stable Diffusion, SDXL or FLUX.1.
    """
    if not family_of(pipe).serves():
        raise UnsupportedModelError(
            f"model.name={name!r} is a {type(pipe).__name__}: expected a text-to-image pipeline with a UNet that "
            "predicts noise or velocity (Stable Diffusion 1.x, 2.x, SDXL), or FLUX.1's; give one of these."
        )


def native_size(pipe: Any) -> int:
    """Side in pixels of the pictures that the model was trained on."""
    return family_of(pipe).native_size()


def size_step(pipe: Any) -> int:
    """What sides of pictures have to be multiples of, in pixels."""
    return family_of(pipe).size_step()


def training_size(pipe: Any, asked: int | None) -> int:
    """Side in pixels of the training pictures: what is ``asked``, else the model's own.

    Raises:
        ConfigError: the model cannot be trained on it.
    """
    size, step = asked or native_size(pipe), size_step(pipe)
    if size % step:
        raise ConfigError(
            f"data.size={size}: expected a multiple of {step} pixels with this model; change --data.size."
        )
    return size


class NoiseSchedule:
    """The model's own noise schedule: how much of signal and noise there is at each timestep, least noise first.

    Args:
        scheduler: of the pipeline, whatever its kind; only its config is read.
    """

    def __init__(self, scheduler: Any) -> None:
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

        if "beta_schedule" in scheduler.config:
            schedule = DDPMScheduler.from_config(scheduler.config)
            self.prediction_type: str = schedule.config.prediction_type
            alphas = schedule.alphas_cumprod.float()
            self.signals, self.sigmas = alphas.sqrt(), (1 - alphas).sqrt()
        else:
            # As made: a shift that depends on the picture's size comes when one is drawn.
            self.prediction_type = "flow"
            self.sigmas = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config).sigmas.flip(0)
            self.signals = 1 - self.sigmas

    def __len__(self) -> int:
        return len(self.sigmas)

    def at(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares of signal and noise, ``(batch,)`` each, at ``timesteps``, ``(batch,)``: places in the schedule."""
        device = timesteps.device
        return self.signals.to(device)[timesteps], self.sigmas.to(device)[timesteps]
