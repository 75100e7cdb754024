"""What an editing pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput


@dataclass
class EditOutput(BaseOutput):
    """The edits, the source beside them, and where the edit was allowed to change something.

    Attributes:
        images: of the ``T`` targets, in the form that was asked for; latents ``(T, C, h, w)``.
        source: of the source branch, in the same form; latents ``(1, C, h, w)``, or one for
            each pair.
        blend_mask: ``(T, 1, h, w)`` bool, where the last step let the targets differ from the source.
        variance_mask: ``(T, 1, h, w)`` bool, where the last step added noise.
        word_maps: ``(1 + T, 1, H, W)``, of pairs ``(2 T, 1, H, W)``, all sources first: attention to the words
            that steer the masks, summed over the steps.
    """

    images: Any
    source: Any
    blend_mask: torch.Tensor | None = None
    variance_mask: torch.Tensor | None = None
    word_maps: torch.Tensor | None = None
