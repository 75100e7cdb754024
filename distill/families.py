"""What families of models do each in their own way: what denoisers and pipelines are given, and how latents lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.enable import resolve
from diffusion_attn.distill.config import ConfigError


@dataclass(frozen=True)
class UNetFamily:
    """Stable Diffusion 1.x, 2.x and SDXL: a UNet for latents as they are, which predicts noise or velocity."""

    pipe: Any

    def serves(self) -> bool:
        """Whether the pipeline is of this family."""
        from diffusers import UNet2DConditionModel

        pipe = self.pipe
        unet: Any = getattr(pipe, "unet", None)
        vae: Any = getattr(pipe, "vae", None)
        complete = isinstance(unet, UNet2DConditionModel) and vae is not None and hasattr(pipe, "encode_prompt")
        return (
            complete
            and unet.config.in_channels == unet.config.out_channels == vae.config.latent_channels
            and unet.config.addition_embed_type in (None, "text_time")
            and pipe.scheduler.config.get("prediction_type") in ("epsilon", "v_prediction")
            and "beta_schedule" in pipe.scheduler.config
        )

    def native_size(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        cells = self.pipe.unet.config.sample_size
        return (cells if isinstance(cells, int) else min(cells)) * self.pipe.vae_scale_factor

    def size_step(self) -> int:
        """One cell of the UNet's lowest level, in pixels."""
        return self.pipe.vae_scale_factor * 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)

    def text_tokens(self, asked: int | None) -> int | None:
        """The length of captions is the text encoder's own.

        Raises:
            ConfigError: another is ``asked``.
        """
        if asked is not None:
            raise ConfigError(
                f"data.text_tokens={asked}: the captions of a {type(self.pipe).__name__} have the length of its text "
                "encoder; leave --data.text_tokens out."
            )
        return None

    def encode_captions(
        self, captions: Sequence[str], device: torch.device, tokens: int | None
    ) -> dict[str, torch.Tensor]:
        """Conditions by name, ``(captions, ...)`` each: ``encoder_hidden_states``, SDXL's pooled ``text_embeds``."""
        encoded = self.pipe.encode_prompt(
            list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipe.unet.config.addition_embed_type is None:
            return {"encoder_hidden_states": encoded[0]}
        text, _, pooled, _ = encoded
        return {"encoder_hidden_states": text, "text_embeds": pooled}

    def inputs(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        sigma: torch.Tensor,
        conditions: dict[str, Any],
        guidance: float | None,
    ) -> dict[str, Any]:
        """The denoiser's arguments.

        Args:
            noisy: latents, ``(batch, channels, height, width)``.
            timesteps: ``(batch,)``, long.
            sigma: share of noise, ``(batch,)``.
            conditions: what captions became.
            guidance: as an input; a UNet has none.
        """
        return {"sample": noisy, "timestep": timesteps, **conditions}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents ``(batch, channels, height, width)`` in the form of the denoiser's predictions."""
        return latents

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        """Back from `pack`, for square pictures of ``size`` pixels."""
        return packed


@dataclass(frozen=True)
class FluxFamily:
    """FLUX.1: a transformer for latents of which 2 x 2 make a token, which predicts the velocity of a straight path.

    The methods are those of `UNetFamily`.
    """

    pipe: Any

    def serves(self) -> bool:
        """Whether the pipeline is FLUX.1's for text alone: variants have further channels."""
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

        transformer, vae, scheduler = self.pipe.transformer, self.pipe.vae, self.pipe.scheduler
        complete = isinstance(transformer, FluxTransformer2DModel) and vae is not None
        return (
            complete
            and isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
            and transformer.config.in_channels == transformer.out_channels == 4 * vae.config.latent_channels
        )

    def native_size(self) -> int:
        """Side in pixels of the pictures that the model was trained on, which its autoencoder alone records."""
        return self.pipe.vae.config.sample_size

    def size_step(self) -> int:
        """One token, in pixels."""
        return 2 * self.pipe.vae_scale_factor

    def text_tokens(self, asked: int | None) -> int:
        """The length of captions: what is ``asked``, else what pictures are drawn with."""
        return asked or call_arguments(self.pipe, [""])["max_sequence_length"]

    def encode_captions(
        self, captions: Sequence[str], device: torch.device, tokens: int | None
    ) -> dict[str, torch.Tensor]:
        """Conditions by name: T5's ``encoder_hidden_states`` for ``tokens``, CLIP's ``pooled_projections``."""
        text, pooled, _ = self.pipe.encode_prompt(
            list(captions), device=device, max_sequence_length=self.text_tokens(tokens)
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def inputs(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        sigma: torch.Tensor,
        conditions: dict[str, Any],
        guidance: float | None,
    ) -> dict[str, Any]:
        """The denoiser's arguments; ``guidance`` only where it is an input, ``None`` for the pipeline's own."""
        height, width = (side // 2 for side in noisy.shape[-2:])
        text = conditions["encoder_hidden_states"].shape[1]
        given = {
            "hidden_states": self.pack(noisy),
            "timestep": sigma,
            "txt_ids": torch.zeros(text, 3, device=noisy.device),
            "img_ids": self.pipe._prepare_latent_image_ids(1, height, width, noisy.device, torch.float32),
            **conditions,
        }
        if not self.pipe.transformer.config.guidance_embeds:
            return given
        if guidance is None:
            guidance = signature(self.pipe.__call__).parameters["guidance_scale"].default
        return {**given, "guidance": torch.full_like(sigma, guidance)}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as tokens ``(batch, height * width / 4, 4 * channels)``."""
        return self.pipe._pack_latents(latents, *latents.shape)

    def unpack(self, packed: torch.Tensor, size: int) -> torch.Tensor:
        """Tokens of square pictures of ``size`` pixels as latents."""
        return self.pipe._unpack_latents(packed, size, size, self.pipe.vae_scale_factor)


def family_of(pipe: Any) -> UNetFamily | FluxFamily:
    """What a pipeline's family does in its own way; `check_teacher` tells whether it is of one."""
    from diffusers import FluxPipeline

    return FluxFamily(pipe) if isinstance(pipe, FluxPipeline) else UNetFamily(pipe)


def denoiser_of(pipe: Any) -> Any:
    """The UNet or transformer of a pipeline."""
    return resolve(pipe)[1]
