"""What image adapters of an editing pipeline are told, and how strong they are meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers.models.embeddings import ImageProjection
from PIL import Image

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.editing.guidance import image_guidance_embeds
from diffusion_attn.editing.network import has_adapters
from diffusion_attn.editing.processors import ADAPTERS

Layout = Literal["contrastive", "per_branch"]


def adapter_embeds(
    pipe: Any,
    images: Sequence[Any],
    sources: Sequence[str],
    targets: Sequence[str],
    scale: float | None,
    layout: Layout,
) -> list[torch.Tensor] | None:
    """Embeddings ``(4 * pairs, 1, D)`` for each adapter, zeros at a ``scale`` of 0; ``None`` without adapters.

    Raises:
        UnsupportedModelError: an adapter cannot be told of a picture.
        ValueError: an encoder is missing, or a picture is given as latents.
    """
    if not has_adapters(pipe.unet):
        return None
    if scale == 0:
        return _no_images(pipe.unet, 4 * len(targets))
    return estimate_target_embeds(pipe, [_picture(pipe, x) for x in images], sources, targets, layout)


@contextmanager
def adapter_scale(unet: Any, scale: float | None) -> Iterator[None]:
    """All image adapters of ``unet`` at ``scale`` for a block of code; ``None`` leaves them alone."""
    processors = [x for x in unet.attn_processors.values() if isinstance(x, ADAPTERS)]
    before = [processor.scale for processor in processors]
    try:
        for processor in processors if scale is not None else ():
            processor.scale = [scale] * len(processor.scale)
        yield
    finally:
        for processor, known in zip(processors, before, strict=True):
            processor.scale = known


def estimate_target_embeds(
    pipe: Any, images: Sequence[Any], sources: Sequence[str], targets: Sequence[str], layout: Layout
) -> list[torch.Tensor]:
    """Embeddings ``(4 * pairs, 1, D)`` for each adapter, all pairs of a branch together, in the denoiser's order.

    Source: ViMAEdit, CLIP-based target image embedding estimation; arXiv 2410.10496.

    Args:
        pipe: with the adapter's ``image_encoder`` and ``feature_extractor`` and the text encoder of the same CLIP.
        images: PIL pictures.
        sources, targets: the prompts of each.
        layout: as in `image_guidance_embeds`.

    Raises:
        UnsupportedModelError: an adapter is of a kind that reads patches of a picture, or takes another CLIP's.
        ValueError: an encoder is missing.
    """
    widths = _widths(pipe.unet)
    encoder, tokenizer = _text_encoder(pipe)
    width = pipe.image_encoder.config.projection_dim
    if {width} != {*widths, encoder.config.projection_dim}:
        raise UnsupportedModelError(
            f"image_encoder gives {width} numbers, the text encoder for the guidance {encoder.config.projection_dim} "
            f"and the IP-Adapter takes {widths}; take encoders of the CLIP that the adapter was trained with, or give "
            "ip_adapter_image_embeds."
        )
    device = pipe._execution_device
    pixels = pipe.feature_extractor(images=list(images), return_tensors="pt").pixel_values
    seen = pipe.image_encoder(pixels.to(device, pipe.image_encoder.dtype)).image_embeds
    ids = tokenizer(
        [*sources, *targets],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    said = encoder(ids.to(device)).text_embeds.unflatten(0, (2, -1))
    of_pairs = zip(seen.split(1), said[0].split(1), said[1].split(1), strict=True)
    rows = [image_guidance_embeds(image, source, target, layout) for image, source, target in of_pairs]
    return [torch.stack(rows, 1).flatten(0, 1)] * len(widths)


def _picture(pipe: Any, image: Any) -> Image.Image:
    """What CLIP looks at: the whole picture."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, torch.Tensor) and image.shape[-3] == pipe.unet.config.in_channels:
        raise ValueError(
            "image is given as latents, which CLIP cannot look at; give the picture, or ip_adapter_image_embeds, "
            "or ip_adapter_scale=0."
        )
    return pipe.image_processor.postprocess(pipe.image_processor.preprocess(image), "pil")[0]


def _no_images(unet: Any, rows: int) -> list[torch.Tensor]:
    """Embeddings ``(rows, 1, D)`` for adapters whose scale is 0.

    Raises:
        UnsupportedModelError: an adapter is of an unknown kind.
    """
    zeros = []
    for projection in unet.encoder_hid_proj.image_projection_layers:
        if isinstance(projection, ImageProjection):
            zeros.append(torch.zeros(rows, 1, projection.image_embeds.in_features))
        elif hasattr(projection, "proj_in"):  # of patches
            zeros.append(torch.zeros(rows, 1, 1, projection.proj_in.in_features))
        else:
            raise UnsupportedModelError(
                f"an IP-Adapter with {type(projection).__name__} is loaded, for which no empty picture is known; call "
                "unload_ip_adapter(), or give ip_adapter_image_embeds."
            )
    return zeros


def _text_encoder(pipe: Any) -> tuple[Any, Any]:
    """The text encoder of the adapter's CLIP; for SDXL's own adapters it is the second of the pipeline."""
    if pipe.image_encoder is None or pipe.feature_extractor is None:
        raise ValueError(
            "image_encoder or feature_extractor is missing, with which CLIP looks at the picture; call load_clip(), or "
            "give ip_adapter_image_embeds, or ip_adapter_scale=0."
        )
    if pipe.guidance_text_encoder is not None:
        return pipe.guidance_text_encoder, pipe.guidance_tokenizer or pipe.tokenizer
    second = getattr(pipe, "text_encoder_2", None)
    if second is not None and second.config.projection_dim == pipe.image_encoder.config.projection_dim:
        return second, pipe.tokenizer_2
    raise ValueError(
        "an IP-Adapter is loaded, and the text encoder of its CLIP is not, which says what the edited picture would "
        "look like; call load_clip(), or give ip_adapter_image_embeds, or ip_adapter_scale=0."
    )


def _widths(unet: Any) -> list[int]:
    """How long an embedding is that each adapter takes."""
    projections = unet.encoder_hid_proj.image_projection_layers
    for projection in projections:
        if not isinstance(projection, ImageProjection):
            raise UnsupportedModelError(
                f"an IP-Adapter with {type(projection).__name__} reads patches of a picture, of which there are none "
                "of one that is still to be drawn; load a plain one such as ip-adapter_sd15.safetensors, or give "
                "ip_adapter_image_embeds."
            )
    return [projection.image_embeds.in_features for projection in projections]
