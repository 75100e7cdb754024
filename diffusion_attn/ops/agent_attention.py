"""Attention through a few agent tokens (Agent Attention, arXiv 2312.08874, equations 4 and 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffusion_attn.core.errors import GridError


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    *,
    scale: float | None = None,
    second_scale: float | None = None,
    shortcut: float = 0.0,
    bias: torch.Tensor | None = None,
    second_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Agents read from all keys, queries read from the agents: two softmaxes in place of one.

    ``softmax(second_scale * q agents^T + second_bias) softmax(scale * agents k^T + bias) v + shortcut * v``

    The cost grows with ``tokens * agents``. It is another function than softmax attention and equals it in no limit.

    Args:
        q, k, v: ``(batch, heads, tokens, head_dim)``, any float dtype; keys and values may be of another length.
        agents: ``(batch, heads, agent_tokens, head_dim)``, for example from `pool_agents`.
        scale, second_scale: of the logits, ``1 / sqrt(head_dim)`` where not given. AgentSD sharpens the second.
        shortcut: share of ``v`` that is added to the result, which keeps tokens apart; for self-attention.
        bias, second_bias: added to the logits, broadcastable to ``(batch, heads, agent_tokens, tokens)`` and ``(batch,
            heads, tokens, agent_tokens)``. Masks are not served: a key that one query must not see reaches it through
            the agents. Boolean ones are refused; one that is made of minus infinities looks like any other bias.

    Returns:
        ``(batch, heads, tokens, head_dim)`` in the dtype of ``q``.

    Raises:
        ValueError: a bias is a boolean mask, or there is a shortcut between sequences of different lengths.
    """
    for name, given in (("bias", bias), ("second_bias", second_bias)):
        if given is not None and not given.is_floating_point():
            raise ValueError(
                f"{name} is {given.dtype}, a mask: agents read from every key for all queries together, so nothing can "
                "be hidden from one of them; drop it, or use exact attention."
            )
    if shortcut and q.shape[2] != v.shape[2]:
        raise ValueError(
            f"shortcut={shortcut} adds each token's own value, but there are {q.shape[2]} queries and {v.shape[2]} "
            "values; leave it 0 for cross-attention."
        )
    values = F.scaled_dot_product_attention(agents, k, v, attn_mask=bias, scale=scale)
    out = F.scaled_dot_product_attention(q, agents, values, attn_mask=second_bias, scale=second_scale)
    return torch.add(out, v, alpha=shortcut) if shortcut else out


def joint_agent_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, agents: torch.Tensor, *, text_tokens: int
) -> torch.Tensor:
    """Agent attention for text and image in one sequence: text is exact, image sees image through agents.

    Agents read from all keys; an image token reads from the text and the agents under one softmax; a text token reads
    from everything. A proposal of ours for FLUX and SD3, which no paper has trained or evaluated.

    Args:
        q, k, v: ``(batch, heads, tokens, head_dim)``, any float dtype, text tokens first.
        agents: ``(batch, heads, agent_tokens, head_dim)``, positions applied.
        text_tokens: how many tokens of text there are, 0 for none.

    Returns:
        ``(batch, heads, tokens, head_dim)`` in the dtype of ``q``.
    """
    values = F.scaled_dot_product_attention(agents, k, v)
    keys, values = (torch.cat([x[:, :, :text_tokens], y], dim=2) for x, y in ((k, agents), (v, values)))
    image = F.scaled_dot_product_attention(q[:, :, text_tokens:], keys, values)
    if not text_tokens:
        return image
    return torch.cat([F.scaled_dot_product_attention(q[:, :, :text_tokens], k, v), image], dim=2)


def pool_agents(q: torch.Tensor, *, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Agents as adaptive averages of the query map (the paper's section 3.3).

    Args:
        q: ``(batch, heads, tokens, head_dim)``; tokens in raster order of ``grid``.
        grid: ``(height, width)`` in tokens.
        size: ``(height, width)`` of the agents' own grid.

    Returns:
        ``(batch, heads, size[0] * size[1], head_dim)``, in raster order.

    Raises:
        GridError: the tokens are not those of ``grid``.
    """
    if q.shape[2] != grid[0] * grid[1]:
        raise GridError(
            f"grid={tuple(grid)} holds {grid[0] * grid[1]} tokens, but q has {q.shape[2]}; give the (height, width) of "
            "its token grid."
        )
    channels = q.transpose(2, 3).flatten(1, 2).unflatten(2, grid)
    pooled = F.adaptive_avg_pool2d(channels, size)
    return pooled.flatten(2).unflatten(1, (q.shape[1], q.shape[3])).transpose(2, 3)


def position_bias(table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The bias between agents and a grid: a coarse map, resized, plus one term for the row and one for the column.

    As trained vision transformers store it (section 3.4 of the paper). For ``second_bias`` transpose the result's last
    two dimensions.

    Args:
        table: ``(heads, agent_tokens, rows, columns)``, of any size; resized bilinearly.
        rows: ``(heads, agent_tokens, height, 1)``.
        columns: ``(heads, agent_tokens, 1, width)``.

    Returns:
        ``(heads, agent_tokens, height * width)``.
    """
    size = rows.shape[-2], columns.shape[-1]
    return (F.interpolate(table, size=size, mode="bilinear") + rows + columns).flatten(2)
