"""Attention inside a disc around each image token, beside text (CLEAR, arXiv 2412.16112, section 3)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from diffusion_attn.core.errors import GridError
from diffusion_attn.ops.local_flex import attend_flex
from diffusion_attn.ops.local_rule import Disc, take_tokens, tile_order
from diffusion_attn.ops.local_tiles import attend_tiles

Backend = Literal["auto", "reference", "tiles", "flex"]


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: tuple[int, int],
    radius: int,
    text_tokens: int = 0,
    pooled_key: torch.Tensor | None = None,
    pooled_value: torch.Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    tiled: bool = False,
) -> torch.Tensor:
    """Softmax attention of image tokens over text, pooled tokens and the image tokens of a disc; of text over all.

    Text tokens come first, then image tokens in raster order. An image token at ``(y, x)`` sees those with
    ``(y - y')^2 + (x - x')^2 < radius^2``: the border cuts the disc off. Text sees text and image, never pooled tokens.

    Args:
        q, k, v: ``(batch, heads, text_tokens + height * width, head_dim)``, any float dtype.
        grid: ``(height, width)`` in image tokens.
        radius: of the disc, in tokens; 1 is the token itself, what reaches over the grid is full attention.
        text_tokens: how many tokens of text there are.
        pooled_key, pooled_value: ``(batch, heads, pooled, head_dim)``, further keys that every image token sees.
        scale: of the scores; by default ``head_dim ** -0.5``.
        backend: ``"reference"``, one call with a dense mask; ``"tiles"``, a call per few tiles of queries over the keys
            around them, on any device and differentiable; ``"flex"``, compiled FlexAttention, no gradients on a CPU;
            ``"auto"``, flex on CUDA, else tiles.
        tiled: the image tokens come in `tile_order` of the grid instead, which spares flex to sort them.

    Returns:
        As ``q``.

    Raises:
        GridError: the tokens are not those of ``text_tokens`` and ``grid``.
        ValueError: a radius below 1, an unknown backend, or pooled keys and values of other shapes.
        RuntimeError: gradients of ``"flex"`` on a CPU, which has none.
    """
    _check(q, k, v, grid, radius, text_tokens, pooled_key, pooled_value, backend)
    disc = Disc((int(grid[0]), int(grid[1])), int(radius))
    if disc.covers and pooled_key is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    image_q, keys, values = q[:, :, text_tokens:], k, v
    if pooled_key is not None and pooled_value is not None:
        keys, values = torch.cat([pooled_key, k], dim=2), torch.cat([pooled_value, v], dim=2)
    seen = keys.shape[2] - image_q.shape[2]
    chosen = choose_backend(q) if backend == "auto" else backend
    if disc.covers:
        image = F.scaled_dot_product_attention(image_q, keys, values, scale=scale)
    elif chosen == "flex":
        image = attend_flex(image_q, keys, values, seen, disc, scale, tiled)
    else:
        order = tile_order(disc.grid, q.device) if tiled else None
        if order is not None:
            place = order.argsort()
            image_q, after = take_tokens(image_q, place), torch.cat([torch.arange(seen, device=q.device), seen + place])
            keys, values = take_tokens(keys, after), take_tokens(values, after)
        attend = _attend_dense if chosen == "reference" else attend_tiles
        image = take_tokens(attend(image_q, keys, values, seen, disc, scale), order)
    if not text_tokens:
        return image
    text = F.scaled_dot_product_attention(q[:, :, :text_tokens], k, v, scale=scale)
    return torch.cat([text, image], dim=2)


def _attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: int, disc: Disc, scale: float | None
) -> torch.Tensor:
    """Image queries over ``seen`` keys and the disc's, under a mask of all pairs."""
    mask = F.pad(disc.mask(q.device), (seen, 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def choose_backend(q: torch.Tensor) -> Backend:
    """What is fast for ``q``; a dense mask never is, not even on grids that a disc nearly covers."""
    if torch.compiler.is_compiling() or not q.is_cuda:
        return "tiles"
    served = q.dtype in (torch.float32, torch.float16, torch.bfloat16) and q.shape[-1] >= 16
    return "flex" if served and find_spec("triton") is not None else "tiles"


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    radius: int,
    text_tokens: int,
    pooled_key: torch.Tensor | None,
    pooled_value: torch.Tensor | None,
    backend: str,
) -> None:
    tokens = text_tokens + grid[0] * grid[1]
    if text_tokens < 0 or min(grid) < 1 or any(x.shape[2] != tokens for x in (q, k, v)):
        raise GridError(
            f"text_tokens={text_tokens} and grid={tuple(grid)} make {tokens} tokens, but q, k, v have {q.shape[2]}, "
            f"{k.shape[2]} and {v.shape[2]}; give the number of text tokens and the (height, width) of the image's."
        )
    if radius < 1:
        raise ValueError(f"radius={radius}: expected 1 or more tokens; 1 is the token itself.")
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(get_args(Backend))}; give one of these.")
    pooled = [x if x is None else tuple(x.shape) for x in (pooled_key, pooled_value)]
    rest = [*q.shape[:2], q.shape[3]]
    if pooled[0] != pooled[1] or (pooled[0] is not None and [*pooled[0][:2], *pooled[0][3:]] != rest):
        raise ValueError(
            f"pooled_key and pooled_value are {pooled[0]} and {pooled[1]}: expected both, of one shape (batch, heads, "
            f"pooled, head_dim) that goes with q, {tuple(q.shape)}; give both or neither."
        )
