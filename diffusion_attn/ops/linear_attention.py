"""Normalised linear attention: a state of fixed size stands between keys and queries, so cost is linear in tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffusion_attn.ops.kernels import triton_serves
from diffusion_attn.ops.precision import without_autocast

_CHUNK = 1024  # tokens; a chunk of all heads of a large model stays in a core's cache


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, eps: float = 1e-4) -> torch.Tensor:
    """Non-causal linear attention with the feature map ``phi(x) = elu(x) + 1``.

    ``out = phi(q) S / (phi(q) . z + eps)``, with ``S`` the mean over the keys of ``phi(k)^T v`` and ``z`` the mean of
    ``phi(k)``. There is no ``1 / sqrt(head_dim)``, no softmax, and the order of tokens does not matter. Time and memory
    grow linearly with tokens; the state is summed in float32 for 16-bit inputs.

    Args:
        q: ``(batch, heads, tokens, head_dim)``, any float dtype.
        k: ``(batch, heads, key_tokens, head_dim)``.
        v: ``(batch, heads, key_tokens, value_dim)``.
        eps: added to the normaliser, which is a mean and therefore does not grow with tokens.

    Returns:
        ``(batch, heads, tokens, value_dim)`` in the dtype of ``q``.

    Raises:
        ValueError: the shapes do not fit together, or there is no key.

    Source: LinFusion (arXiv 2409.02097), section 3.
    """
    _check(q, k, v)
    if triton_serves(q, k, v):
        from diffusion_attn.ops.kernels.linear_attention import linear_attention_triton

        return linear_attention_triton(q, k, v, eps)
    if torch.compiler.is_compiling():
        with without_autocast(q):  # it would take the state back to 16 bit
            # The compiler fuses the feature map; a loop over chunks would be traced anew for each resolution.
            return linear_attention_reference(q, k, v, eps=eps)
    return attend_to_state(q, state_of(k, v), eps=eps)


def state_of(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What linear attention knows of its keys and values: ``S`` and ``z`` side by side.

    A mean over keys: states of parts of the keys, weighted by their numbers, average to the state of all.

    Args:
        k: ``(batch, heads, key_tokens, head_dim)``, any float dtype.
        v: ``(batch, heads, key_tokens, value_dim)``.

    Returns:
        ``(batch, heads, head_dim, value_dim + 1)``, at least float32.
    """
    with without_autocast(k):
        parts = []
        for keys, values in zip(k.split(_CHUNK, dim=2), v.split(_CHUNK, dim=2), strict=True):
            phi = _features(keys)
            total = phi.sum(dim=2).unsqueeze(-1)
            parts.append(torch.cat([phi.transpose(-1, -2) @ values.to(phi.dtype), total], dim=-1))
        return torch.stack(parts).sum(dim=0) / k.shape[2]


def attend_to_state(q: torch.Tensor, state: torch.Tensor, *, eps: float = 1e-4) -> torch.Tensor:
    """Linear attention of queries ``(batch, heads, tokens, head_dim)`` to the keys behind a state of `state_of`."""
    with without_autocast(q):
        return _in_chunks(q, state, eps)


def _in_chunks(q: torch.Tensor, state: torch.Tensor, eps: float) -> torch.Tensor:
    if torch.is_grad_enabled() and (q.requires_grad or state.requires_grad):
        return torch.cat([_apply(chunk, state, eps) for chunk in q.split(_CHUNK, dim=2)], dim=2)
    out = q.new_empty(*q.shape[:-1], state.shape[-1] - 1)
    for chunk, place in zip(q.split(_CHUNK, dim=2), out.split(_CHUNK, dim=2), strict=True):
        place.copy_(_apply(chunk, state, eps))
    return out


def linear_attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, eps: float = 1e-4) -> torch.Tensor:
    """The formula of `linear_attention` as it reads."""
    phi_q, phi_k = _features(q), _features(k)
    state = phi_k.transpose(-1, -2) @ v.to(phi_k.dtype) / k.shape[2]
    normaliser = phi_q @ phi_k.mean(dim=2).unsqueeze(-1) + eps
    return (phi_q @ state / normaliser).to(q.dtype)


def _features(x: torch.Tensor) -> torch.Tensor:
    """``phi(x)``, in float32 for 16-bit inputs."""
    return F.elu(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).add_(1)


def _apply(q: torch.Tensor, state: torch.Tensor, eps: float) -> torch.Tensor:
    weighted = _features(q) @ state
    return (weighted[..., :-1] / (weighted[..., -1:] + eps)).to(q.dtype)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: expected four dimensions "
            "(batch, heads, tokens, head_dim) each; split the heads first."
        )
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or not k.shape[2]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: expected equal batch and "
            "heads, q and k of one head_dim, k and v of one number of tokens, at least one."
        )
