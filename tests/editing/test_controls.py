"""What edits make of attention probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_attn.editing.controls import PromptEdit
from tests.editing import tokenizers
from tests.editing.golden import DPL, VIMAEDIT, drawn
from tests.golden.seeded import seeded_tensor

CLIP = tokenizers.clip()
SOURCE, TARGET = "a cat and a dog", "a squirrel and a dog"


def maps_of(rows, keys=77, queries=16, seed="maps"):
    return seeded_tensor(f"controls/{seed}", (rows, 2, queries, keys)).softmax(-1)


@DPL.named("control")
def test_official_numbers(name):
    case = DPL.cases[name]
    params = case["params"]
    kind = params["kind"].split("+")[0]
    source, *targets = params["prompts"]
    edit = PromptEdit(
        source,
        targets,
        CLIP,
        params["num_steps"],
        edit_type={"reweight": "refine"}.get(kind, kind),
        alignment="reference",
        cross_replace_steps=params["cross_replace_steps"],
        self_replace_steps=params["self_replace_steps"],
        word_weights=dict(params["equalizer"] or []),
        max_queries=params["self_limit"],
    )
    for kind in ("cross", "self"):
        rows = drawn(case["inputs"][kind])
        rows = rows.unflatten(0, (-1, params["heads"]))
        half = len(rows) // 2
        edited = edit.edit(rows[half:], kind=kind, step=params["step"])
        DPL.close(torch.cat([rows[:half], edited]).flatten(0, 1), name, kind)


NAMES = ["control_pub_refine", "control_pub_replace", "control_pub_reweight_replace", "control_pub_reweight_refine"]


@pytest.mark.parametrize("name", NAMES)
def test_official_numbers_with_image_tokens(name):
    params = VIMAEDIT.cases[name]["parameters"]
    source, target = params["prompts"]
    edit = PromptEdit(
        source,
        target,
        tokenizers.pieces(source, target),
        params["num_inference_steps"],
        edit_type=params["kind"].split("_")[-1],
        alignment="reference",
        cross_replace_steps=params["cross_text_replace_steps"],
        self_replace_steps=params["self_replace_steps"],
        image_replace_steps=params["cross_image_replace_steps"],
        word_weights=params.get("equalizer"),
    )
    for step in params["recorded_steps"]:
        for kind, file in {"cross": "text", "self": "self", "image": "image"}.items():
            drawn_map = VIMAEDIT.cases[name]["inputs"][f"{file}_map"]
            key = drawn_map["seeded_tensor"].replace("<step>", str(step))
            maps = (2 * seeded_tensor(key, drawn_map["shape"])).softmax(-1)[2:]
            VIMAEDIT.close(edit.edit(maps, kind=kind, step=step)[1], name, f"{file}_{step}")


@pytest.mark.parametrize("queries", [1024, 1025])
def test_official_limit_of_queries(queries):
    name = f"control_limit_pub{queries}"
    edit = PromptEdit(SOURCE, TARGET, CLIP, 10, image_replace_steps=1.0, max_queries=1024)
    for kind in ("self", "image"):
        drawn_map = VIMAEDIT.cases[name]["inputs"][f"{kind}_map"]
        maps = seeded_tensor(drawn_map["seeded_tensor"], drawn_map["shape"]).softmax(-1)[2:]
        VIMAEDIT.close(edit.edit(maps, kind=kind, step=0)[1].sum(1), name, f"{kind}_target")


def test_equal_prompts_take_the_source_over():
    edit = PromptEdit(SOURCE, SOURCE, CLIP, 10, cross_replace_steps=1)
    maps = maps_of(2)
    torch.testing.assert_close(edit.edit(maps, kind="cross", step=0)[1], maps[0])


@settings(max_examples=30, deadline=None)
@given(
    step=st.integers(0, 9),
    kind=st.sampled_from(["cross", "self", "image"]),
    edit_type=st.sampled_from(["replace", "refine"]),
)
def test_empty_windows_change_nothing(step, kind, edit_type):
    edit = PromptEdit(SOURCE, TARGET, CLIP, 10, edit_type=edit_type, cross_replace_steps=0, self_replace_steps=0)
    maps = maps_of(2)
    assert torch.equal(edit.edit(maps, kind=kind, step=step), maps)


@pytest.mark.parametrize("edit_type", ["replace", "refine"])
def test_the_source_stays_and_swapped_rows_stay_distributions(edit_type):
    targets = [TARGET, "a squirrel and a mouse"]
    edit = PromptEdit(SOURCE, targets, CLIP, 10, edit_type=edit_type, cross_replace_steps=1)
    maps = maps_of(3)
    maps[..., 40:] = 0  # longer words push the last padding out
    maps = maps / maps.sum(-1, keepdim=True)
    edited = edit.edit(maps, kind="cross", step=5)
    assert torch.equal(edited[0], maps[0]) and not torch.equal(edited[1:], maps[1:])
    if edit_type == "replace":
        torch.testing.assert_close(edited.sum(-1), torch.ones(3, 2, 16))


def test_windows_of_self_attention():
    edit = PromptEdit(SOURCE, TARGET, CLIP, 10, self_replace_steps=(0.2, 0.5), image_replace_steps=0.1, max_queries=16)
    maps = maps_of(2, keys=16)
    taken = [step for step in range(10) if torch.equal(edit.edit(maps, kind="self", step=step)[1], maps[0])]
    assert taken == [2, 3, 4]
    assert torch.equal(edit.edit(maps, kind="image", step=0)[1], maps[0])
    large = maps_of(2, keys=17, queries=17)
    assert torch.equal(edit.edit(large, kind="self", step=3), large)


def test_weights_scale_the_words_columns():
    plain = PromptEdit(SOURCE, TARGET, CLIP, 10)
    weighed = PromptEdit(SOURCE, TARGET, CLIP, 10, word_weights={"squirrel": 3.0, "dog": -1.0})
    maps = maps_of(2)
    factors = torch.ones(77)
    factors[[2, 3]], factors[6] = 3.0, -1.0
    torch.testing.assert_close(
        weighed.edit(maps, kind="cross", step=0)[1], plain.edit(maps, kind="cross", step=0)[1] * factors
    )


def test_a_words_own_window_may_be_of_one_target():
    windows = {"default_": 1.0, "mouse": 0.0}
    edit = PromptEdit(SOURCE, [TARGET, "a mouse and a dog"], CLIP, 10, cross_replace_steps=windows)
    maps = maps_of(3)
    edited = edit.edit(maps, kind="cross", step=0)
    assert torch.equal(edited[2][..., 2:3], maps[2][..., 2:3])
    assert not torch.equal(edited[1][..., 4:5], maps[1][..., 4:5])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"edit_type": "swap"}, "'replace', 'refine' or 'auto'"),
        ({"word_weights": {"cow": 2.0}}, "word_weights names 'cow'.*'a squirrel and a dog'"),
        ({"cross_replace_steps": {"default_": 1.0, "cow": 0.2}}, "cross_replace_steps names 'cow'"),
        ({"self_replace_steps": (0.5, 0.2)}, "self_replace_steps"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PromptEdit(SOURCE, TARGET, CLIP, 10, **options)


def test_maps_are_not_changed_in_place_and_gradients_flow():
    edit = PromptEdit(SOURCE, TARGET, CLIP, 10, word_weights={"dog": 2.0})
    maps = maps_of(2).requires_grad_()
    before = maps.detach().clone()
    edit.edit(maps, kind="cross", step=0)[1].sum().backward()
    assert torch.equal(maps, before) and maps.grad[0].abs().sum() > 0
