"""From a picture to the noise it could have been drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from diffusion_attn.editing.inversion.ddim_path import DdimPath
from diffusion_attn.editing.inversion.record import Inversion, fingerprint
from diffusion_attn.editing.inversion.stage import progress, stage
from diffusion_attn.editing.layers import size_of
from diffusion_attn.editing.network import Network
from diffusion_attn.editing.text import Conditioning, device_of, encode, is_xl, text_encoders

AfterStep = Callable[[int], object]


@torch.no_grad()
def ddim_invert(
    pipe: Any,
    latents: torch.Tensor,
    prompt: str | None = None,
    *,
    prompt_embeds: torch.Tensor | None = None,
    num_inference_steps: int = 50,
    callback: AfterStep | None = None,
) -> Inversion:
    """Follow the sampler backwards, without guidance: each step asks the network at the level it goes to.

    Source: Null-text Inversion, section 3.1 (arXiv 2211.09794); agrees with diffusers' `DDIMInverseScheduler`.

    Args:
        pipe: a pipeline of Stable Diffusion 1, 2 or XL.
        latents: ``(1, C, h, w)``, the picture as the autoencoder's scaled latents.
        prompt: that describes it.
        prompt_embeds: ``(1, L, D)``, instead of encoding ``prompt``.
        num_inference_steps: ``N``, on the timesteps that the pipeline's scheduler sets.
        callback: called with each step when its network call is over.

    Raises:
        ValueError: latents of another shape, or neither prompt nor embeddings.
        UnsupportedModelError: the pipeline or its scheduler is of another kind.
    """
    text_encoders(pipe)  # refuses other families
    if latents.ndim != 4 or len(latents) != 1 or latents.shape[1] != pipe.unet.config.in_channels:
        expected = f"(1, {pipe.unet.config.in_channels}, height, width)"
        raise ValueError(
            f"latents have the shape {tuple(latents.shape)}; one picture is inverted at a time: {expected}."
        )
    if is_xl(pipe) and prompt is None:
        raise ValueError("prompt is None; SDXL takes pooled embeddings too, which are made of the prompt: give it.")
    text = None if prompt is None else encode(pipe, [prompt])
    if prompt_embeds is not None:
        pooled = None if text is None else text.pooled
        text = Conditioning(prompt_embeds.to(device_of(pipe)), pooled)
    if text is None:
        raise ValueError("there is neither a prompt nor prompt_embeds; give the text that describes the picture.")
    path = DdimPath(pipe.scheduler, num_inference_steps)
    network = Network(pipe, size_of(latents))
    levels = [latents.to(text.embeds.device, torch.float32)]
    with stage(network) as cost, progress(pipe, len(path), "inversion") as bar:
        for step in reversed(range(len(path))):
            output = network(levels[-1], path.timesteps[step], text)
            levels.append(path.up(step, output, levels[-1]))
            if callback is not None:
                callback(step)
            bar.update()
    return Inversion(
        latents=torch.stack(levels),
        timesteps=torch.tensor(path.timesteps),
        prompt=prompt,
        prompt_embeds=text.embeds,
        settings={"ddim": {"num_inference_steps": num_inference_steps}},
        cost={"ddim": cost},
        model=fingerprint(pipe),
    )


def direct_inversion(pipe: Any, inversion: Inversion) -> Inversion:
    """Have the source put back on its latents after each step of sampling, which ends at the picture exactly.

    Nothing is optimised. Source: Direct Inversion, algorithm 1; arXiv 2310.01506.

    Raises:
        DiffusionAttnError: the inversion is of another model.
    """
    inversion.check(pipe)
    return replace(inversion, direct=True)
