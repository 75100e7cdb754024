"""Local attention: the published numbers, who sees whom, and how much work that is."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import diffusion_attn as da
from diffusion_attn.ops.local_flex import plan_blocks, visited_blocks
from diffusion_attn.ops.local_rule import TILE, Disc, tile_order
from diffusion_attn.ops.local_tiles import plan_tiles
from tests.golden.seeded import seeded_tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "clear"
KERNELS = [case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"] if case["kind"] == "kernel"]
CPU = torch.device("cpu")


def tensors(tokens, batch=1, heads=2, dim=8, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64) for _ in range(count)]


def reference(q, k, v, grid, radius, text, pooled_key=None, pooled_value=None, scale=None):
    """The rule of the paper, written out pair by pair."""
    height, width = grid
    image = torch.tensor([[y, x] for y in range(height) for x in range(width)])
    near = (image[:, None] - image).square().sum(-1) < radius**2
    mask = torch.ones(text + len(image), text + len(image), dtype=torch.bool)
    mask[text:, text:] = near
    if pooled_key is not None:
        k, v = torch.cat([k, pooled_key], 2), torch.cat([v, pooled_value], 2)
        mask = F.pad(mask, (0, pooled_key.shape[2]), value=True)
        mask[:text, -pooled_key.shape[2] :] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case["name"])
@pytest.mark.parametrize("backend", ["auto", "reference", "tiles", "flex"])
def test_published_numbers(case, backend):
    q, k, v = (seeded_tensor(x["name"], x["shape"]) for x in case["inputs"].values())
    out = da.ops.local_attention(
        q, k, v, grid=tuple(case["grid"]), radius=case["radius"], text_tokens=case["text_tokens"], backend=backend
    )
    expected = load_file(GOLDEN / "outputs.safetensors")[case["outputs"]["output"]["key"]]
    torch.testing.assert_close(out, expected, **case["tolerance"])


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case["name"])
def test_published_numbers_of_pairs(case):
    text, image = case["text_tokens"], case["grid"][0] * case["grid"][1]
    pairs = int(Disc(tuple(case["grid"]), case["radius"]).mask().sum())
    assert pairs + image * text + text * (text + image) == case["attended_pairs"]


grids = st.tuples(st.integers(1, 40), st.integers(1, 40)).filter(lambda grid: grid[0] * grid[1] <= 700)


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 45), st.integers(0, 5), st.integers(0, 3), st.integers(1, 2))
def test_tiles_are_the_rule_in_values_and_gradients(grid, radius, text, pooled, batch):
    tokens = text + grid[0] * grid[1]
    inputs = [x.requires_grad_() for x in tensors(tokens, batch, dim=4)]
    extra = [x.requires_grad_() for x in tensors(pooled, batch, dim=4, seed=1, count=2)] if pooled else [None, None]
    outputs = [
        reference(*inputs, grid, radius, text, *extra, 0.3),
        da.ops.local_attention(
            *inputs,
            grid=grid,
            radius=radius,
            text_tokens=text,
            pooled_key=extra[0],
            pooled_value=extra[1],
            scale=0.3,
            backend="tiles",
        ),
    ]
    torch.testing.assert_close(*outputs)
    weight = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    learned = [*inputs, *(x for x in extra if x is not None)]
    torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), learned) for out in outputs))


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 45))
def test_tiles_compute_each_query_once_and_no_key_that_none_of_them_sees(grid, radius):
    disc = Disc(grid, radius)
    groups, *_ = plan_tiles(disc, CPU)
    mask, seen = disc.mask(), torch.zeros(grid[0] * grid[1], dtype=torch.long)
    for group in groups:
        for queries, start in zip(group.queries, group.starts, strict=True):
            keys = start + group.offsets
            rule = mask[queries][:, keys]
            assert torch.equal(rule, torch.ones_like(rule) if group.mask is None else group.mask)
            assert rule.any(0).all() and rule.sum() == mask[queries].sum()
            seen[queries] += 1
    assert (seen == 1).all()


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 45), st.integers(0, 70), st.booleans())
def test_blocks_are_the_rule(grid, radius, everybody, tiled):
    """Whole blocks, and partial ones under FlexAttention's own mask, against the pairs of the disc."""
    layout = plan_blocks(Disc(grid, radius), everybody, CPU, tiled)
    tokens = tile_order(grid) if tiled else torch.arange(grid[0] * grid[1])
    assert (layout.order is None) == (tiled and not (grid[0] % TILE[0] or grid[1] % TILE[1]))
    order, place = (torch.arange(len(tokens)) if x is None else x for x in (layout.order, layout.place))
    rows, columns = layout.mask.seq_lengths
    query, key = torch.arange(rows)[:, None], torch.arange(columns)

    def pairs(counts, indices):
        blocks = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for row, (count, found) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            blocks[row, found[:count].long()] = True
        size = layout.mask.BLOCK_SIZE
        return blocks.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[:rows, :columns]

    whole = pairs(layout.mask.full_kv_num_blocks, layout.mask.full_kv_indices)
    partial = pairs(layout.mask.kv_num_blocks, layout.mask.kv_indices)
    computed = whole | (partial & layout.mask.mask_mod(0, 0, query, key))
    assert not (whole & partial).any()
    slots = len(order)
    assert torch.equal(computed[place][:, place], Disc(grid, radius).mask()[tokens][:, tokens])
    empty = torch.ones(slots, dtype=torch.bool)
    empty[place] = False
    assert not computed[place][:, :slots][:, empty].any()
    assert computed[:, slots : slots + everybody].all() and not computed[:, slots + everybody :].any()
    assert torch.equal(order[place], torch.arange(len(tokens)))


@pytest.mark.parametrize("backend", ["reference", "tiles", "flex"])
@pytest.mark.parametrize("grid", [(16, 32), (13, 21)])
def test_tokens_may_come_in_the_order_of_tiles(backend, grid):
    tokens, text = grid[0] * grid[1], 3
    q, k, v = (x.float() for x in tensors(text + tokens, dim=16))
    order = torch.cat([torch.arange(text), text + tile_order(grid)])
    how = {"grid": grid, "radius": 5, "text_tokens": text}
    plain = da.ops.local_attention(q, k, v, backend="reference", **how)
    tiled = da.ops.local_attention(*(x[:, :, order] for x in (q, k, v)), backend=backend, tiled=True, **how)
    torch.testing.assert_close(tiled, plain[:, :, order], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("side", "radius", "ideal", "blocks"),
    [(64, 8, 173.4, 6.88), (64, 16, 633.5, 10.62), (128, 16, 711.3, 12.72), (256, 32, 2873.2, 38.73)],
)
def test_work_is_what_geometry_asks_for(side, radius, ideal, blocks):
    """Mean key blocks of 8 x 16 for a block of queries, and mean disc size: counted once, without this code."""
    disc = Disc((side, side), radius)
    visited, full = visited_blocks(disc, side // TILE[0], side // TILE[1])
    assert visited.float().sum(1).mean().item() == pytest.approx(blocks, abs=0.0051)
    assert len(visited) == side * side // (TILE[0] * TILE[1]) and bool(full.any()) == (radius > 16)
    groups, *_ = plan_tiles(disc, CPU)
    pairs = sum(len(group.starts) * int(group.mask.sum()) for group in groups if group.mask is not None)
    assert pairs / side**2 == pytest.approx(ideal, abs=0.051)


@pytest.mark.parametrize("backend", ["reference", "tiles", "flex"])
def test_pooled_keys_are_for_the_image_only(backend):
    grid, text = (18, 20), 3
    q, k, v = (x.float() for x in tensors(text + 360))
    pooled = [x.float() for x in tensors(70, seed=1, count=2)]
    out = da.ops.local_attention(
        q, k, v, grid=grid, radius=4, text_tokens=text, pooled_key=pooled[0], pooled_value=pooled[1], backend=backend
    )
    torch.testing.assert_close(out, reference(q, k, v, grid, 4, text, *pooled), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference", "tiles", "flex"])
def test_a_disc_over_the_whole_grid_is_full_attention(backend):
    q, k, v = tensors(2 + 35)
    out = da.ops.local_attention(q, k, v, grid=(5, 7), radius=8, text_tokens=2, backend=backend)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", ["reference", "tiles"])
def test_a_radius_of_one_is_the_token_itself(backend):
    q, k, v = tensors(300)
    torch.testing.assert_close(da.ops.local_attention(q, k, v, grid=(15, 20), radius=1, backend=backend), v)


def test_a_token_moves_only_what_sees_it():
    grid, text, radius = (20, 33), 4, 6
    q, k, v = tensors(text + 660)
    place = 7 * 33 + 12
    before = da.ops.local_attention(q, k, v, grid=grid, radius=radius, text_tokens=text, backend="tiles")
    k[:, :, text + place] += 1
    v[:, :, text + place] -= 1
    after = da.ops.local_attention(q, k, v, grid=grid, radius=radius, text_tokens=text, backend="tiles")
    moved = (before != after).any(-1)[0, 0]
    assert moved[:text].all() and torch.equal(moved[text:], Disc(grid, radius).mask()[place])


def test_gradients_after_inference_mode():
    inputs = tensors(660)
    with torch.inference_mode():
        da.ops.local_attention(*inputs, grid=(22, 30), radius=5, backend="tiles")
    learned = [x.requires_grad_() for x in inputs]
    out = da.ops.local_attention(*learned, grid=(22, 30), radius=5, backend="tiles")
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), learned),
        torch.autograd.grad(reference(*learned, (22, 30), 5, 0).sum(), learned),
    )


def test_what_tiles_gather_is_not_kept_for_the_backward_pass():
    q, k, v = (x.requires_grad_() for x in tensors(40 * 48, dim=64))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        da.ops.local_attention(q, k, v, grid=(40, 48), radius=8, backend="tiles")
    assert sum(kept.values()) < 2 * 3 * q.nbytes


@pytest.mark.parametrize("backend", ["reference", "tiles", "flex"])
def test_any_radius_over_the_grid(backend):
    q, k, v, *pooled = (x.float() for x in tensors(35, count=5))
    pooled = [x[:, :, :9] for x in pooled]
    for radius in (9, 16385, 50_000, 2**40):
        out = da.ops.local_attention(
            q, k, v, grid=[5, 7], radius=radius, pooled_key=pooled[0], pooled_value=pooled[1], backend=backend
        )
        torch.testing.assert_close(out, reference(q, k, v, (5, 7), 9, 0, *pooled))


def test_sizes_one_after_the_other_do_not_mix():
    first, second = tensors(660), tensors(400, seed=1)
    runs = [
        da.ops.local_attention(*inputs, grid=grid, radius=5, backend="tiles")
        for inputs, grid in ((first, (20, 33)), (second, (20, 20)), (first, (20, 33)))
    ]
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    q, k, v = tensors(3 + 660)
    half = da.ops.local_attention(
        *(x.to(dtype) for x in (q, k, v)), grid=(20, 33), radius=7, text_tokens=3, backend="tiles"
    )
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), reference(q, k, v, (20, 33), 7, 3), atol=0.03, rtol=0.02)


def test_flex_says_that_it_has_no_gradients_on_a_cpu():
    q, k, v = (x.requires_grad_() for x in tensors(400))
    with pytest.raises(RuntimeError, match="backend='tiles'"):
        da.ops.local_attention(q, k, v, grid=(20, 20), radius=3, backend="flex")


def test_past_what_torch_compiles_flex_tells_the_way_out(monkeypatch):
    def attend(q, k, v, mask, scale):
        return q + 0

    once = torch.compile(attend, backend="eager", dynamic=False, fullgraph=True, recompile_limit=1)
    monkeypatch.setattr("diffusion_attn.ops.local_flex._compiled", lambda: once)
    flex = partial(da.ops.local_attention, radius=3, backend="flex")
    flex(*tensors(400), grid=(20, 20))
    with pytest.raises(da.DiffusionAttnError, match=r"backend='tiles', or call torch\.compiler\.reset"):
        flex(*tensors(1600), grid=(40, 40))
    torch.compiler.reset()
    flex(*tensors(1600), grid=(40, 40))


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"grid": (5, 8)}, da.GridError, r"grid=\(5, 8\) make 42 tokens"),
        ({"text_tokens": -1}, da.GridError, "text_tokens=-1"),
        ({"radius": 0}, ValueError, "radius=0"),
        ({"backend": "dense"}, ValueError, "backend='dense'"),
        ({"pooled_key": torch.zeros(1, 2, 3, 8)}, ValueError, "give both or neither"),
        ({"pooled_key": torch.zeros(1, 1, 3, 8), "pooled_value": torch.zeros(1, 1, 3, 8)}, ValueError, "pooled_key"),
    ],
)
def test_bad_arguments(change, error, expected):
    q, k, v = tensors(2 + 35)
    with pytest.raises(error, match=expected):
        da.ops.local_attention(q, k, v, **{"grid": (5, 7), "radius": 3, "text_tokens": 2, **change})
