"""Linear attention against float64, in values and gradients, at any size; its kernels in Triton's interpreter."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import diffusion_attn as da
from diffusion_attn.ops import kernels
from diffusion_attn.ops.linear_attention import _CHUNK, linear_attention_reference


def tensors(batch, heads, tokens, keys, dim, value_dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, dim), (keys, dim), (keys, value_dim))
    # As projections leave them: heads beside each other, so that the op gets strided views.
    return [
        torch.randn(batch, n, heads, d, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for n, d in shapes
    ]


def by_weights(q, k, v, eps):
    """The same with the matrix of weights written out, as for softmax: what the op must never form."""
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2) / k.shape[2]
    return weights @ v / (weights.sum(-1, keepdim=True) + eps)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([1, 7, 63, 100, _CHUNK, _CHUNK + 1]),
    st.sampled_from([1, 2, 77, 100, _CHUNK + 13]),
    st.sampled_from([1, 8, 40]),
    st.sampled_from([5, 8]),
    st.sampled_from([1e-4, 1e-6, 0.1]),
)
def test_equals_the_weights_written_out(batch, heads, tokens, keys, dim, value_dim, eps):
    inputs = [x.requires_grad_() for x in tensors(batch, heads, tokens, keys, dim, value_dim)]
    outputs = [op(*inputs, eps) for op in (by_weights, lambda q, k, v, e: da.ops.linear_attention(q, k, v, eps=e))]
    torch.testing.assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), inputs) for out in outputs))
    with torch.no_grad():
        torch.testing.assert_close(da.ops.linear_attention(*inputs, eps=eps), outputs[0])
        torch.testing.assert_close(linear_attention_reference(*inputs, eps=eps), outputs[0])


def test_order_of_tokens_does_not_matter():
    q, k, v = tensors(1, 2, 50, 60, 8, 8)
    order = torch.randperm(60)
    shuffled = da.ops.linear_attention(q, k[:, :, order], v[:, :, order])
    torch.testing.assert_close(shuffled, da.ops.linear_attention(q, k, v))


def test_keys_that_repeat_change_nothing():
    """The state is a mean: twice the keys give the same, as it must for states averaged over parts of a picture."""
    q, k, v = tensors(1, 2, 50, 60, 8, 8)
    twice = da.ops.linear_attention(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))
    torch.testing.assert_close(twice, da.ops.linear_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_many_tokens(dtype):
    q, k, v = tensors(1, 1, 100_000, 100_000, 40, 40, dtype)
    out = da.ops.linear_attention(q, k, v)
    assert out.dtype == dtype
    exact = da.ops.linear_attention(*(x.double() for x in (q, k, v)))
    # One rounding of the result, and no more: everything between is float32.
    assert (out.double() - exact).abs().max() <= 1.01 * torch.finfo(dtype).eps / 2 * exact.abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_state_in_float32(dtype):
    q, k, v = tensors(1, 1, 16384, 16384, 16, 16, dtype)
    alone = da.ops.linear_attention(q, k, 8 * v)
    with torch.autocast("cpu", dtype):
        assert torch.equal(da.ops.linear_attention(q, k, 8 * v), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_that_attend_to_nothing_give_zero(dtype):
    q, k, v = tensors(1, 1, 4, 9, 8, 8, dtype)
    out = da.ops.linear_attention(torch.full_like(q, -80), k, v)
    assert out.isfinite().all() and out.abs().max() < 1e-6


def test_uninitialised_memory_does_not_show(monkeypatch):
    fill = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: fill(*args, **kwargs).fill_(float("nan")))
    assert da.ops.linear_attention(*tensors(2, 2, _CHUNK + 5, 70, 8, 8)).isfinite().all()


def test_operations_grow_linearly():
    def operations(tokens):
        with FlopCounterMode(display=False) as counter:
            da.ops.linear_attention(*(torch.empty(1, 2, tokens, 16, device="meta") for _ in range(3)))
        return counter.get_total_flops()

    assert operations(8 * _CHUNK) == 2 * operations(4 * _CHUNK) > 0
    assert operations(4 * _CHUNK) < 2.2 * (2 * 2 * 2 * 4 * _CHUNK * 16 * 16)  # two products a head, and the normaliser


def test_no_chunk_needs_more_memory_than_its_share():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    q, k, v = tensors(1, 2, 20 * _CHUNK, 20 * _CHUNK, 8, 8, torch.float32)
    with torch.no_grad(), Largest() as largest:
        da.ops.linear_attention(q, k, v)
    assert largest.elements == q.numel()  # the result itself, nothing as large as tokens x tokens


def test_compiles_whole_and_once_for_all_resolutions():
    torch.compiler.reset()
    compiled = torch.compile(da.ops.linear_attention, backend="eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for tokens in (64, 100, 5000):
        inputs = tensors(1, 2, tokens, tokens, 8, 8)
        torch.testing.assert_close(compiled(*inputs), da.ops.linear_attention(*inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (((2, 3, 8), (2, 3, 8), (2, 3, 8)), "four dimensions"),
        (((1, 2, 3, 8), (1, 2, 3, 4), (1, 2, 3, 8)), "q and k of one head_dim"),
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 4, 8)), "one number of tokens"),
        (((1, 2, 3, 8), (1, 4, 3, 8), (1, 4, 3, 8)), "equal batch and heads"),
        (((1, 2, 3, 8), (1, 2, 0, 8), (1, 2, 0, 8)), "at least one"),
    ],
)
def test_shapes_that_do_not_fit(shapes, says):
    with pytest.raises(ValueError, match=says):
        da.ops.linear_attention(*(torch.zeros(shape) for shape in shapes))


# ---- kernels

INTERPRETED = """
import torch
from diffusion_attn.ops.kernels.linear_attention import linear_attention_triton
from diffusion_attn.ops.linear_attention import linear_attention_reference
from tests.ops.test_linear_attention import tensors
for shape in ((1, 2, 130, 130, 40, 40), (2, 3, 70, 33, 80, 80), (1, 1, 300, 300, 160, 160), (1, 2, 65, 1, 8, 24)):
    inputs = [x.requires_grad_() for x in tensors(*shape, dtype=torch.float32)]
    outputs = [linear_attention_triton(*inputs, 1e-4), linear_attention_reference(*inputs)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), inputs) for out in outputs))
"""


@pytest.mark.skipif(not kernels.TRITON, reason="Triton is not installed, and its interpreter with it")
def test_kernels_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, timeout=200, env=env)


FITTED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffusion_attn.ops.kernels import linear_attention as ours

def compile(kernel, dim, dtype, applying, one):
    block, tile, launch = ours._sizes(dim, applying)
    constants = {"BLOCK": block, "TILE": tile, "DIM": ours._padded(dim), **dict.fromkeys(one, 1)}
    pointers = {name: f"*{dtype}" for name in ("q", "k", "v", "out")} | {"state": "*fp32", "total": "*fp32"}
    types = {name: pointers.get(name, "fp32" if name == "eps" else "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), places)
    return triton.compile(source, target=GPUTarget("cuda", 86, 32), options=launch).metadata.shared

for dim in (40, 64, 80, 160):
    for dtype in ("fp16", "fp32"):
        assert compile(ours._state_kernel, dim, dtype, False, ("k_d", "v_d")) <= 99 * 1024, (dim, dtype)
        assert compile(ours._apply_kernel, dim, dtype, True, ("q_d", "o_d")) <= 99 * 1024, (dim, dtype)
"""


@pytest.mark.skipif(not kernels.TRITON, reason="Triton is not installed, and its compiler with it")
def test_kernels_fit_the_shared_memory_of_consumer_gpus(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", FITTED], check=True, timeout=200, env=env)


@pytest.mark.skipif(not (kernels.TRITON and torch.cuda.is_available()), reason="no CUDA device with Triton here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_on_a_gpu(dtype):
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for dim, tokens in itertools.product((40, 64, 80, 160), (1, 77, 4096, 9217)):
        inputs = [x.cuda() for x in tensors(2, 3, tokens, tokens, dim, dim, dtype)]
        exact = linear_attention_reference(*(x.double() for x in inputs))
        torch.testing.assert_close(da.ops.linear_attention(*inputs).double(), exact, atol=tolerance, rtol=tolerance)
        if dtype is torch.float32:
            inputs = [x.requires_grad_() for x in inputs]
            sums = [op(*inputs).square().sum() for op in (da.ops.linear_attention, linear_attention_reference)]
            torch.testing.assert_close(*(torch.autograd.grad(total, inputs) for total in sums), atol=1e-3, rtol=1e-3)


def test_kernels_leave_other_devices_alone():
    assert not kernels.triton_serves(torch.zeros(1))
