"""Exact attention inside windows of a shifted grid (MSW-MSA, HiDiffusion, arXiv 2311.17528)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffusion_attn.core.errors import GridError


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: tuple[int, int],
    windows: tuple[int, int] = (2, 2),
    shift: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Softmax attention of each token over its own window.

    The grid is rolled cyclically by ``-shift``, cut into ``windows``, attended exactly inside each, and rolled back.
    No mask separates what the roll brings together at the seam, as in the paper's modified shifted windows.

    Args:
        q, k, v: ``(batch, heads, tokens, head_dim)``, any float dtype; tokens in raster order of ``grid``.
        grid: ``(height, width)`` in tokens.
        windows: number of windows along ``(height, width)``; ``(1, 1)`` is full attention.
        shift: roll along ``(height, width)`` in tokens.

    Returns:
        ``(batch, heads, tokens, head_dim)`` in the dtype of ``q``.

    Raises:
        GridError: the tokens are not those of ``grid``, or ``grid`` does not divide into ``windows``.
    """
    batch, tokens = q.shape[0], q.shape[2]
    if any(tensor.shape[2] != grid[0] * grid[1] for tensor in (q, k, v)):
        raise GridError(
            f"grid={tuple(grid)} holds {grid[0] * grid[1]} tokens, but q, k, v have {tokens}, {k.shape[2]} and "
            f"{v.shape[2]}; give the (height, width) of the token grid that all three share."
        )
    order = window_order(grid, windows, shift, q.device)
    count = windows[0] * windows[1]

    def split(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, order].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)

    out = F.scaled_dot_product_attention(split(q), split(k), split(v))
    out = out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
    return out[:, :, inverse_order(order)]


def window_order(
    grid: tuple[int, int],
    windows: tuple[int, int] = (2, 2),
    shift: tuple[int, int] = (0, 0),
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The raster positions of the tokens, window after window.

    Args:
        grid, windows, shift: as in `window_attention`.
        device: where the result lives.

    Returns:
        ``(tokens,)`` long; ``x[:, order].unflatten(1, (windows, tokens_per_window))`` partitions ``x``.

    Raises:
        GridError: ``grid`` does not divide into ``windows``.
    """
    (height, width), (rows, columns) = grid, windows
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise GridError(
            f"grid={tuple(grid)} does not divide into windows={tuple(windows)}; resize the grid or choose numbers of "
            "windows that divide its height and width."
        )
    y = (torch.arange(height, device=device) + shift[0]) % height
    x = (torch.arange(width, device=device) + shift[1]) % width
    positions = (y[:, None] * width + x).reshape(rows, height // rows, columns, width // columns)
    return positions.transpose(1, 2).flatten()


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes ``order``, ``(tokens,)`` long."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
