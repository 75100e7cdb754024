"""What a step of a run costs, without running it: the model's own code and the methods' on tensors without data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.enable import using
from diffusion_attn.core.method import Method
from diffusion_attn.core.session import Session
from diffusion_attn.planning.inputs import call_of
from diffusion_attn.planning.repeats import repeating
from diffusion_attn.planning.tracker import Tracker


@dataclass(frozen=True)
class Forecast:
    """What a forward pass costs.

    Attributes:
        flops: of all products; a multiplication and an addition are two. Over a run: the mean of its steps.
        attention_flops: of those, products of activations with activations (scores, values, states, matchings).
        activation_bytes: the most memory at a time beside weights. Over a run: of its costliest step.
        weight_bytes: of the model and of the methods that bring weights.
    """

    flops: float
    attention_flops: float
    activation_bytes: int
    weight_bytes: int

    @property
    def attention_share(self) -> float:
        """Attention's part of the FLOPs, 0 to 1."""
        return self.attention_flops / self.flops

    @property
    def total_bytes(self) -> int:
        """Weights and activations together."""
        return self.weight_bytes + self.activation_bytes


def forecast(
    denoiser: Any,
    *,
    height: int,
    width: int,
    text_tokens: int,
    batch: int = 2,
    methods: tuple[Method, ...] = (),
    steps: int = 50,
    cpu: bool = False,
) -> Forecast:
    """What a step of a run costs, with methods enabled; nothing is computed, and nothing changed.

    Args:
        denoiser: a UNet2DConditionModel, FluxTransformer2DModel or SD3Transformer2DModel; of one with weights only the
            config and the dtype are read. `on_meta` makes one without.
        height, width: in latent cells.
        text_tokens: of each prompt: 77, 512 for FLUX, 333 for SD3.
        batch: pictures times guidance branches in one call.
        methods: what to enable, as for `diffusion_attn.enable`; of weights they bring only the shapes are read.
        steps: of the run: methods that read the step work differently as it goes on.
        cpu: with what convolutions need there beside their results, see `Tracker`.

    Raises:
        UnsupportedModelError: no plan can be made for the model, or a method does not serve it.
        MethodConflictError, ValueError: methods or the size stand against it, as they would in a run.
    """
    if denoiser.device.type != "meta":
        denoiser = on_meta(type(denoiser), denoiser.config, denoiser.dtype)
    # From the noisiest on; 1000 / steps apart, so that each is told from the next.
    timesteps = torch.arange(steps, 0, -1) * (1000 / steps)
    methods = tuple(map(_without_weights, methods))

    tracker = Tracker(cpu)

    def cost_at(step: int) -> tuple[int, int, int]:
        tracker.reset()
        # Without gradients, as in a run, but not in inference mode, which hides the steps of composed operations.
        with torch.no_grad(), tracker:
            denoiser(**call_of(denoiser, (height, width), batch, text_tokens, float(timesteps[step])))
        return tracker.flops, tracker.attention_flops, tracker.peak

    read_positions = hasattr(denoiser, "pos_embed") and denoiser.pos_embed.register_forward_pre_hook(_without_data)
    try:
        with using(denoiser, *methods, timesteps=timesteps) if methods else nullcontext():
            session = Session.of(denoiser)
            by_step = session is not None and any(on.plan.reads_steps for on in session.enabled.values())
            with repeating(_blocks(denoiser), tracker):
                costs = _over_run(cost_at, steps) if by_step else [cost_at(0)]
    finally:
        if read_positions:
            read_positions.remove()
    flops, attention_flops, peaks = zip(*costs, strict=True)
    own = (getattr(method, "weights", None) for method in methods)
    return Forecast(
        flops=sum(flops) / len(costs),
        attention_flops=sum(attention_flops) / len(costs),
        activation_bytes=max(peaks),
        weight_bytes=weight_bytes(denoiser) + sum(weight_bytes(module) for module in own if module is not None),
    )


def forecast_decode(vae: Any, *, height: int, width: int, tiled: bool = False, cpu: bool = False) -> Forecast:
    """What it costs to decode one picture.

    Args:
        vae: an AutoencoderKL; of one with weights only the config and the dtype are read.
        height, width: in latent cells.
        tiled: as ``vae.enable_tiling()`` does it.
        cpu: with what convolutions need there beside their results, see `Tracker`.
    """
    vae = on_meta(type(vae), vae.config, vae.dtype)
    if tiled:
        vae.enable_tiling()
        for blend in ("blend_v", "blend_h"):  # row by row and in place: it takes no memory, and long to follow
            setattr(vae, blend, lambda before, tile, extent: tile)
    tracker = Tracker(cpu)
    with torch.no_grad(), tracker, repeating([vae.decoder, *_blocks(vae.decoder)], tracker):
        vae.decode(torch.empty(1, vae.config.latent_channels, height, width, device="meta", dtype=vae.dtype))
    return Forecast(tracker.flops, tracker.attention_flops, tracker.peak, weight_bytes(vae))


def on_meta(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A diffusers model of a ``config`` without weights, for inference."""
    with torch.device("meta"):
        model = cls.from_config(config)
    return nn.Module.to(model, dtype).eval()  # the models' own warns of weights, which there are none of


def _over_run(cost_at: Callable[[int], Any], steps: int) -> list[Any]:
    """The cost of each step, from as few as tell: a way of working lasts for a stretch of the run."""
    costs: list[Any] = [None] * steps

    def fill(first: int, last: int) -> None:
        for step in (first, last):
            costs[step] = costs[step] or cost_at(step)
        if costs[first] == costs[last]:
            costs[first:last] = [costs[first]] * (last - first)
        elif last - first > 1:
            fill(first, (first + last) // 2)
            fill((first + last) // 2, last)

    fill(0, steps - 1)
    return costs


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Those that models have many of."""
    lists = [x for name, x in model.named_modules() if name.endswith(("transformer_blocks", "resnets"))]
    return [block for blocks in lists for block in blocks.children()]


def _without_data(module: nn.Module, args: tuple) -> tuple:
    """Positions are real, so that methods can read them; what is computed from them need not be."""
    return tuple(x.to("meta") for x in args)


def _without_weights(method: Any) -> Method:
    """A method whose weights, if it has any, are on the meta device: enabling moves them to where the model is."""
    weights = getattr(method, "weights", None)
    if weights is None:
        return method
    empty = {id(x): nn.Parameter(x.detach().to("meta"), x.requires_grad) for x in weights.parameters()}
    return replace(method, weights=copy.deepcopy(weights, empty).to("meta"))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
