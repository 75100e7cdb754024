"""Masks from attention maps: the official code's numbers, and what must hold for any map."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_attn.editing.grounding import background_mask, kmeans, local_blend_mask, propagate, union_mask
from diffusion_attn.editing.prompts import word_tokens
from tests.editing import tokenizers
from tests.editing.golden import DPL, VIMAEDIT, drawn
from tests.golden.seeded import seeded_tensor


def affinity(batch, pixels, gain=2.0):
    return (gain * seeded_tensor("affinity", (batch, pixels, pixels))).softmax(-1)


def renumbered(labels):
    """By first occurrence: clusters have no order of their own."""
    order = list(dict.fromkeys(labels.tolist()))
    return torch.tensor([order.index(label) for label in labels.tolist()])


# ---- the official code's numbers


@DPL.named("kmeans")
def test_kmeans_of_the_dpl_case(name):
    case = DPL.cases[name]
    region = drawn(case["inputs"]["regions"]).flatten()
    together = (region[:, None] == region).float()
    self_map = (2.0 * together + 0.3 * seeded_tensor("dpl/kmeans/a", (1024, 1024))).softmax(-1)
    params = case["params"]
    labels = kmeans(self_map, params["k"], restarts=params["restarts"], seed=params["seed"])
    assert torch.equal(renumbered(labels).reshape(32, 32), DPL.expected(name, "labels").long())


@DPL.named("background_mask")
def test_background_mask_of_the_dpl_case(name):
    case = DPL.cases[name]
    clusters = drawn(case["inputs"]["clusters"]).flatten()
    self_map = F.normalize((clusters[:, None] == clusters).float(), p=1, dim=1)
    maps = drawn(case["inputs"]["maps"])[..., case["params"]["token_indices"]]
    mask = background_mask(self_map, maps, case["params"]["segments"], case["params"]["threshold"])
    DPL.close(mask, name, "mask32")


@DPL.named("local_blend")
def test_local_blend_of_the_dpl_cases(name):
    case = DPL.cases[name]
    inputs, params = case["inputs"], case["params"]
    # Two heads of the source, then of the target, as many as the rows of the recorded layers.
    layers = torch.stack([drawn(layer) for layer in inputs["layers"]]).unflatten(1, (2, 2))
    maps = layers.mean((0, 2)).unflatten(1, (16, 16))

    def word_maps(words):
        tokens = [
            [token for word in ([row] if isinstance(row, str) else row) for token in word_tokens(prompt, word, CLIP)]
            for prompt, row in zip(params["prompts"], words, strict=True)
        ]
        return torch.stack([maps[row, :, :, found].sum(-1) for row, found in enumerate(tokens)])[:, None]

    latents = drawn(inputs["latents"])
    size = latents.shape[-2:]
    if "subtract_words" in params:
        threshold, other = params["threshold"]
        mask = local_blend_mask(word_maps(params["words"]), threshold, size)
        mask = mask & ~local_blend_mask(word_maps(params["subtract_words"]), other, size, pool=False)
        DPL.close(mask, name, "mask")
    else:
        mask = local_blend_mask(word_maps(params["words"]), params["threshold"], size)
    DPL.close(torch.where(mask, latents, latents[:1]), name, "latents")


CLIP = tokenizers.clip()


@VIMAEDIT.named("grounding")
def test_grounding_of_the_vimaedit_cases(name):
    """Word maps over several calls, both masks and what blending makes of the latents."""
    case = VIMAEDIT.cases[name]
    params, prefix = case["parameters"], name.removeprefix("grounding_")
    tokenizer = tokenizers.pieces(*params["prompts"])
    tokens = [
        word_tokens(prompt, word, tokenizer)
        for prompt, (word,) in zip(params["prompts"], params["blend_words"], strict=True)
    ]

    def maps(kind, call, keys, gain):
        layers = (seeded_tensor(f"{prefix}.{call}.{kind}.{n}", (2, 2, *keys)) for n in range(5))
        return sum((gain * layer).softmax(-1).mean(1) for layer in layers) / 5

    total = torch.zeros(2, 1, 32, 32)
    latents = seeded_tensor(f"{prefix}.latents", (2, 4, 64, 64))
    for call, active in enumerate(params["active"]):
        if not active:
            continue
        cross = maps("cross", call, (256, 77), 4.0)
        words = torch.stack([row[:, found].sum(-1) for row, found in zip(cross, tokens, strict=True)])
        words = F.interpolate(words.reshape(2, 1, 16, 16), size=(32, 32))
        self_map = maps("self", call, (1024, 1024), 6.0)
        total = total + propagate(words, self_map, params["gamma"], params["iterations"])
        VIMAEDIT.close(total, name, f"map_{call}")
    blend, variance = (
        union_mask(total[:1], total[1:], params[f"{kind}_threshold"], (64, 64)) for kind in ("blend", "variance")
    )
    own = union_mask(total[:1], total[:1], params["blend_threshold"], (64, 64))
    VIMAEDIT.close(torch.cat([own, blend]), name, f"blend_mask_{call}")
    VIMAEDIT.close(variance, name, f"variance_mask_{call}")
    VIMAEDIT.close(torch.where(blend, latents[1:], latents[:1])[:, :1], name, "blended_target")


# ---- k-means


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 6), size=st.integers(1, 20), shift=st.sampled_from([0.0, 1e5]), seed=st.integers(0, 9))
def test_kmeans_finds_clouds_that_lie_apart(count, size, shift, seed):
    cloud = torch.arange(count).repeat_interleave(size)[torch.randperm(count * size, generator=torch.manual_seed(seed))]
    points = 10 * torch.eye(6)[cloud] + 0.1 * seeded_tensor("points", (len(cloud), 6)) + shift
    assert torch.equal(renumbered(kmeans(points, count, seed=seed)), renumbered(cloud))


def test_kmeans_draws_from_a_generator_of_its_own():
    points = seeded_tensor("points", (40, 3))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    labels = kmeans(points, 4, restarts=1, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(kmeans(points, 4, restarts=1, seed=5), labels)
    assert not torch.equal(kmeans(points, 4, restarts=1, seed=6), labels)


def test_more_restarts_are_never_worse():
    points = seeded_tensor("points", (60, 2))

    def spread(labels):
        return sum(float((points[labels == n] - points[labels == n].mean(0)).square().sum()) for n in labels.unique())

    spreads = [spread(kmeans(points, 6, restarts=restarts)) for restarts in (1, 4, 16)]
    assert spreads == sorted(spreads, reverse=True) and spreads[0] > spreads[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_kmeans_leaves_clusters_empty_where_points_are_equal_or_few(dtype):
    assert kmeans(torch.ones(7, 3, dtype=dtype), 4).unique().numel() == 1
    labels = kmeans(torch.tensor([[0.0], [0.0], [9.0]], dtype=dtype), 5)
    assert labels[0] == labels[1] != labels[2] and labels.max() < 5


@pytest.mark.parametrize("shape, options, message", [
    ((0, 3), {}, r"points has the shape \(0, 3\)"),
    ((3,), {}, r"points has the shape \(3,\)"),
    ((3, 3), {"clusters": 0}, "clusters=0"),
    ((3, 3), {"restarts": 0}, "restarts=0"),
])  # fmt: skip
def test_kmeans_takes_points(shape, options, message):
    with pytest.raises(ValueError, match=message):
        kmeans(torch.zeros(shape), **options)


# ---- background


def halves(height, width):
    """Self-attention of a left and a right half."""
    side = (torch.arange(width) >= width // 2).repeat(height)
    return F.normalize((side[:, None] == side).float(), p=1, dim=1), side.reshape(height, width)


def test_the_background_is_where_no_noun_is():
    self_map, right = halves(4, 8)
    left_map, right_map = (~right).float(), right.float()
    assert torch.equal(background_mask(self_map, left_map[..., None], 2), right)
    assert not background_mask(self_map, torch.stack([left_map, right_map], -1), 2).any()
    # Maps may be coarser, one noun constant or without any attention.
    coarse = left_map[::2, ::2]
    for other in (torch.zeros_like(coarse), torch.full_like(coarse, 0.3)):
        assert torch.equal(background_mask(self_map, torch.stack([other, coarse], -1), 5), right)


def test_the_threshold_of_the_background_is_on_means_of_map_less_minimum_over_maximum():
    self_map, right = halves(2, 4)
    noun = torch.where(right, 0.4, 0.8)
    noun[0, 0] = 0.2  # left: (0.6 * 3 + 0) / 4 / 0.8, right: 0.2 / 0.8
    assert background_mask(self_map, noun[..., None], 2, threshold=0.24).sum() == 0
    assert torch.equal(background_mask(self_map, noun[..., None], 2, threshold=0.26), right)
    assert background_mask(self_map, noun[..., None], 2, threshold=0.57).all()


@pytest.mark.parametrize("shape", [(4, 3, 1), (3, 3, 1), (4, 8, 0), (4, 8), (8, 16, 1), (0, 4, 1)])
def test_maps_of_sizes_that_do_not_go_together(shape):
    with pytest.raises(ValueError, match=r"self_map \(32, 32\) and cross_maps"):
        background_mask(halves(4, 8)[0], torch.ones(shape))


# ---- propagation


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
    gamma=st.floats(0, 1),
    iterations=st.integers(0, 6),
)
def test_propagation_keeps_the_range_of_values(size, batch, gamma, iterations):
    word_map = seeded_tensor("map", (batch, 1, *size))
    spread = propagate(word_map, affinity(batch, size[0] * size[1]), gamma, iterations)
    assert spread.shape == word_map.shape
    for before, after in zip(word_map, spread, strict=True):
        assert before.min() - 1e-5 <= after.min() and after.max() <= before.max() + 1e-5


def test_propagation_that_keeps_all_or_never_happens_leaves_the_map_alone():
    word_map, between = seeded_tensor("map", (2, 1, 3, 4)), affinity(2, 12)
    before = word_map.clone()
    assert torch.equal(propagate(word_map, between, 1.0, 4), before)
    assert torch.equal(propagate(word_map, between, 0.3, 0), before)
    constant = torch.full((2, 1, 3, 4), 0.7)
    torch.testing.assert_close(propagate(constant, between, 0.3, 5), constant)
    assert torch.equal(word_map, before)


def test_propagation_goes_from_where_a_pixel_attends_to():
    """The first pixel attends to the last alone: it takes that one's value, and not the other way round."""
    between = torch.eye(4)[[3, 1, 2, 3]][None]
    spread = propagate(torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]), between, 0.25, 2)
    assert spread.flatten().tolist() == [0.9375, 0, 0, 1]


def test_propagation_has_gradients_and_takes_half_precision():
    word_map = seeded_tensor("map", (1, 1, 2, 2)).double().requires_grad_()
    between = affinity(1, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: propagate(m, s, 0.5, 3), (word_map, between))
    spread = propagate(word_map.detach().float(), between.detach().half(), 0.5, 3)
    exact = propagate(word_map.detach(), between.detach(), 0.5, 3)
    torch.testing.assert_close(spread, exact.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape, gamma, iterations, message", [
    ((1, 9, 9), 0.5, 1, r"word_map \(1, 1, 2, 2\) and affinity \(1, 9, 9\).*resize"),
    ((2, 4, 4), 0.5, 1, r"affinity \(2, 4, 4\)"),
    ((1, 4, 4), 1.5, 1, "gamma=1.5"),
    ((1, 4, 4), 0.5, -1, "iterations=-1"),
])  # fmt: skip
def test_propagation_takes_what_fits(shape, gamma, iterations, message):
    with pytest.raises(ValueError, match=message):
        propagate(torch.ones(1, 1, 2, 2), torch.ones(shape), gamma, iterations)


# ---- masks


def ramp(*values):
    return torch.tensor(values)[None, None, None]


def test_a_union_takes_each_map_in_its_own_range():
    source, target = ramp(0.0, 1.0, 2.0, 4.0), ramp(1000.0, 900.0, 990.0, 940.0)
    assert union_mask(source, source, 0.5, (1, 4)).flatten().tolist() == [False, False, False, True]
    assert union_mask(source, target, 0.5, (1, 4)).flatten().tolist() == [True, False, True, True]
    enlarged = union_mask(source, target, 0.5, (2, 8))
    assert enlarged.shape == (1, 1, 2, 8) and enlarged.dtype == torch.bool
    assert enlarged[0, 0].tolist() == [[True, True, False, False, True, True, True, True]] * 2


@pytest.mark.parametrize("value", [0.0, 0.3, 7.0])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_constant_map_adds_nothing_to_a_union(value, threshold):
    constant, other = torch.full((1, 1, 3, 3), value), seeded_tensor("map", (1, 1, 3, 3))
    assert not union_mask(constant, constant, threshold, (6, 6)).any()
    alone = union_mask(other, other, threshold, (6, 6))
    assert torch.equal(union_mask(constant, other, threshold, (6, 6)), alone) and alone.any()
    assert torch.equal(union_mask(other, constant, threshold, (6, 6)), alone)


def test_a_blend_mask_is_of_the_pooled_maps_over_their_maxima():
    maps = torch.zeros(3, 1, 5, 5)
    maps[0, 0, 0, 0], maps[1, 0, 4, 4], maps[1, 0, 0, 4] = 0.1, 10, 2.9  # the third row has no word
    source, first, second = local_blend_mask(maps, 0.3, (5, 5))[:, 0]
    corner = torch.zeros(5, 5, dtype=torch.bool)
    corner[:2, :2] = True
    assert torch.equal(source, corner) and torch.equal(second, corner)
    assert torch.equal(first, corner | corner.flip(0, 1))
    assert local_blend_mask(maps, 0.3, (5, 5), pool=False).sum((1, 2, 3)).tolist() == [1, 2, 1]
    assert local_blend_mask(maps, 0.28, (5, 5), pool=False).sum((1, 2, 3)).tolist() == [1, 3, 1]
    assert local_blend_mask(maps, 0.3, (10, 15), pool=False).sum((1, 2, 3)).tolist() == [6, 12, 6]


def test_masks_are_of_maps():
    with pytest.raises(ValueError, match=r"source \(1, 1, 2, 2\) and target \(1, 1, 3, 3\)"):
        union_mask(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3), 0.5, (4, 4))
    with pytest.raises(ValueError, match=r"word_maps has the shape \(2, 3, 3\)"):
        local_blend_mask(torch.ones(2, 3, 3), 0.5, (4, 4))
