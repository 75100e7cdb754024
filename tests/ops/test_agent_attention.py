"""Agent attention against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_attn import GridError
from diffusion_attn.ops import agent_attention, pool_agents
from tests.tiny import noise


def reference(q, k, v, agents, scale, second, shortcut, bias, second_bias):
    q, k, v, agents = (x.double() for x in (q, k, v, agents))
    values = torch.softmax(scale * agents @ k.transpose(-1, -2) + bias, -1) @ v
    return torch.softmax(second * q @ agents.transpose(-1, -2) + second_bias, -1) @ values + shortcut * v


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 20),
    count=st.integers(1, 9),
    scales=st.tuples(st.floats(0.01, 2), st.floats(0.01, 2)),
    shortcut=st.sampled_from([0.0, 0.075, 1.0]),
)
def test_equals_its_definition_with_gradients(tokens, count, scales, shortcut):
    inputs = [noise(2, 3, n, 4, seed=i).requires_grad_() for i, n in enumerate((tokens, tokens, tokens, count))]
    bias, second_bias = noise(3, count, tokens), noise(3, tokens, count)
    extra = {"scale": scales[0], "second_scale": scales[1], "shortcut": shortcut}
    ours = agent_attention(*inputs, **extra, bias=bias, second_bias=second_bias)
    theirs = reference(*inputs, *scales, shortcut, bias, second_bias).float()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    weights = noise(*ours.shape, seed=9)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_both_scales_default_to_the_usual_one():
    q, k, v, agents = (noise(1, 2, n, 16, seed=n) for n in (10, 11, 12, 3))
    k, v = k[:, :, :9], v[:, :, :9]  # another sequence than the queries'
    torch.testing.assert_close(
        agent_attention(q, k, v, agents), agent_attention(q, k, v, agents, scale=0.25, second_scale=0.25)
    )


def test_one_agent_gives_every_query_the_same():
    q, k, v = (noise(1, 2, 7, 4, seed=i) for i in range(3))
    out = agent_attention(q, k, v, noise(1, 2, 1, 4, seed=3))
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out))


def test_pooled_agents_are_means_of_their_cells():
    q = noise(2, 3, 6 * 8, 4)
    cells = q.unflatten(2, (3, 2, 4, 2)).mean((3, 5)).flatten(2, 3)
    torch.testing.assert_close(pool_agents(q, grid=(6, 8), size=(3, 4)), cells)
    assert pool_agents(q, grid=(6, 8), size=(5, 3)).shape == (2, 3, 15, 4)
    torch.testing.assert_close(pool_agents(q, grid=(6, 8), size=(6, 8)), q)


def test_what_cannot_be_served_is_refused():
    q = noise(1, 1, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"second_bias is torch\.bool"):
        agent_attention(q, q, q, q, second_bias=mask)
    with pytest.raises(ValueError, match=r"shortcut=0\.1"):
        agent_attention(q, q[:, :, :3], q[:, :, :3], q, shortcut=0.1)
    with pytest.raises(GridError, match="holds 6 tokens"):
        pool_agents(q, grid=(2, 3), size=(1, 1))


def test_bfloat16_stays_finite_and_near():
    q, k, v, agents = (noise(2, 2, n, 40, seed=n) for n in (50, 50, 50, 5))
    exact = agent_attention(q, k, v, agents, second_scale=40**-0.15, shortcut=0.075)
    half = agent_attention(*(x.bfloat16() for x in (q, k, v, agents)), second_scale=40**-0.15, shortcut=0.075)
    assert half.dtype == torch.bfloat16 and F.mse_loss(half.float(), exact).sqrt() < 0.01 * exact.std() + 0.01
