"""How alike two pictures are built, in the eyes of a vision transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.loading import MODEL_ONLY

_SIDE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def self_similarity(keys: torch.Tensor) -> torch.Tensor:
    """The cosines ``(M, M)`` of all pairs of keys ``(M, D)``, heads side by side, of an image transformer's last layer.

    The structure distance is the mean squared difference of two such matrices. Source: Splicing ViT Features, section
    3.2; arXiv 2201.00424.
    """
    keys = torch.nn.functional.normalize(keys.float(), dim=-1, eps=1e-8)
    return keys @ keys.T


class StructureDistance:
    """The mean squared difference of the `self_similarity` of two pictures' keys in the last layer.

    Source: Splicing ViT Features (arXiv 2201.00424), as PIE-Bench computes it: pictures of 0 to 255, normalised as if
    they were of 0 to 1.

    Args:
        name: folder or Hub id of a vision transformer of transformers; PIE-Bench's is ``facebook/dino-vitb8``.
        device: where it computes.

    Raises:
        DiffusionAttnError: it cannot be loaded.
        UnsupportedModelError: it has no keys.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel

        from diffusion_attn.metrics.networks import load

        self.model: Any = load(AutoModel, name, "vision model", **MODEL_ONLY).float().to(device).eval()
        keys = [layer for name, layer in self.model.named_modules() if name.rpartition(".")[2] in ("k_proj", "key")]
        if not keys:
            raise UnsupportedModelError(f"{name!r} has no layer called k_proj or key; give a vision transformer.")
        self._keys = keys[-1]

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, reference: torch.Tensor) -> float:
        """The distance of two pictures ``(3, H, W)`` in 0..1."""
        first, second = (self_similarity(self._seen(x)) for x in (image, reference))
        return float(F.mse_loss(first, second))

    def _seen(self, image: torch.Tensor) -> torch.Tensor:
        """The keys ``(tokens, D)``, class token first."""
        scale = _SIDE / min(image.shape[-2:])
        size = [max(_SIDE, round(side * scale)) for side in image.shape[-2:]]
        mean, std = (torch.tensor(x, device=self.model.device)[:, None, None] for x in (_MEAN, _STD))
        pixels = F.interpolate(image[None].to(self.model.device) * 255, size, mode="bilinear", antialias=True)
        kept: list[torch.Tensor] = []
        handle = self._keys.register_forward_hook(lambda layer, args, keys: kept.append(keys))
        try:
            self.model((pixels - mean) / std, interpolate_pos_encoding=True)
        finally:
            handle.remove()
        return kept[0][0]
