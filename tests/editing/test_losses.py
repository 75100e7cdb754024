"""Losses on attention maps: the official code's numbers and gradients, and what must hold for any map."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_attn.editing import losses
from tests.editing.golden import DPL, drawn
from tests.golden.seeded import seeded_tensor


def some_maps(*shape, gain=2.0, name="maps"):
    return (gain * seeded_tensor(name, shape)).softmax(-1)


def gradient_of(loss, maps):
    """The loss of maps that want a gradient, and that gradient."""
    maps = maps.clone().requires_grad_()
    value = loss(maps)
    value.backward()
    return value.detach(), maps.grad


MASKS = {
    "mask_similarity": losses.mask_similarity,
    "mask_overlap": losses.mask_overlap,
    "box_similarity": losses.box_similarity,
}
ALL = {
    "balancing": losses.attention_balancing,
    "disjoint": losses.disjoint_objects,
    "leakage": lambda maps, tokens: losses.background_leakage(maps, tokens, disc(*maps.shape[:2])),
    **{
        name: lambda maps, tokens, loss=loss: loss(maps, tokens, disc(*maps.shape[:2]).repeat(len(tokens), 1, 1))
        for name, loss in MASKS.items()
    },
    "adjective": lambda maps, tokens: losses.adjective_binding(maps, tokens, [token + 1 for token in tokens]),
}
any_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)


def disc(height, width):
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return rows**2 + columns**2 < 0.5


# ---- the official code's numbers


@DPL.named("smoothing")
def test_smoothing(name):
    impulse = torch.zeros(1, 5, 5)
    impulse[0, 2, 2] = 1
    DPL.close(losses._smooth(impulse)[0, 1:4, 1:4], name, "kernel")
    DPL.close(losses._smooth(drawn(DPL.cases[name]["inputs"]["map"])[None])[0], name, "smoothed")


def compare(name, loss):
    """A loss and its gradient in the columns of the nouns."""
    case = DPL.cases[name]
    value, grad = gradient_of(loss, drawn(case["inputs"]["maps"]))
    DPL.close(value, name, "loss")
    DPL.close(grad[..., case["params"]["token_indices"]], name, "grad_token_columns")


@DPL.named("balance")
def test_attention_balancing(name):
    params = DPL.cases[name]["params"]
    options = {key: params[key] for key in ("smooth", "reduction", "temperature")}
    compare(name, lambda maps: losses.attention_balancing(maps, params["token_indices"], **options))
    maps = drawn(DPL.cases[name]["inputs"]["maps"])
    alone = [losses.attention_balancing(maps, [token], **options) for token in params["token_indices"]]
    DPL.close(1 - torch.stack(alone), name, "max_per_token")


@DPL.named("disjoint")
def test_disjoint_objects(name):
    compare(name, lambda maps: losses.disjoint_objects(maps, DPL.cases[name]["params"]["token_indices"]))


@DPL.named("background_a")
def test_background_leakage(name):
    case = DPL.cases[name]
    tokens, background = case["params"]["token_indices"], drawn(case["inputs"]["mask"])[0]
    compare(name, lambda maps: losses.background_leakage(maps, tokens, background))
    maps = drawn(case["inputs"]["maps"])
    assert losses.background_leakage(maps, tokens, background.bool()) == losses.background_leakage(
        maps, tokens, background
    )


@DPL.named("prior")
def test_given_masks(name):
    case = DPL.cases[name]
    maps, masks = (drawn(case["inputs"][key]) for key in ("maps", "masks"))
    tokens = case["params"]["token_indices"]
    for given_masks in (masks, masks.bool()):
        DPL.close(losses.mask_similarity(maps, tokens, given_masks), name, "similarity")
        DPL.close(losses.box_similarity(maps, tokens, given_masks), name, "box_similarity")
        for form in ("overlap", "box_overlap"):
            DPL.close(losses.mask_overlap(maps, tokens, given_masks), name, form)
    DPL.close(losses.adjective_binding(maps, tokens, case["params"]["adjective_indices"]), name, "adjective")


@DPL.named("thresholds")
def test_threshold(name):
    params = DPL.cases[name]["params"]
    columns = list(zip(params["alpha"], params["beta"], strict=True))
    table = [[losses.threshold(step, *column) for column in columns] for step in range(params["steps"])]
    DPL.close(table, name, "thresholds")


# ---- any map


@any_loss
@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    tokens=st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True),
    gain=st.sampled_from([0.0, 1.0, 300.0]),  # the last: one token takes all of a pixel, and some tokens nothing
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_losses_and_gradients_are_finite_whatever_the_maps(loss, size, tokens, gain, dtype):
    maps = some_maps(*size, 9, gain=gain).to(dtype)
    before = maps.clone()
    value, grad = gradient_of(lambda leaf: loss(leaf, tokens), maps)
    assert value.shape == () and value.dtype == torch.promote_types(dtype, torch.float32)
    assert -1e-5 <= value <= 1 + 1e-5
    assert grad.isfinite().all()
    assert torch.equal(maps, before)


@any_loss
def test_half_precision_changes_little(loss):
    maps = some_maps(5, 5, 9)
    value, grad = gradient_of(lambda leaf: loss(leaf, [1, 3]), maps.half())
    exact, exact_grad = gradient_of(lambda leaf: loss(leaf, [1, 3]), maps.half().double())
    torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad.double(), exact_grad, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_balancing_survives_nouns_that_have_all_attention(smooth, reduction):
    maps = torch.zeros(4, 4, 6)
    maps[:2, :, 1] = maps[2:, :, 3] = 1
    value, grad = gradient_of(
        lambda leaf: losses.attention_balancing(leaf, [1, 3], smooth=smooth, reduction=reduction), maps
    )
    torch.testing.assert_close(value, torch.tensor(0.0), atol=1e-6, rtol=0)
    assert grad.isfinite().all()


def test_balancing_takes_the_worst_noun_or_the_mean():
    maps = some_maps(6, 6, 8)
    alone = torch.stack([losses.attention_balancing(maps, [token]) for token in (1, 3, 4)])
    assert losses.attention_balancing(maps, [1, 3, 4]) == alone.max()
    torch.testing.assert_close(losses.attention_balancing(maps, [1, 3, 4], reduction="mean"), alone.mean())


def test_balancing_does_not_see_the_start_token_and_the_last():
    maps = some_maps(6, 6, 8)
    other = maps * torch.tensor([5.0, *[1] * 6, 5.0])
    assert losses.attention_balancing(maps, [2]) == losses.attention_balancing(other, [2])


def test_one_noun_disturbs_no_other():
    value, grad = gradient_of(lambda maps: losses.disjoint_objects(maps, [2]), some_maps(5, 5, 8))
    assert value == 0 and not grad.any()


def test_what_is_empty_costs_nothing_or_all():
    maps, empty = some_maps(5, 4, 8), torch.zeros(5, 4, dtype=torch.bool)
    for loss, expected in (
        (lambda leaf: losses.background_leakage(leaf, [1, 2], empty), 0.0),
        (lambda leaf: losses.mask_similarity(leaf, [1], empty[None]), 1.0),
        (lambda leaf: losses.mask_overlap(leaf, [1], empty[None]), 1.0),
        (lambda leaf: losses.box_similarity(leaf, [1], ~empty[None]), 0.0),
        (lambda leaf: losses.mask_overlap(leaf, [1], ~empty[None]), 0.0),
    ):
        value, grad = gradient_of(loss, maps)
        torch.testing.assert_close(value, torch.tensor(expected))
        assert grad.isfinite().all()
    gone = maps.clone()
    gone[..., 1] = 0
    assert losses.mask_overlap(gone, [1], ~empty[None]).isfinite()


def test_descending_on_a_loss_mends_what_it_measures():
    """Attention of two nouns in a row of three areas: their own, the other's, the background."""
    background = torch.tensor([[False, False, True]])
    for loss, tokens in (
        (losses.disjoint_objects, [1, 2]),
        (lambda maps, nouns: losses.background_leakage(maps, nouns, background), [1, 2]),
        (lambda maps, nouns: losses.mask_overlap(maps, nouns, ~background.repeat(2, 1, 1)), [1, 2]),
        (lambda maps, nouns: losses.mask_similarity(maps, nouns, ~background.repeat(2, 1, 1)), [1, 2]),
        (lambda maps, nouns: losses.attention_balancing(maps, nouns, smooth=False, temperature=10), [1, 2]),
    ):
        logits = seeded_tensor("logits", (1, 3, 5)).requires_grad_()
        start = loss(logits.softmax(-1), tokens)
        start.backward()
        assert loss((logits - 0.1 * logits.grad).softmax(-1), tokens) < start


# ---- thresholds and errors


def test_a_threshold_falls_by_e_in_alpha_steps():
    assert losses.threshold(0, 25, 0.3) == 0.3
    assert math.isclose(losses.threshold(35, 25, 0.3) * math.e, losses.threshold(10, 25, 0.3))
    with pytest.raises(ValueError, match="alpha=0"):
        losses.threshold(3, 0, 0.3)


@any_loss
@pytest.mark.parametrize("tokens", [[], [9], [-1]])
def test_tokens_are_positions_of_the_maps(loss, tokens):
    with pytest.raises(ValueError, match=r"tokens=.*expected positions from|masks has the shape"):
        loss(some_maps(4, 4, 9), tokens)


@pytest.mark.parametrize("token", [0, 8])
def test_balancing_has_no_value_for_tokens_it_leaves_out(token):
    with pytest.raises(ValueError, match=rf"tokens=\[{token}\].*from 1 to 7"):
        losses.attention_balancing(some_maps(4, 4, 9), [token])


def test_arguments_that_do_not_fit():
    maps = some_maps(4, 5, 9)
    with pytest.raises(ValueError, match=r"background has the shape \(5, 4\): expected \(4, 5\)"):
        losses.background_leakage(maps, [1], torch.ones(5, 4))
    for loss in MASKS.values():
        with pytest.raises(ValueError, match=r"masks has the shape \(1, 4, 5\): expected \(2, 4, 5\)"):
            loss(maps, [1, 2], torch.ones(1, 4, 5))
    with pytest.raises(ValueError, match=r"adjectives=\[1\].*tokens=\[2, 4\]"):
        losses.adjective_binding(maps, [2, 4], [1])
    with pytest.raises(ValueError, match="reduction='sum'"):
        losses.attention_balancing(maps, [1], reduction="sum")
    with pytest.raises(ValueError, match=r"not \(1, 4\); use smooth=False"):
        losses.attention_balancing(some_maps(1, 4, 9), [1])
    assert losses.attention_balancing(some_maps(1, 4, 9), [1], smooth=False) > 0
