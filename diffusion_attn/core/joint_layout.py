"""How the transformers of FLUX and Stable Diffusion 3 are laid out: their attention layers, and the grid of a call."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import GridError, UnsupportedModelError

_ATTENTION = re.compile(r"(?:single_)?transformer_blocks\.\d+\.attn2?")
_KWARGS = "joint_attention_kwargs"


def attentions(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(name, attention module)`` of all attention layers of a transformer, in the order of its state dict."""
    for path, module in transformer.named_modules():
        name = path.replace("._orig_mod", "")  # a block may have been replaced by its compiled self
        if _ATTENTION.fullmatch(name) and hasattr(module, "to_q"):
            yield name, module


def hand_on(call: dict[str, Any], **what: Any) -> dict[str, Any]:
    """The arguments of a call, with which every attention processor is given ``what``.

    It goes with the call, not into the model: with gradient checkpointing the backward pass runs layers again, when the
    model may have seen other calls.
    """
    return {**call, _KWARGS: {**(call.get(_KWARGS) or {}), **what}}


def read_grid(ids: torch.Tensor) -> tuple[tuple[int, int], torch.Tensor | None]:
    """Height and width of the grid that FLUX's image ids ``(tokens, 3)`` span, and each token's raster position.

    Positions are ``None`` where they are in raster order. Ids need not be whole numbers, only those of a full grid.

    Raises:
        UnsupportedModelError: there are further images in the sequence (Kontext).
        GridError: the ids do not make one grid.
    """
    images, rows, columns = ids.T
    if (images != images[0]).any():
        raise UnsupportedModelError(
            "img_ids name several images in one sequence, as FLUX Kontext's reference pictures do, and the method "
            "that is enabled serves a single one; disable it for this pipeline."
        )
    (ys, y), (xs, x) = (torch.unique(axis, return_inverse=True) for axis in (rows, columns))
    raster, whole = y * len(xs) + x, torch.arange(len(ids), device=ids.device)
    if len(ys) * len(xs) == len(ids) and torch.equal(raster.sort()[0], whole):
        return (len(ys), len(xs)), None if torch.equal(raster, whole) else raster
    # bfloat16 has no odd numbers above 256: ids of larger grids repeat, but never fall from one token to the next.
    width = int((rows == rows[0]).sum())
    if len(ids) % width == 0:
        lines, places = rows.view(-1, width), columns.view(-1, width)
        steps = (lines[:, 0].diff(), places[0].diff())
        below = (lines[:-1, 0].abs() < 256, places[0, :-1].abs() < 256)
        rising = all(((step > 0) | ((step == 0) & ~low)).all() for step, low in zip(steps, below, strict=True))
        if rising and (lines == lines[:, :1]).all() and (places == places[:1]).all():
            return (len(ids) // width, width), None
    raise GridError(
        f"img_ids has {len(ids)} tokens in {len(ys)} rows and {len(xs)} columns, which is not one full grid; give an "
        "id (0, row, column) for every cell, as the pipelines do, or disable the method."
    )
