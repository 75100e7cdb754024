"""The attention of one layer: what a rule makes of queries, keys and values, given where their tokens are."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_attn.core.errors import GridError
from diffusion_attn.methods.clear.rule import Rule
from diffusion_attn.methods.clear.tokens import Tokens
from diffusion_attn.ops.local_attention import local_attention
from diffusion_attn.ops.local_rule import Disc


def attend_tokens(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: Tokens,
    rule: Rule,
    weight: torch.Tensor | None = None,
    exact: Any = None,
) -> torch.Tensor:
    """Local attention after ``rule``, or exact attention where the disc covers the image.

    Args:
        query, key, value: ``(batch, tokens, heads, head_dim)``: text, if the layer has any, then image.
        tokens: where they are.
        rule: what sees what.
        weight: ``spatial_weight`` of the layer; without it pooled keys and values are means.
        exact: diffusers' backend for exact attention; ``None`` for the active one.

    Returns:
        As ``query``.

    Raises:
        GridError: the layer has other tokens than the call.
    """
    image = tokens.grid[0] * tokens.grid[1]
    text = tokens.text if query.shape[1] != image else 0
    if query.shape[1] != text + image:
        raise GridError(
            f"the layer has {query.shape[1]} tokens, and the call has {tokens.text} of text and a grid of "
            f"{tokens.grid[0]} x {tokens.grid[1]}; pass txt_ids and img_ids of all tokens, or disable Clear."
        )
    scale = rule.scale(query.shape[-1], text + image)
    if rule.down_factor == 1 and Disc(tokens.grid, rule.radius).covers:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(query, key, value, scale=scale, backend=exact)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    pooled_key, pooled_value = None, None
    if tokens.cells is not None:
        pooled_key, pooled_value = (_pool(x, tokens.cells + text, weight) for x in (key, value))
    out = local_attention(
        query,
        key,
        value,
        grid=tokens.grid,
        radius=rule.radius,
        text_tokens=text,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        scale=scale,
        backend=rule.backend,
        tiled=tokens.tiled,
    )
    return out.transpose(1, 2)


def _pool(x: torch.Tensor, cells: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Weighted sums of ``(batch, heads, tokens, head_dim)`` over ``cells``, ``(cells, tokens)``."""
    members = x.index_select(2, cells.flatten().to(x.device)).unflatten(2, cells.shape)
    if weight is None:
        return members.mean(dim=3)
    return torch.einsum("bhcwd,w->bhcd", members, weight.flatten().to(x.dtype))


def attend_as_one_operation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: Tokens,
    rule: Rule,
    weight: torch.Tensor | None = None,
    exact: Any = None,
) -> torch.Tensor:
    """`attend_tokens` without gradients, to compilers a single operation whose sizes are data.

    So a block is not compiled anew for every size of picture, as it is where its code reads the size.
    """
    options = rule.radius, rule.down_factor, rule.proportional, rule.backend
    backend = None if exact is None else str(getattr(exact, "value", exact))
    return _operation(query, key, value, tokens.sizes, tokens.cells, weight, *options, backend)


@torch.library.custom_op("diffusion_attn::clear", mutates_args=())
def _operation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: torch.Tensor,
    cells: torch.Tensor | None,
    weight: torch.Tensor | None,
    radius: int,
    down_factor: int,
    proportional: bool,
    backend: str,
    exact: str | None,
) -> torch.Tensor:
    text, height, width, tiled = sizes.tolist()
    tokens = Tokens(text, (height, width), tiled=bool(tiled), cells=cells)
    rule = Rule(radius, down_factor, proportional, backend)  # type: ignore[arg-type]
    return attend_tokens(query, key, value, tokens, rule, weight, exact).contiguous()


@_operation.register_fake
def _(query: torch.Tensor, *args: object) -> torch.Tensor:
    return query.new_empty(query.shape)
