"""The autoencoder around denoising: pictures to a pipeline's latents and back, in tiles where they are large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn

from diffusion_attn.core.sizes import Size


@contextmanager
def lifted(vae: Any) -> Iterator[Any]:
    """``vae`` in float32 where half precision overflows in it, for a block of code."""
    lift = vae.dtype == torch.float16 and vae.config.force_upcast
    if lift:
        vae.to(dtype=torch.float32)
    try:
        yield vae
    finally:
        if lift:
            vae.to(dtype=torch.float16)


@contextmanager
def tiled(vae: Any, tile: int | None) -> Iterator[None]:
    """``vae`` works on larger pictures in tiles of ``tile`` pixels, for a block of code; ``None``: as it is set.

    Tiles overlap by a quarter and are blended there, as diffusers does it.

    Raises:
        ValueError: ``tile`` is no multiple of what a latent cell covers, or less than eight of them.
    """
    if tile is None:
        yield
        return
    scale = _scale_of(vae)
    if tile % scale or tile < 8 * scale:
        raise ValueError(f"vae_tile={tile}: expected a multiple of {scale} pixels, {8 * scale} at least.")
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names}
    try:
        for name, value in zip(names, (True, tile, tile // scale), strict=True):
            setattr(vae, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@torch.no_grad()
def encode(pipe: Any, pixels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """The latents that image-to-image pipelines take for a picture: drawn from the posterior, shifted and scaled.

    Args:
        pipe: of Stable Diffusion 1, 2, XL or 3, or FLUX.
        pixels: ``(rows, 3, height, width)``, 0 to 1.
        generator: that latents are drawn with.

    Returns:
        ``(rows, C, h, w)`` in the denoiser's dtype, on the device that the pipeline computes on.
    """
    dtype = pipe.vae.dtype
    with lifted(pipe.vae) as vae, ExitStack() as stack:
        x = (2 * pixels - 1).to(pipe._execution_device, vae.dtype)
        if vae.use_tiling and max(x.shape[-2:]) > vae.tile_sample_min_size:
            small = _fitted(x, vae.tile_sample_min_size, _scale_of(vae))
            stack.enter_context(_normalised_as(vae.encoder, lambda: vae.encode(small)))
        latents = vae.encode(x).latent_dist.sample(generator)
    scale, shift = _scale_and_shift(pipe.vae, latents)
    return ((latents - shift) * scale).to(dtype)


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor, size: Size) -> torch.Tensor:
    """The pictures ``(rows, 3, height, width)``, 0 to 1, of what a pipeline returns as ``output_type="latent"``.

    Args:
        pipe: of Stable Diffusion 1, 2, XL or 3, or FLUX.
        latents: ``(rows, C, h, w)``, or packed as FLUX does it.
        size: height and width in pixels.
    """
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    scale, shift = _scale_and_shift(pipe.vae, latents)
    with lifted(pipe.vae) as vae, ExitStack() as stack:
        z = (latents / scale + shift).to(vae.dtype)
        if vae.use_tiling and max(z.shape[-2:]) > vae.tile_latent_min_size:
            small = _fitted(z, vae.tile_latent_min_size, 1)
            stack.enter_context(_normalised_as(vae.decoder, lambda: vae.decode(small)))
        pixels = vae.decode(z, return_dict=False)[0]
    if getattr(pipe, "safety_checker", None) is not None:
        pixels, flagged = pipe.run_safety_checker(pixels, pixels.device, pipe.unet.dtype)
        pixels[torch.tensor(flagged)] = -1
    return pixels.mul_(0.5).add_(0.5).clamp_(0, 1)


@contextmanager
def _normalised_as(network: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Group norms of ``network`` take the mean and variance that they see during ``run``, for a block of code.

    A tile by itself has others than the whole picture, a plain background above all, and comes out in another
    brightness; a reduced picture has nearly the same. The idea is that of tiled autoencoders in user interfaces.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def record(norm: Any, args: tuple, output: torch.Tensor) -> None:
        groups = args[0].float().unflatten(1, (norm.num_groups, -1)).flatten(2)
        seen[norm] = torch.var_mean(groups, dim=2, correction=0)

    def normalise(norm: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        groups = args[0].float().unflatten(1, (norm.num_groups, -1))
        variance, mean = (x.view(*x.shape, *(1,) * (groups.ndim - 2)) for x in seen[norm])
        x = ((groups - mean) * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
        with align_module_device(norm, x.device):  # what offloads parameters has taken them away again
            shape = (-1, *(1,) * (x.ndim - 2))
            weight, bias = (p.to(x.device).view(shape) for p in (norm.weight, norm.bias))
            return (x * weight + bias).to(output.dtype)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(record).remove)
        run()
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(normalise).remove)
        yield


def _fitted(x: torch.Tensor, longest: int, multiple: int) -> torch.Tensor:
    """``x`` reduced to ``longest`` cells a side at most, by leaving cells out, so that values stay what they are."""
    shrink = longest / max(x.shape[-2:])
    sides = [max(1, round(side * shrink / multiple)) * multiple for side in x.shape[-2:]]
    return F.interpolate(x, sides, mode="nearest-exact")


def _scale_and_shift(vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
    """Latents are ``(z - shift) * scale`` of the autoencoder's ``z``."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        per_channel = [like.new_tensor(x).view(1, -1, 1, 1) for x in (std, mean)]
        return config.scaling_factor / per_channel[0], per_channel[1]
    return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0


def _scale_of(vae: Any) -> int:
    """Pixels of a latent cell's side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
