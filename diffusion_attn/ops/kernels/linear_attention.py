"""Linear attention in two Triton kernels: q, k, v are read where they lie, nothing but states is written in between.

The first sums partial states over a share of the tokens each, in float32, with the feature map applied as keys are
read; the second applies their sum to the queries. Any head size: it is padded to a power of two inside the kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

_PROGRAMS = 512  # enough to fill a large GPU


def linear_attention_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """`diffusion_attn.ops.linear_attention` on CUDA tensors, differentiable once."""
    return _LinearAttention.apply(q, k, v, eps)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
        state, total = _state(k, v)
        out = _apply(q, state, total, eps, v.shape[-1])
        ctx.save_for_backward(q, k, v, state, total)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cuda", enabled=False)  # the products below are float32 on purpose
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q, k, v, state, total = ctx.saved_tensors
        phi_q, phi_k = (torch.nn.functional.elu(x.float()) + 1 for x in (q, k))
        normaliser = phi_q @ total.unsqueeze(-1) + ctx.eps
        grad_numerator = grad.float() / normaliser
        grad_normaliser = -(grad_numerator * (phi_q @ state) / normaliser).sum(-1, keepdim=True)
        grad_phi_q = grad_numerator @ state.transpose(-1, -2) + grad_normaliser * total.unsqueeze(-2)
        grad_state = phi_q.transpose(-1, -2) @ grad_numerator / k.shape[2]
        grad_total = (grad_normaliser * phi_q).sum(-2, keepdim=True) / k.shape[2]
        grad_phi_k = v.float() @ grad_state.transpose(-1, -2) + grad_total
        # The derivative of phi is 1 above zero and phi itself below.
        grad_q, grad_k = (g * phi.clamp(max=1) for g, phi in ((grad_phi_q, phi_q), (grad_phi_k, phi_k)))
        return grad_q.to(q.dtype), grad_k.to(k.dtype), (phi_k @ grad_state).to(v.dtype), None


def _state(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``S`` ``(batch, heads, head_dim, value_dim)`` and ``z`` ``(batch, heads, head_dim)``, float32 means over keys."""
    batch, heads, tokens, dim = k.shape
    value_dim = v.shape[-1]
    block, tile, launch = _sizes(dim, applying=False)
    tiles = triton.cdiv(value_dim, tile)
    blocks = triton.cdiv(tokens, block)
    splits = max(1, min(blocks, _PROGRAMS // (batch * heads * tiles)))
    share = triton.cdiv(blocks, splits) * block
    splits = triton.cdiv(tokens, share)
    state = torch.empty(splits, batch, heads, dim, value_dim, device=k.device, dtype=torch.float32)
    total = torch.empty(splits, batch, heads, dim, device=k.device, dtype=torch.float32)
    with _device_of(k):
        _state_kernel[(batch * heads, splits, tiles)](
            k, v, state, total, heads, tokens, dim, value_dim, share,
            *k.stride(), *v.stride(), BLOCK=block, DIM=_padded(dim), TILE=tile, **launch,
        )  # fmt: skip
    return state.sum(0) / tokens, total.sum(0) / tokens


def _apply(q: torch.Tensor, state: torch.Tensor, total: torch.Tensor, eps: float, value_dim: int) -> torch.Tensor:
    batch, heads, tokens, dim = q.shape
    # Heads next to each other, so that merging them after attention copies nothing.
    out = q.new_empty(batch, tokens, heads, value_dim).transpose(1, 2)
    block, tile, launch = _sizes(dim, applying=True)
    with _device_of(q):
        # Blocks of tokens come first: only that axis may be longer than 65,535.
        _apply_kernel[(triton.cdiv(tokens, block), batch * heads)](
            q, state, total, out, heads, tokens, dim, value_dim, eps,
            *q.stride(), *out.stride(), BLOCK=block, DIM=_padded(dim), TILE=tile, **launch,
        )  # fmt: skip
    return out


def _sizes(dim: int, applying: bool) -> tuple[int, int, dict[str, int]]:
    """Tokens and value channels that a program holds at a time, and how it is launched.

    Shared memory decides: with a padded head size of 256 (SD 1.5's 160) larger ones do not fit a consumer GPU's 99 KiB.
    """
    if _padded(dim) < 128:
        return 64, 64, {}
    return 32, 32 if applying else 64, {"num_warps": 8, "num_stages": 1}


def _device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, not on its arguments'; compiled code sees to that itself."""
    return nullcontext() if torch.compiler.is_compiling() or not x.is_cuda else torch.cuda.device(x.device)


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def _phi(x):
    x = x.to(tl.float32)
    return tl.where(x > 0, x + 1, tl.exp(x))


# Token counts are not specialised on: a new resolution compiles nothing.
@triton.jit(do_not_specialize=["tokens", "share"])
def _state_kernel(
    k, v, state, total, heads, tokens, dim, value_dim, share,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    BLOCK: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, split, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    d, e = tl.arange(0, DIM), tile * TILE + tl.arange(0, TILE)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    summed = tl.zeros((DIM, TILE), tl.float32)
    counted = tl.zeros((DIM,), tl.float32)
    first = split * share
    for start in range(first, tl.minimum(first + share, tokens), BLOCK):
        n = (start + tl.arange(0, BLOCK)).to(tl.int64)
        here = n < tokens
        keys_mask = here[:, None] & (d < dim)[None, :]
        keys = tl.load(k + n[:, None] * k_n + d[None, :] * k_d, keys_mask, 0.0)
        values = tl.load(v + n[:, None] * v_n + e[None, :] * v_d, here[:, None] & (e < value_dim)[None, :], 0.0)
        phi = tl.where(keys_mask, _phi(keys), 0.0)
        counted += tl.sum(phi, 0)
        summed += tl.dot(tl.trans(phi.to(values.dtype)), values, input_precision="ieee")
    rows = tl.num_programs(0)
    place = (split * rows + row).to(tl.int64)
    mask = (d < dim)[:, None] & (e < value_dim)[None, :]
    tl.store(state + place * dim * value_dim + d[:, None] * value_dim + e[None, :], summed, mask)
    if tile == 0:
        tl.store(total + place * dim + d, counted, d < dim)


@triton.jit(do_not_specialize=["tokens"])
def _apply_kernel(
    q, state, total, out, heads, tokens, dim, value_dim, eps,
    q_b, q_h, q_n, q_d, o_b, o_h, o_n, o_d,
    BLOCK: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    d = tl.arange(0, DIM)
    n = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    here = n < tokens
    queries_mask = here[:, None] & (d < dim)[None, :]
    queries = tl.load(q + batch * q_b + head * q_h + n[:, None] * q_n + d[None, :] * q_d, queries_mask, 0.0)
    phi = tl.where(queries_mask, _phi(queries), 0.0)
    mean = tl.load(total + row * dim + d, d < dim, 0.0)
    normaliser = tl.sum(phi * mean[None, :], 1) + eps
    for start in range(0, value_dim, TILE):
        e = start + tl.arange(0, TILE)
        mask = (d < dim)[:, None] & (e < value_dim)[None, :]
        part = tl.load(state + row * dim * value_dim + d[:, None] * value_dim + e[None, :], mask, 0.0)
        result = tl.dot(phi.to(queries.dtype), part.to(queries.dtype), input_precision="ieee") / normaliser[:, None]
        place = out + batch * o_b + head * o_h + n[:, None] * o_n + e[None, :] * o_d
        tl.store(place, result.to(out.dtype.element_ty), here[:, None] & (e < value_dim)[None, :])
