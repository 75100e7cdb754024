"""Token matching: what must hold for any grid, stride and count."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_attn import GridError
from diffusion_attn.ops import match_tokens
from tests.tiny import noise

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))
STRIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))


def dense_match(metric, grid, stride, count, choice):
    """The definition, one token after another, in float64: the leader of each token."""
    unit = F.normalize(metric.double(), dim=-1)
    into = []
    for i in range(grid[0] // stride[0]):
        for j in range(grid[1] // stride[1]):
            row, column = divmod(int(choice[i, j]), stride[1])
            into.append((i * stride[0] + row) * grid[1] + j * stride[1] + column)
    leader = list(range(len(unit)))
    others = [n for n in leader if n not in into] if into else []
    best = {n: max(into, key=lambda d, n=n: float(unit[n] @ unit[d])) for n in others}
    for n in sorted(others, key=lambda n: -float(unit[n] @ unit[best[n]]))[:count]:
        leader[n] = best[n]
    return torch.tensor(leader)


@settings(max_examples=60, deadline=None)
@given(grid=GRIDS, stride=STRIDES, share=st.floats(0, 1), agent_share=st.floats(0, 1), seed=st.integers(0, 99))
def test_equals_the_definition_on_any_grid(grid, stride, share, agent_share, seed):
    tokens = grid[0] * grid[1]
    metric, x = noise(2, tokens, 6, seed=seed), noise(2, tokens, 3, seed=seed + 1)
    cells = grid[0] // stride[0], grid[1] // stride[1]
    choice = torch.randint(stride[0] * stride[1], cells, generator=torch.Generator().manual_seed(seed))
    counts = int(tokens * share), int(tokens * agent_share)
    match = match_tokens(metric, grid=grid, stride=stride, merge=counts[0], agents=counts[1], cell_choice=choice)
    for count, reduce in zip(counts, (match.merge, match.agents), strict=True):
        got = reduce(x)
        for n in range(2):
            leader = dense_match(metric[n], grid, stride, count, choice)
            means = torch.stack([x[n][leader == position].mean(0) for position in leader.unique()])
            torch.testing.assert_close(got[n], means, atol=1e-6, rtol=1e-5)
    back = match.unmerge(match.merge(x))
    for n in range(2):
        leader = dense_match(metric[n], grid, stride, counts[0], choice)
        torch.testing.assert_close(back[n], torch.stack([x[n][leader == p].mean(0) for p in leader]))


@settings(max_examples=30, deadline=None)
@given(grid=GRIDS, stride=STRIDES, share=st.floats(0, 1))
def test_group_means_times_sizes_are_the_sum_of_all_tokens(grid, stride, share):
    tokens = grid[0] * grid[1]
    x = noise(2, tokens, 5)
    match = match_tokens(noise(2, tokens, 4, seed=1), grid=grid, stride=stride, merge=int(tokens * share))
    sizes = torch.ones(2, tokens, 1) if match.merged is None else F.one_hot(match.merged).sum(1)[..., None]
    torch.testing.assert_close((match.merge(x) * sizes).sum(1), x.sum(1), atol=1e-4, rtol=1e-4)
    merged = match.merge(x)
    torch.testing.assert_close(match.merge(match.unmerge(merged)), merged)


def test_nothing_to_merge_gives_the_very_tensor_back():
    x = noise(1, 12, 4)
    for match in (
        match_tokens(x, grid=(3, 4), stride=(2, 2), merge=0),
        match_tokens(x, grid=(3, 4), stride=(4, 4), merge=6),  # no whole cell
        match_tokens(x, grid=(3, 4), stride=(1, 1), merge=6),  # every token is a destination
    ):
        assert match.merge(x) is x and match.unmerge(x) is x and match.agents(x) is None
    assert match_tokens(x, grid=(3, 4), stride=(1, 1), merge=6, agents=3).agents(x) is x


def test_equal_and_zero_tokens_are_merged_in_raster_order():
    for metric in (torch.ones(1, 16, 4), torch.zeros(1, 16, 4)):
        match = match_tokens(metric, grid=(4, 4), stride=(2, 2), merge=5)
        x = torch.arange(16.0)[None, :, None]
        assert match.merge(x).isfinite().all()
        # Destinations are 0, 2, 8, 10; the first five others are sent to the first of them.
        assert match.merged[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_rows_of_a_batch_are_matched_each_on_its_own():
    metric = noise(3, 36, 8)
    together = match_tokens(metric, grid=(6, 6), stride=(2, 3), merge=14)
    for n in range(3):
        alone = match_tokens(metric[n : n + 1], grid=(6, 6), stride=(2, 3), merge=14)
        assert torch.equal(alone.merged[0], together.merged[n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_means_are_those_of_float32(dtype):
    metric, x = noise(2, 64, 8).to(dtype), (noise(2, 64, 8) * 100).to(dtype)
    match = match_tokens(metric, grid=(8, 8), stride=(4, 4), merge=40)
    assert match.merge(x).dtype == dtype
    assert torch.equal(match.merge(x), match.merge(x.float()).to(dtype))


def test_many_tokens_are_compared_in_parts(monkeypatch):
    metric = noise(2, 144, 8)
    options = {"grid": (12, 12), "stride": (3, 3), "merge": 70}
    whole = match_tokens(metric, **options)
    monkeypatch.setattr(sys.modules["diffusion_attn.ops.match_tokens"], "_SCORES", 100)
    assert torch.equal(match_tokens(metric, **options).merged, whole.merged)


def test_gradients_go_through_merge_and_unmerge():
    x = noise(2, 20, 3).double().requires_grad_()
    match = match_tokens(noise(2, 20, 4), grid=(4, 5), stride=(2, 2), merge=8)
    assert torch.autograd.gradcheck(lambda x: match.unmerge(match.merge(x).sin()), (x,))


def test_compiles_without_a_break():
    torch.compiler.reset()

    def both(metric, x, choice):
        match = match_tokens(metric, grid=(8, 8), stride=(4, 4), merge=25, agents=60, cell_choice=choice)
        return match.unmerge(match.merge(x)), match.agents(x)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    for seed in range(3):
        metric, choice = noise(2, 64, 8, seed=seed), torch.full((2, 2), seed)
        for ours, theirs in zip(both(metric, metric, choice), compiled(metric, metric, choice), strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"grid": (3, 4)}, GridError, "12 tokens"),
        ({"stride": (0, 2)}, ValueError, "stride"),
        ({"merge": -1}, ValueError, "merge=-1"),
        ({"cell_choice": torch.zeros(3, 3, dtype=torch.long)}, ValueError, "cell_choice"),
        ({"cell_choice": torch.zeros(2, 2)}, ValueError, "cell_choice"),
    ],
)
def test_bad_arguments(changes, error, told):
    options = {"grid": (4, 4), "stride": (2, 2), "merge": 3, **changes}
    with pytest.raises(error, match=told):
        match_tokens(noise(1, 16, 4), **options)


def test_another_length_is_refused():
    match = match_tokens(noise(1, 16, 4), grid=(4, 4), stride=(2, 2), merge=3)
    with pytest.raises(GridError, match="1 sequences of 15 tokens"):
        match.merge(noise(1, 15, 4))
    with pytest.raises(GridError, match="of 13; match"):
        match.unmerge(noise(1, 16, 4))
