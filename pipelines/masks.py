"""Where an edit may change a picture, and where it may add noise: of words, of a user, or of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.editing.edit_area import EditArea
from diffusion_attn.editing.layers import size_of


class EditMasks:
    """Where targets may differ from their sources and where noise is added, as it is known at a step.

    Args:
        area: of the words, if there are any.
        painted: of the user: instead of the words', or cut out of it.
        worded: whether each pair has words; without, it may change everywhere, and no noise is added.
        thresholds: for blending, and for noise.
        latents: of all pairs.

    Attributes:
        blend, variance: ``(pairs, 1, h, w)`` of 0 to 1, ``None`` before the first step that uses masks.
    """

    def __init__(
        self,
        area: EditArea | None,
        painted: torch.Tensor | None,
        worded: Sequence[bool],
        thresholds: tuple[float, float | None],
        latents: torch.Tensor,
    ) -> None:
        self.area, self.thresholds, self.size = area, thresholds, size_of(latents)
        # A cell is as much in a mask as any of its pixels.
        self.painted = None if painted is None else F.adaptive_max_pool2d(painted.to(latents.device), self.size)
        self.worded = torch.tensor(worded, device=latents.device)[:, None, None, None]
        self.blend: torch.Tensor | None = None
        self.variance: torch.Tensor | None = None

    def update(self) -> None:
        """After a forward pass.

        Raises:
            DiffusionAttnError: there is nothing that may change.
        """
        blend = variance = torch.ones(len(self.worded), 1, *self.size, device=self.worded.device)
        least, strong = self.thresholds
        if self.area is not None:
            self.area.update()
            blend = (self.area.mask(least, self.size) | ~self.worded).float()
            if strong is not None:
                core = self.area.mask(strong, self.size)
                variance = (core & self.worded if self.painted is None else core | ~self.worded).float()
        if self.painted is not None:
            blend, variance = blend * self.painted, variance * self.painted
        if not bool(blend.flatten(1).any(1).all()):
            raise DiffusionAttnError(
                "there is nothing that may change: blend_words attend to every part of the picture alike, or only "
                "outside of edit_mask; name other words, or give edit_mask alone."
            )
        self.blend, self.variance = blend, None if strong is None else variance


def painted_mask(mask: Any, pairs: int) -> torch.Tensor:
    """A mask of a user as ``(1 or pairs, 1, h, w)`` float32.

    Args:
        mask: a PIL picture, an array or a tensor, ``(h, w)`` or ``(1 or pairs, 1, h, w)``, bool or 0 to 1.
        pairs: that are edited.

    Raises:
        ValueError: it is not that, or empty.
    """
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"), np.float32) / 255
    mask = torch.as_tensor(mask, dtype=torch.float32)
    mask = mask[None, None] if mask.ndim == 2 else mask
    if mask.ndim != 4 or len(mask) not in (1, pairs) or mask.shape[1] != 1:
        raise ValueError(f"edit_mask has the shape {tuple(mask.shape)}; give (h, w) or ({pairs}, 1, h, w).")
    if not (mask.min() >= 0 and mask.max() <= 1) or not mask.any():
        raise ValueError(
            f"edit_mask runs from {float(mask.min()):g} to {float(mask.max()):g}; give bool, or numbers of 0 to 1 "
            "that are not all 0."
        )
    return mask
