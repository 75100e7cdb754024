"""DemoFusion: draw the details of an enlarged SDXL picture, held to the picture and to its layout.

A step of the sampler runs twice: as it is, and with dilated convolutions on a blurred input, which see as much of the
picture as they were trained to see of a small one. The two are mixed, and what was there before is mixed in, each the
more the noisier the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import EulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from diffusion_attn.core.context import Schedule
from diffusion_attn.core.enable import resolve
from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.session import Session
from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.network import has_adapters
from diffusion_attn.ops.gaussian_blur import gaussian_blur


@dataclass(frozen=True)
class DemoFusion:
    """Options of the refinement.

    Args:
        cosine_scales: how fast three things fade over the run: what the noised picture has in each step, what the
            dilated branch has in its result, and the blur. They are powers of a cosine that falls from 1 at the
            noisiest timestep of the training to 0; higher fades sooner, 0 never.
        sigma: of the blur at the noisiest timestep, in latent cells; it falls to a hundredth of that.
        mode: ``"official"`` computes what LinFusion's released pipelines do, whose scheduler has already moved on when
            the dilated branch asks it to scale: its input is scaled with the sigma of the next step, that is not at all
            in the last one. ``"corrected"`` scales both branches with the sigma that they are at.

    Raises:
        ValueError: an option is not what it should be.

    Source: DemoFusion (arXiv 2311.16973) in the form of LinFusion (arXiv 2409.02097).
    """

    cosine_scales: tuple[float, float, float] = (3.0, 1.0, 1.0)
    sigma: float = 0.8
    mode: Literal["corrected", "official"] = "corrected"

    def __post_init__(self) -> None:
        if len(self.cosine_scales) != 3 or not all(0 <= scale < math.inf for scale in self.cosine_scales):
            raise ValueError(
                f"cosine_scales={self.cosine_scales!r}: expected three numbers from 0; give (3.0, 1.0, 1.0) for what "
                "is published."
            )
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma={self.sigma!r}: expected a number of latent cells above 0; give 0.8.")
        if self.mode not in ("corrected", "official"):
            raise ValueError(f"mode={self.mode!r}: expected 'corrected' or 'official'; give one of them.")

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline that `refine` cannot work on.

        Raises:
            UnsupportedModelError: it is not of SDXL, or its scheduler of another kind.
        """
        _check_pipeline(pipe)

    @torch.no_grad()
    def refine(
        self,
        pipe: Any,
        latents: torch.Tensor,
        *,
        ratio: int,
        strength: float,
        num_inference_steps: int,
        guidance_scale: float,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        anchor: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        size: Size | None = None,
        unscaled_start: bool = False,
    ) -> torch.Tensor:
        """Noise an enlarged picture to ``strength`` and denoise it again, two calls of the UNet in each step.

        The steps are those of a copy of the pipeline's scheduler; methods that are in force on the UNet, through
        whichever pipeline, find their step in that copy meanwhile. The pipeline's own scheduler is not touched.

        Args:
            pipe: ``StableDiffusionXLPipeline`` or its image-to-image sibling, with an ``EulerDiscreteScheduler``. What
                offloads its models is left to free them.
            latents: ``(batch, C, h, w)``, the enlarged picture as the autoencoder's scaled latents.
            ratio: the picture's size by the native one, by which convolutions are dilated.
            strength: share of the steps that are run, above 0 and up to 1; rounded up to whole steps.
            num_inference_steps: of the whole schedule.
            guidance_scale: 1 or less for none.
            prompt, negative_prompt: one text, or several whose number divides the batch.
            prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds: what
                ``pipe.encode_prompt`` makes of these, instead.
            anchor: ``(batch or 1, C, any height, any width)``, latents whose mean and deviation in each channel the
                result is given; ``None``: those of ``latents``.
            generator: that the noise is drawn from.
            noise: of the shape of ``latents``, instead.
            size: ``(height, width)`` in pixels that the UNet is told of; ``None``: that of ``latents``.
            unscaled_start: in the official mode, the first input is not scaled at all, as in the released
                text-to-image pipeline, where the scheduler still stands at the end of the stage before.

        Returns:
            ``(batch, C, h, w)`` float32, on the device that the pipeline computes on.

        Raises:
            UnsupportedModelError: the pipeline is not of SDXL, or its scheduler of another kind.
            ValueError: an argument is not what it should be.
        """
        _check_pipeline(pipe)
        _check_run(pipe, latents, ratio, strength, num_inference_steps)
        _check_beside(latents, noise, anchor, generator)
        device, floats = pipe._execution_device, torch.float32
        clean = latents.to(device, floats)
        conditions = _conditions(
            pipe,
            len(clean),
            guidance_scale > 1,
            size or (clean.shape[2] * pipe.vae_scale_factor, clean.shape[3] * pipe.vae_scale_factor),
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
        )
        if noise is None:
            noise = randn_tensor(clean.shape, generator=generator, device=device, dtype=floats)
        noise = noise.to(device, floats)
        anchor = clean if anchor is None else anchor.to(device, floats)
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=device)
        last = len(scheduler.timesteps)
        first = last - math.ceil(num_inference_steps * strength)
        training_steps = scheduler.config.num_train_timesteps
        official = self.mode == "official"

        def denoise(step: int, x: torch.Tensor, seen: torch.Tensor, scaled_at: int) -> torch.Tensor:
            """``x`` a step on, by what the UNet says of ``seen``; the two are of the same noise."""
            t = scheduler.timesteps[step]
            scheduler._step_index = scaled_at
            predicted = _predict(pipe, scheduler.scale_model_input(seen, t), t, conditions, guidance_scale)
            scheduler._step_index = step
            return scheduler.step(predicted, t, x, return_dict=False)[0]

        x = clean + scheduler.sigmas[first] * noise
        with _steps_from(scheduler, pipe), pipe.progress_bar(total=last - first) as progress:
            for step, t in list(enumerate(scheduler.timesteps.tolist()))[first:]:
                cosine = 0.5 * (1 + math.cos(math.pi * (1 - t / training_steps)))
                skipped, mixed, blurred = (cosine**scale for scale in self.cosine_scales)
                x = (1 - skipped) * x + skipped * (clean + scheduler.sigmas[step] * noise)
                plain = denoise(step, x, x, last if official and unscaled_start and step == first else step)
                blur = gaussian_blur(x, 2 * ratio - 1, self.sigma * (0.99 * blurred + 0.01))
                with dilated_convolutions(pipe.unet, ratio):
                    dilated = denoise(step, x, _standardised(blur, x), step + 1 if official else step)
                x = (1 - mixed) * plain + mixed * dilated
                progress.update()
        return _standardised(x, anchor)


@contextmanager
def dilated_convolutions(module: nn.Module, ratio: int) -> Iterator[None]:
    """All 2-D convolutions in ``module`` with ``ratio`` times their dilation and padding, for a block of code.

    Strides stay and so do sizes; those of 1 x 1 reach no further and are left alone. What adapters such as LoRA have
    added beside a convolution is dilated with it.
    """
    names = ("dilation", "padding", "_reversed_padding_repeated_twice")  # the last serves other than zero padding
    found = [x for x in module.modules() if isinstance(x, nn.Conv2d) and x.kernel_size != (1, 1)]
    before = [(conv, name, getattr(conv, name)) for conv in found for name in names]
    try:
        for conv, name, value in before:
            if not isinstance(value, str):  # padding="same" follows the dilation by itself
                setattr(conv, name, type(value)(ratio * number for number in value))
        yield
    finally:
        for conv, name, value in before:
            setattr(conv, name, value)


@dataclass(eq=False)
class _Run:
    """What a `Schedule` reads of a pipeline."""

    scheduler: Any


@contextmanager
def _steps_from(scheduler: Any, pipe: Any) -> Iterator[None]:
    """Have methods in force on the denoiser find their step in ``scheduler`` for a block of code."""
    session = Session.of(resolve(pipe)[1])
    if session is None:
        yield
        return
    # Not the scheduler of `pipe`: they may have been enabled through another pipeline, or with a fixed schedule.
    run, before = _Run(scheduler), session.schedule
    session.schedule = Schedule(run)
    try:
        yield
    finally:
        session.schedule = before


def _conditions(
    pipe: Any,
    rows: int,
    guided: bool,
    size: Size,
    *,
    prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    **texts: Any,
) -> dict[str, Any]:
    """What the UNet is told of ``rows`` pictures: the negative texts first where ``guided``."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError(
            f"prompt is {prompt!r} and prompt_embeds {'missing' if prompt_embeds is None else 'given'}; give one of "
            "the two."
        )
    negative = texts["negative_prompt_embeds"]
    for name, pair in {
        "pooled_prompt_embeds": (prompt_embeds, texts["pooled_prompt_embeds"]),
        "negative_pooled_prompt_embeds": (negative, texts["negative_pooled_prompt_embeds"]),
    }.items():
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(
                f"{name} is {'missing' if pair[1] is None else 'given'} and {name.replace('pooled_', '')} is not; give "
                "both, as pipe.encode_prompt does."
            )
    prompts = [prompt] if isinstance(prompt, str) else prompt and list(prompt)
    count = len(prompts or ()) if prompt_embeds is None else len(prompt_embeds)
    if not count or rows % count:
        raise ValueError(
            f"there are {count} prompts for {rows} rows of latents; give a number that divides it, or one."
        )
    embeds, negative_embeds, pooled, negative_pooled = pipe.encode_prompt(
        prompt=prompts,
        prompt_embeds=prompt_embeds,
        device=pipe._execution_device,
        num_images_per_prompt=rows // count,
        do_classifier_free_guidance=guided,
        **texts,
    )
    if guided:
        embeds, pooled = torch.cat([negative_embeds, embeds]), torch.cat([negative_pooled, pooled])
    place = {"device": pipe._execution_device, "dtype": pipe.unet.dtype}
    sizes = torch.tensor([*size, 0, 0, *size], **place).expand(len(embeds), -1)
    return {
        "encoder_hidden_states": embeds.to(**place),
        "added_cond_kwargs": {"text_embeds": pooled.to(**place), "time_ids": sizes},
    }


def _predict(
    pipe: Any, x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any], guidance_scale: float
) -> torch.Tensor:
    """What the UNet predicts for ``x``, guided where there are negative conditions, float32."""
    branches = len(conditions["encoder_hidden_states"]) // len(x)
    rows = torch.cat([x] * branches).to(pipe.unet.dtype)
    predicted = pipe.unet(rows, timestep, **conditions, return_dict=False)[0].float()
    if branches == 1:
        return predicted
    negative, positive = predicted.chunk(2)
    return negative + guidance_scale * (positive - negative)


def _standardised(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` with the mean and the standard deviation of ``like`` in each channel."""
    deviation, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    wanted_deviation, wanted_mean = torch.std_mean(like, dim=(2, 3), keepdim=True)
    return (x - mean) / deviation * wanted_deviation + wanted_mean


def _check_pipeline(pipe: Any) -> None:
    config = getattr(getattr(pipe, "unet", None), "config", {})
    refiner = getattr(pipe, "config", {}).get("requires_aesthetics_score", False)
    if config.get("addition_embed_type") != "text_time" or not hasattr(pipe, "encode_prompt") or refiner:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} is no pipeline of SDXL's base model, for which DemoFusion is made; give a "
            "StableDiffusionXLPipeline or StableDiffusionXLImg2ImgPipeline of it."
        )
    if has_adapters(pipe.unet):
        raise UnsupportedModelError(
            "an IP-Adapter is loaded, whose pictures the refinement does not know; call unload_ip_adapter() first."
        )
    scheduler: Any = pipe.scheduler
    if not isinstance(scheduler, EulerDiscreteScheduler):
        raise UnsupportedModelError(
            f"the scheduler is a {type(scheduler).__name__}; DemoFusion takes each step twice, which one with a memory "
            "or with noise of its own does not bear: "
            "pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)."
        )
    if pipe.scheduler.config.get("timestep_type") == "continuous":
        raise UnsupportedModelError(
            "the scheduler has timestep_type='continuous', and DemoFusion reads from the timestep how noisy a step is; "
            "use a model with timestep_type='discrete'."
        )


def _check_run(pipe: Any, latents: torch.Tensor, ratio: int, strength: float, num_inference_steps: int) -> None:
    channels = pipe.unet.config.in_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"latents have the shape {tuple(latents.shape)}: expected (batch, {channels}, height, width); give the "
            "autoencoder's scaled latents of the enlarged picture."
        )
    if not isinstance(ratio, int) or ratio < 2:
        raise ValueError(
            f"ratio={ratio!r}: expected a whole number from 2, the picture's size by the native one; a picture of the "
            "native size needs no refinement."
        )
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength!r}: expected a share of the steps above 0 and up to 1; give 0.32.")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps!r}: expected a number from 1; give 50.")


def _check_beside(
    latents: torch.Tensor, noise: torch.Tensor | None, anchor: torch.Tensor | None, generator: Any
) -> None:
    if noise is not None and noise.shape != latents.shape:
        raise ValueError(
            f"noise has the shape {tuple(noise.shape)} and latents {tuple(latents.shape)}; give noise of that shape, "
            "or a generator."
        )
    if isinstance(generator, list) and len(generator) != len(latents):
        raise ValueError(
            f"generator is a list of {len(generator)} for {len(latents)} rows of latents; give one for each row, or a "
            "single one without a list."
        )
    if anchor is None:
        return
    if anchor.ndim != 4 or anchor.shape[1] != latents.shape[1] or len(anchor) not in (1, len(latents)):
        raise ValueError(
            f"anchor has the shape {tuple(anchor.shape)}: expected ({len(latents)} or 1, {latents.shape[1]}, height, "
            "width); give the latents of the picture whose colours are to be kept."
        )
