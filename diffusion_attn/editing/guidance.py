"""What an image adapter is told about a picture that does not exist yet."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F


def image_guidance_embeds(
    image_embeds: torch.Tensor,
    source_text_embeds: torch.Tensor,
    target_text_embeds: torch.Tensor,
    layout: Literal["contrastive", "per_branch"] = "contrastive",
) -> torch.Tensor:
    """Embeddings of the source ``f`` and of its edit, ``f_edit = f + target - source``, for an IP-Adapter.

    Both text embeddings are brought to the length of ``f`` first. Source: ViMAEdit, CLIP-based target image embedding
    estimation; arXiv 2410.10496.

    Args:
        image_embeds: ``(1, D)``, the projected CLIP embedding of the source image, not normalised.
        source_text_embeds: ``(1, D)``, the projected embedding of its prompt by the same CLIP.
        target_text_embeds: ``(1, D)``, that of the target's prompt.
        layout: of the rows. ``"contrastive"``, what the published code hands over, is ``[0, f, 0, f_edit]``, so that
            guidance pushes the target from ``f`` to ``f_edit`` and the source sees no image; ``"per_branch"`` is
            ``[0, 0, f, f_edit]``, so that each branch has its own.

    Returns:
        ``(4, 1, D)`` in the dtype of ``image_embeds``: ``[uncond source, uncond target, cond source, cond target]``.

    Raises:
        ValueError: an embedding is not ``(1, D)``, or ``layout`` is unknown.
    """
    shapes = [tuple(x.shape) for x in (image_embeds, source_text_embeds, target_text_embeds)]
    if len(shapes[0]) != 2 or shapes[0][0] != 1 or len(set(shapes)) != 1:
        raise ValueError(
            f"image_embeds, source_text_embeds, target_text_embeds have the shapes {shapes}: expected three of (1, D), "
            "projected by one CLIP."
        )
    if layout not in ("contrastive", "per_branch"):
        raise ValueError(f"layout={layout!r}: expected 'contrastive' or 'per_branch'.")
    f = image_embeds.to(torch.promote_types(image_embeds.dtype, torch.float32))
    source, target = (F.normalize(x.to(f), dim=-1) * f.norm() for x in (source_text_embeds, target_text_embeds))
    edited, zeros = f + (target - source), torch.zeros_like(f)
    rows = [zeros, f, zeros, edited] if layout == "contrastive" else [zeros, zeros, f, edited]
    return torch.stack(rows).to(image_embeds.dtype)
