"""What editing pipelines share: components, pictures in and out, and words to blend."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.network import has_adapters, scale_of
from diffusion_attn.editing.prompts import known_tokens
from diffusion_attn.pipelines.autoencoder import lifted

Words = str | Sequence[str]


class EditingPipeline(DiffusionPipeline):
    """The components of a Stable Diffusion 1, 2 or XL pipeline, for editing."""

    # Set by diffusers, whose pipelines are not typed.
    vae: Any
    unet: Any
    tokenizer: Any
    scheduler: Any
    register_modules: Any
    register_to_config: Any
    set_progress_bar_config: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    _execution_device: torch.device

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components: ClassVar = ["vae", "text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.vae_scale_factor = scale_of(self)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True)

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Any:
        """This pipeline around the components of another, which stay what, where and how precise they are.

        Args:
            pipeline: of Stable Diffusion 1, 2 or XL.
            components: to use instead of some of its own.

        Raises:
            UnsupportedModelError: it is of another family.
        """
        if not hasattr(pipeline, "unet") or getattr(pipeline, "tokenizer", None) is None:
            raise UnsupportedModelError(
                f"{type(pipeline).__name__} has no UNet with a tokenizer; give a pipeline of Stable Diffusion 1, 2 "
                "or XL."
            )
        names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        found = {name: getattr(pipeline, name) for name in names if hasattr(pipeline, name)}
        found.setdefault("vae", None)  # latents can be edited without
        config = getattr(pipeline, "config", {})
        if "force_zeros_for_empty_prompt" in config:
            found["force_zeros_for_empty_prompt"] = config["force_zeros_for_empty_prompt"]
        made = cls(**{**found, **components})
        made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return made

    @torch.no_grad()
    def encode_image(self, image: Any, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """Scaled latents ``(rows, C, h, w)`` float32 of a picture: the mean of the autoencoder's posterior.

        Args:
            image: a PIL picture, an array, a tensor, or latents, which come back as they are.
            height, width: in pixels; ``None``: the picture's, cut down to what the autoencoder takes.
        """
        if isinstance(image, torch.Tensor) and image.shape[-3] == self.unet.config.in_channels:
            return image.to(self._execution_device, torch.float32)
        pixels = self.image_processor.preprocess(image, height, width).to(self._execution_device)
        with self._vae() as vae:
            return vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Any:
        """Pictures of scaled latents ``(rows, C, h, w)``, as ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``."""
        if output_type == "latent":
            return latents
        with self._vae() as vae:
            pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(pixels.float(), output_type=output_type)

    def _vae(self) -> AbstractContextManager[Any]:
        """The autoencoder, in float32 where half precision overflows in it."""
        if self.vae is None:
            raise ValueError("this pipeline has no vae; give latents, and ask for output_type='latent'.")
        return lifted(self.vae)

    def latent_size(self, height: int | None, width: int | None) -> Size:
        """Height and width in latent cells, from pixels or the model's own.

        Raises:
            ValueError: the sides are no multiples of what a cell covers.
        """
        sample = self.unet.config.sample_size
        own = (sample, sample) if isinstance(sample, int) else tuple(sample)
        sides = [
            side * self.vae_scale_factor if given is None else given
            for side, given in zip(own, (height, width), strict=True)
        ]
        if any(side % self.vae_scale_factor for side in sides):
            raise ValueError(f"height and width are {sides}; give multiples of {self.vae_scale_factor} pixels.")
        return sides[0] // self.vae_scale_factor, sides[1] // self.vae_scale_factor

    def image_conditions(self, embeds: list[torch.Tensor] | None) -> dict[str, Any]:
        """What the UNet is given for its image adapters.

        Raises:
            ValueError: it has adapters and there are no embeddings, or the other way round.
        """
        if has_adapters(self.unet) != (embeds is not None):
            raise ValueError(
                "ip_adapter_image_embeds are needed while an IP-Adapter is loaded, and only then; give them, or call "
                "load_ip_adapter or unload_ip_adapter on the pipeline that this one was made from."
            )
        if embeds is None:
            return {}
        return {"image_embeds": [part.to(self._execution_device, self.unet.dtype) for part in embeds]}

    @staticmethod
    def check_callback(names: Sequence[str]) -> None:
        """Refuse tensors that a callback cannot be given.

        Raises:
            ValueError: there is one beside ``"latents"``.
        """
        if set(names) - {"latents"}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is {list(names)}; the callback can be given 'latents' alone."
            )

    def word_tokens(self, prompts: Sequence[str], words: Sequence[Words], argument: str) -> list[list[list[int]]]:
        """The token positions of each of the words that are named for each of ``prompts``.

        Raises:
            ValueError: there is not one entry for each prompt, or a word is not in its prompt.
        """
        if isinstance(words, str) or len(words) != len(prompts):
            raise ValueError(
                f"{argument} is {words!r}; give one entry for each of the {len(prompts)} prompts, the source's first: "
                "a word or several."
            )
        named = [[entry] if isinstance(entry, str) else entry for entry in words]
        return [
            [known_tokens(prompt, word, self.tokenizer, argument) for word in entry]
            for prompt, entry in zip(prompts, named, strict=True)
        ]
