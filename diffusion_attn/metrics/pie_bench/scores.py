"""All numbers of an edit, and their means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.metrics.images import as_tensor
from diffusion_attn.metrics.pie_bench.items import Item
from diffusion_attn.metrics.pie_bench.pixels import mse, psnr, ssim
from diffusion_attn.metrics.pie_bench.structure import StructureDistance

COLUMNS = {
    "structure": 1e3,
    "psnr": 1.0,
    "lpips": 1e3,
    "mse": 1e4,
    "ssim": 1e2,
    "clip_whole": 1.0,
    "clip_edited": 1.0,
    "clip_source": 1.0,
}
"""The numbers of PIE-Bench, and what they are multiplied by in print."""

Perceptual = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class EditScorer:
    """The numbers of edits, raw; those whose network is missing are ``nan``.

    Attributes:
        structure: of pictures ``(3, H, W)`` in 0..1.
        lpips: of the same.
        clip: of PIL pictures and prompts, as `ClipScorer`.
    """

    structure: Perceptual | None = None
    lpips: Perceptual | None = None
    clip: Callable[[Sequence[Image.Image], Sequence[str]], list[float]] | None = None

    @classmethod
    def load(
        cls, *, dino: str | None = None, clip: str | None = None, lpips: bool = False, device: Any = "cpu"
    ) -> EditScorer:
        """Load the networks that are named.

        Raises:
            DiffusionAttnError: one cannot be loaded, or torchvision, of which LPIPS has its network, is missing.
        """
        from diffusion_attn.metrics.networks import ClipScorer

        return cls(
            structure=None if dino is None else StructureDistance(dino, device),
            lpips=_lpips(device) if lpips else None,
            clip=None if clip is None else ClipScorer(clip, device),
        )

    @property
    def missing(self) -> list[str]:
        """The columns that are left out."""
        absent = [name for name in ("structure", "lpips") if getattr(self, name) is None]
        return absent + ([name for name in COLUMNS if name.startswith("clip")] if self.clip is None else [])

    def __call__(self, item: Item, edited: Image.Image) -> dict[str, float]:
        """The numbers of ``edited``, a picture of the size of the item's.

        Raises:
            ValueError: it is of another size.
        """
        source = item.image()
        if edited.size != source.size:
            raise ValueError(f"the edit of item {item.name!r} is {edited.size}, and its picture {source.size}.")
        after, before = as_tensor([edited, source]).float() / 255
        mask = item.mask((source.height, source.width))
        rest = 1 - mask
        numbers = dict.fromkeys(COLUMNS, math.nan)
        numbers |= {
            name: number(after, before, rest) for name, number in (("psnr", psnr), ("mse", mse), ("ssim", ssim))
        }
        if self.structure is not None:
            numbers["structure"] = self.structure(after, before)
        if self.lpips is not None and rest.any():
            numbers["lpips"] = self.lpips(after * rest, before * rest)
        if self.clip is not None:
            part = Image.fromarray(((after * mask) * 255).round().byte().permute(1, 2, 0).numpy())
            pictures, prompts = [edited, part, source], [item.target_prompt] * 2 + [item.source_prompt]
            whole, inside, own = self.clip(pictures, prompts)
            numbers |= {"clip_whole": whole, "clip_source": own}
            if mask.any():
                numbers["clip_edited"] = inside
        return numbers


def means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each column in its printed scale, over the rows that have it; ``nan`` where none has.

    Infinite numbers, of pictures that are equal, make the mean infinite.
    """
    rows = list(rows)
    result = {}
    for name, scale in COLUMNS.items():
        values = [row[name] for row in rows if not math.isnan(row[name])]
        result[name] = scale * sum(values) / len(values) if values else math.nan
    return result


def _lpips(device: Any) -> Perceptual:
    if find_spec("torchvision") is None:
        raise DiffusionAttnError("LPIPS takes its network from torchvision, which is not installed; install it.")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        network = LearnedPerceptualImagePatchSimilarity(net_type="squeeze").to(device)
    except OSError as error:
        raise DiffusionAttnError(
            f"LPIPS could not get torchvision's SqueezeNet ({error}); connect once, or leave --lpips out."
        ) from error

    def distance(image: torch.Tensor, reference: torch.Tensor) -> float:
        first, second = (x[None].to(device) * 2 - 1 for x in (image, reference))
        return float(network(first, second))

    return distance
