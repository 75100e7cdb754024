"""Window attention against a dense float64 reference and its own identities."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion_attn as da
from diffusion_attn.ops.window_attention import inverse_order, window_order


def tensors(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def reference(q, k, v, grid, windows, shift):
    """Dense softmax attention under the mask of who shares a window with whom."""
    (height, width), (rows, columns) = grid, windows
    y = (torch.arange(height) - shift[0]) % height // (height // rows)
    x = (torch.arange(width) - shift[1]) % width // (width // columns)
    window = (y[:, None] * columns + x).flatten()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=window[:, None] == window)


grids = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(-5, 9), st.integers(-5, 9), st.integers(1, 2), st.integers(1, 3))
def test_equals_the_dense_reference_in_values_and_gradients(shape, dy, dx, batch, heads):
    rows, columns, high, wide = shape
    grid, windows = (rows * high, columns * wide), (rows, columns)
    inputs = [x.requires_grad_() for x in tensors(batch, heads, grid[0] * grid[1], 4)]
    outputs = [
        attention(*inputs, grid, windows, (dy, dx))
        for attention in (
            reference,
            lambda q, k, v, g, w, s: da.ops.window_attention(q, k, v, grid=g, windows=w, shift=s),
        )
    ]
    torch.testing.assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in outputs]
    torch.testing.assert_close(*gradients)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_one_window_is_full_attention(height, width, dy, dx):
    q, k, v = tensors(2, 2, height * width, 8)
    out = da.ops.window_attention(q, k, v, grid=(height, width), windows=(1, 1), shift=(dy, dx))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_order_is_a_permutation_that_its_inverse_undoes():
    order = window_order((6, 8), (2, 2), (1, 3))
    x = torch.randn(48)
    assert torch.equal(x[order][inverse_order(order)], x)
    assert order[:4].tolist() == [11, 12, 13, 14]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    q, k, v = tensors(1, 2, 64, 8, dtype=dtype)
    out = da.ops.window_attention(q, k, v, grid=(8, 8), shift=(2, 2))
    assert out.dtype == dtype
    exact = da.ops.window_attention(q.double(), k.double(), v.double(), grid=(8, 8), shift=(2, 2))
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


def test_cost_is_a_quarter_of_full_attention():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (torch.empty(1, 2, 1024, 8, device="meta") for _ in range(3))
    counts = []
    for windows in ((1, 1), (2, 2)):
        with FlopCounterMode(display=False) as counter:
            da.ops.window_attention(q, k, v, grid=(32, 32), windows=windows)
        counts.append(counter.get_total_flops())
    assert counts[0] == 4 * counts[1] > 0


@pytest.mark.parametrize(
    ("grid", "windows", "says"),
    [((4, 5), (2, 2), "does not divide"), ((4, 4), (0, 2), "does not divide"), ((3, 4), (1, 1), "holds 12 tokens")],
)
def test_grids_that_do_not_fit(grid, windows, says):
    tokens = 20 if grid == (4, 5) else 16
    q, k, v = tensors(1, 1, tokens, 4)
    with pytest.raises(da.GridError, match=says):
        da.ops.window_attention(q, k, v, grid=grid, windows=windows)


def test_keys_of_another_length_are_refused():
    q, k, v = tensors(1, 1, 16, 4)
    with pytest.raises(da.GridError, match="have 16, 8 and 8"):
        da.ops.window_attention(q, k[:, :, :8], v[:, :, :8], grid=(4, 4))
