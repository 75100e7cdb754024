"""What the stages of an inversion share: a progress bar, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from diffusion_attn.editing.network import Network
from diffusion_attn.metrics.cost import measure


@contextmanager
def stage(network: Network) -> Iterator[dict[str, float]]:
    """Measure what runs inside the block: calls of the UNet, seconds, peak memory in bytes; filled in after it."""
    result: dict[str, float] = {}
    with measure(network.device) as cost:
        yield result
    result.update(unet_calls=network.calls, seconds=round(cost.seconds, 3), peak_bytes=cost.peak_bytes)


@contextmanager
def progress(pipe: Any, total: int, name: str, done: int = 0) -> Iterator[tqdm]:
    """A progress bar over ``total`` steps, as the pipeline has been told to show them."""
    with tqdm(total=total, initial=done, **{"desc": name, **getattr(pipe, "_progress_bar_config", {})}) as bar:
        yield bar
