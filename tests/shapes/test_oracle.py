"""The oracle: it reads what was rendered, refuses what nobody could read, and counts each flaw as what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from diffusion_attn.shapes.captions import CaptionError, caption
from diffusion_attn.shapes.judging import judge, score
from diffusion_attn.shapes.oracle import FoundShape, Reading, read
from diffusion_attn.shapes.renderer import coverage, rasterize, render, rgb
from diffusion_attn.shapes.scenes import COLORS, KINDS, Scene, Shape, sample_scenes

STAR = Shape("star", "red", "large", 0.28, 0.5, 0.2)
RING = Shape("ring", "blue", "small", 0.74, 0.56, 0.125)
ASKED = Scene((STAR, RING), "white", "left of")
PROMPT = "a large red star left of a small blue ring on a white background"


def clean(image: np.ndarray, index: int) -> np.ndarray:
    return image


def noisy(image: np.ndarray, index: int) -> np.ndarray:
    return np.clip(image + np.random.default_rng(index).normal(0, 0.03, image.shape), 0, 1)


def blurred(radius: float):
    def blur(image: np.ndarray, index: int) -> Image.Image:
        return Image.fromarray(np.round(image * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))

    return blur


def noisy_and_blurred(image: np.ndarray, index: int) -> np.ndarray:
    return noisy(np.asarray(blurred(0.6)(image, index), np.float32) / 255, index)


def rounded(image: np.ndarray, index: int) -> np.ndarray:
    """Corners cut and notches filled, edges hard: what an autoencoder does to small shapes."""
    soft = np.asarray(blurred(1.3)(image, index), np.float32) / 255
    ends = image.min((0, 1)), image.max((0, 1))
    return np.clip((soft - sum(ends) / 2) * 2 + sum(ends) / 2, *ends)


def reads_right(scene: Scene, image) -> bool:
    """Whether the judgement is exact and each shape is found where and as large as it was drawn."""
    found = {shape.color: shape for shape in read(image).shapes}
    return judge(image, caption(scene)).exact and all(
        abs(found[shape.color].x - shape.x) < 0.01
        and abs(found[shape.color].y - shape.y) < 0.01
        and abs(found[shape.color].radius - shape.radius) < 0.012
        and (found[shape.color].size == "large") == (shape.radius > 0.16)
        for shape in scene.shapes
    )


def picture(*shapes: Shape, background: str = "white", size: int | tuple[int, int] = 64) -> Image.Image:
    return render(Scene(shapes, background), size)


def circle(color: str, x: float, y: float, radius: float = 0.15) -> Shape:
    return Shape("circle", color, None, x, y, radius)


def counts(image, prompt: str = PROMPT) -> dict:
    """What a judgement reports beyond a perfect match."""
    judgement = judge(image, prompt)
    flaws = ("missing", "extra", "wrong_color", "wrong_shape", "wrong_size")
    found = {name: getattr(judgement, name) for name in flaws if getattr(judgement, name)}
    found |= {name: False for name in ("relation", "background", "readable") if getattr(judgement, name) is False}
    assert judgement.exact == (not found)
    return found


@pytest.mark.parametrize(
    ("size", "count", "spoil"),
    [
        pytest.param(64, 400, clean, id="64"),
        pytest.param(128, 400, clean, id="128"),
        pytest.param(256, 150, clean, id="256"),
        pytest.param(512, 50, clean, id="512"),
        pytest.param(64, 400, noisy, id="64-noise"),
        pytest.param(64, 400, blurred(0.6), id="64-blur"),
        pytest.param(128, 200, blurred(1.2), id="128-blur"),
        pytest.param(64, 200, noisy_and_blurred, id="64-noise-blur"),
        pytest.param((96, 64), 100, clean, id="96x64"),
        pytest.param((64, 160), 100, clean, id="64x160"),
        pytest.param((200, 301), 50, clean, id="200x301"),
    ],
)
def test_held_out_scenes_are_read_right(size, count, spoil):
    scenes = list(sample_scenes(count, 20_000, held_out=True))
    right = [reads_right(scene, spoil(rasterize(scene, size), i)) for i, scene in enumerate(scenes)]
    assert np.mean(right) >= 0.995, [scene for scene, ok in zip(scenes, right, strict=True) if not ok]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", [0.115, 0.2])
def test_rounded_shapes_keep_their_kind(kind, radius):
    shape = Shape(kind, "black", None, 0.43, 0.56, radius)
    (found,) = read(rounded(rasterize(Scene((shape,), "white"), 64), 0)).shapes
    assert (found.kind, found.color) == (kind, "black")
    assert abs(found.radius - radius) < 0.015


def test_all_kinds_of_input_read_alike():
    array = np.asarray(render(ASKED))
    floats = array.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    expected = read(Image.fromarray(array))
    assert expected.readable and len(expected.shapes) == 2
    for image in (array, floats, floats.astype(np.float64), tensor, tensor.double().requires_grad_()):
        assert read(image) == expected
    assert judge(tensor.bfloat16(), PROMPT).exact and judge(tensor.half(), PROMPT).exact
    assert judge(Image.fromarray(array).convert("RGBA"), PROMPT).exact


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("picture.png", TypeError, r"image is a str: expected a PIL image.*PIL\.Image\.open"),
        ([[0.0]], TypeError, "image is a list: expected"),
        (np.zeros((64, 64)), ValueError, r"image has shape \(64, 64\): expected \(height, width, 3\)"),
        (np.zeros((3, 64, 64)), ValueError, r"image has shape \(3, 64, 64\)"),
        (np.zeros((64, 64, 4), np.uint8), ValueError, "drop an alpha channel"),
        (torch.zeros(1, 3, 64, 64), ValueError, r"image has shape \(1, 3, 64, 64\).*one by one"),
        (torch.zeros(64, 64, 3), ValueError, r"image has shape \(64, 64, 3\).*\(3, height, width\)"),
        (np.zeros((64, 64, 3), np.int64), ValueError, "image has dtype int64.*divide by 255"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), ValueError, "image has dtype uint8.*divide by 255"),
        (np.full((64, 64, 3), -1.0), ValueError, r"image has values from -1 to -1.*\(image \+ 1\) / 2"),
        (np.full((64, 64, 3), 255.0), ValueError, r"image has values from 255 to 255: expected 0\.\.1"),
        (np.full((64, 64, 3), np.nan), ValueError, "image has values from nan to nan"),
        (np.zeros((0, 64, 3), np.uint8), ValueError, "image is 64x0 pixels.*at least one pixel"),
    ],
)
def test_other_inputs_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        read(image)


def test_size_divides_midway_between_the_ranges():
    shape = FoundShape("ring", "red", 0.5, 0.5, 0.16, 1.0)
    assert shape.size == "small" and replace(shape, radius=0.165).size == "large"


@pytest.mark.parametrize("color", COLORS)
def test_a_plain_background_is_a_valid_reading(color):
    image = picture(background=color)
    assert read(image) == Reading(color, (), 0.0) and read(image).readable
    other = "red" if color != "red" else "blue"
    assert counts(image, f"a {other} ring on a {color} background") == {"missing": 1}


@pytest.mark.parametrize(("color", "background"), permutations(COLORS, 2))
def test_edges_between_any_two_colours_make_no_phantoms(color, background):
    image = picture(Shape("star", color, None, 0.31, 0.6, 0.2), background=background)
    for spoiled in (image, image.filter(ImageFilter.GaussianBlur(1.0))):
        reading = read(spoiled)
        assert reading.readable and reading.background == background
        assert [(shape.kind, shape.color) for shape in reading.shapes] == [("star", color)]


def half(kind: str, axis: int) -> np.ndarray:
    alpha = coverage(kind, 32, 32, 14, 64, 64)
    alpha[np.s_[:, 32:] if axis else np.s_[32:]] = 0
    return rgb("white") * (1 - alpha[..., None]) + rgb("red") * alpha[..., None]


def two_in_one(distance: float) -> np.ndarray:
    """Two red circles that overlap."""
    return rasterize(Scene((circle("red", 0.5 - distance / 2, 0.5), circle("red", 0.5 + distance / 2, 0.5)), "white"))


def confetti(share: float) -> np.ndarray:
    """Single black pixels, each too small to be anything."""
    return np.where(np.random.default_rng(0).random((64, 64, 1)) < share, 0.0, rgb("white"))


RAMP = np.linspace(0, 1, 64)[None, :, None] * np.ones((64, 1, 1))
UNREADABLE = {
    "grey": np.full((64, 64, 3), 0.5),
    "orange": np.ones((64, 64, 3)) * (0.95, 0.5, 0.1),
    "gradient-white-black": RAMP * np.ones(3),
    "gradient-red-blue": rgb("red") * RAMP + rgb("blue") * (1 - RAMP),
    "two-halves": np.where(RAMP < 0.5, rgb("red"), rgb("blue")),
    "uniform-noise": np.random.default_rng(0).random((64, 64, 3)),
    "noise-on-white": 1 - np.abs(np.random.default_rng(0).normal(0, 0.15, (64, 64, 3))),
    "confetti": confetti(0.03),
    "half-a-circle": half("circle", 0),
    "half-a-square": half("square", 1),
    "half-a-star": half("star", 1),
    "half-a-ring": half("ring", 0),
    "merged": two_in_one(0.2),
    "barely-merged": two_in_one(0.29),
    "pink-shape": rasterize(Scene((circle("white", 0.5, 0.5),), "black")) * (1.0, 0.55, 0.65),
    "faded-shape": rasterize(Scene((circle("red", 0.5, 0.5),), "white")) * 0.5 + 0.5 * rgb("white"),
    "fading-shape": np.asarray(picture(circle("red", 0.5, 0.5, 0.2)).filter(ImageFilter.GaussianBlur(8))) / 255,
    "blob": np.asarray(picture(STAR, RING).filter(ImageFilter.GaussianBlur(4))) / 255,
}


@pytest.mark.parametrize("image", UNREADABLE.values(), ids=UNREADABLE)
def test_what_nobody_can_read_is_unreadable(image):
    image = np.clip(image, 0, 1)
    assert not read(image).readable
    judgement = judge(image, "a red circle on a white background")
    assert not judgement.exact and not judgement.readable


def test_noise_is_never_exact():
    rng = np.random.default_rng(1)
    prompts = [caption(scene) for scene in sample_scenes(120, 1)]
    images = [np.clip(rng.normal(rng.random(), rng.uniform(0.1, 0.6), (64, 64, 3)), 0, 1) for _ in prompts]
    result = score(images, prompts)
    assert result.exact == 0 and result.readable == 0


def test_objects_of_different_colours_that_touch_are_told_apart():
    for one, other, background in permutations(COLORS, 3):
        left, right = Shape("square", one, None, 0.3, 0.5, 0.2), Shape("circle", other, None, 0.67, 0.5, 0.2)
        reading = read(picture(left, right, background=background))
        found = {(shape.kind, shape.color) for shape in reading.shapes}
        assert reading.readable and found == {("square", one), ("circle", other)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_covered_object_is_not_clean(kind):
    hidden = Shape(kind, "red", None, 0.4, 0.5, 0.2)
    cover = Shape("square", "blue", None, 0.6, 0.5, 0.23)
    reading = read(picture(hidden, cover))
    assert not reading.readable
    assert ("square", "blue") in [(shape.kind, shape.color) for shape in reading.shapes]
    assert not any(shape.kind and shape.color == "red" for shape in reading.shapes)
    judgement = judge(picture(hidden, cover), f"a red {kind} left of a blue square on a white background")
    assert not judgement.exact and judgement.asked == 2


FLAWS = {
    "none": ((STAR, RING), {}),
    "wrong-colour": ((replace(STAR, color="green"), RING), {"wrong_color": 1}),
    "wrong-shape": ((replace(STAR, kind="circle"), RING), {"wrong_shape": 1}),
    "wrong-size": ((STAR, replace(RING, radius=0.2)), {"wrong_size": 1}),
    "both-wrong-size": ((replace(STAR, radius=0.12), replace(RING, radius=0.2)), {"wrong_size": 2}),
    "swapped-colours": ((replace(STAR, color="blue"), replace(RING, color="red")), {"wrong_color": 2}),
    "swapped-places": ((replace(STAR, x=0.74), replace(RING, x=0.28)), {"relation": False}),
    "below-rather-than-left": ((replace(STAR, y=0.26), replace(RING, x=0.6, y=0.8)), {"relation": False}),
    "missing": ((STAR,), {"missing": 1, "relation": False}),
    "extra": ((STAR, RING, Shape("cross", "black", None, 0.7, 0.2, 0.12)), {"extra": 1}),
    "duplicate": ((STAR, RING, replace(RING, x=0.7, y=0.2)), {"extra": 1}),
    "two-duplicates": ((STAR, RING, replace(RING, x=0.7, y=0.2), replace(RING, x=0.7, y=0.85)), {"extra": 2}),
    "another-object": (
        (STAR, replace(RING, kind="cross", color="black")),
        {"missing": 1, "extra": 1, "relation": False},
    ),
    "wrong-colour-and-duplicate": (
        (replace(STAR, color="green"), RING, replace(RING, y=0.2)),
        {"wrong_color": 1, "extra": 1},
    ),
}


@pytest.mark.parametrize(("shapes", "expected"), FLAWS.values(), ids=FLAWS)
def test_each_flaw_is_counted_as_what_it_is(shapes, expected):
    assert caption(ASKED) == PROMPT
    assert counts(picture(*shapes)) == expected


def test_wrong_background():
    assert counts(picture(STAR, RING, background="yellow")) == {"background": False}


def test_an_unreadable_object_counts_as_read_and_extra():
    image = np.asarray(picture(STAR, RING)).copy()
    image[4:16, 30:60] = (230, 140, 40)
    assert counts(image) == {"extra": 1, "readable": False}
    assert judge(image, PROMPT).read == 3


def test_an_unreadable_background_reads_nothing():
    assert counts(np.full((64, 64, 3), 0.5)) == {
        "missing": 2,
        "relation": False,
        "background": False,
        "readable": False,
    }


def test_sizes_left_open_are_free():
    prompt = "a red star left of a blue ring on a white background"
    assert counts(picture(STAR, RING), prompt) == counts(picture(STAR, replace(RING, radius=0.2)), prompt) == {}


def test_relations_in_both_directions():
    above = "a red star above a blue ring on a white background"
    high, low = replace(STAR, y=0.25), replace(RING, x=0.4, y=0.8)
    assert judge(picture(high, low), above).relation is True
    assert judge(picture(replace(STAR, y=0.75), replace(RING, x=0.4, y=0.2)), above).relation is False
    assert judge(picture(STAR), "a red star on a white background").relation is None


def test_relations_are_judged_in_fractions_of_a_wide_picture():
    first, second = replace(STAR, x=0.3, y=0.3), replace(RING, x=0.7, y=0.75)
    prompt = "a red star above a blue ring on a white background"
    assert counts(picture(first, second, size=(128, 64)), prompt) == {}


def test_a_duplicate_does_not_spoil_the_relation():
    for x in (0.1, 0.9):
        twin = replace(STAR, x=x, y=0.84, radius=0.12)
        judgement = judge(picture(replace(STAR, y=0.3), replace(RING, y=0.3), twin), PROMPT.replace("large ", ""))
        assert judgement.relation is True and judgement.extra == 1


def test_the_better_match_is_paired_first():
    image = picture(STAR, replace(STAR, color="green", x=0.74, radius=0.12))
    prompt = "a red ring left of a red star on a white background"
    assert counts(image, prompt) == {"missing": 1, "extra": 1, "relation": False}


def test_many_objects_are_counted_not_permuted():
    places = [((column + 0.5) / 7, (row + 0.5) / 7) for row in range(7) for column in range(7)]
    image = picture(*(replace(RING, x=x, y=y, radius=0.06) for x, y in places), size=256)
    judgement = judge(image, "a red ring left of a small blue ring on a white background")
    assert (judgement.read, judgement.extra, judgement.wrong_color, judgement.missing) == (49, 47, 1, 0)


def test_scores_sum_up_judgements():
    single = "a red star on a white background"
    images = [picture(STAR, RING), picture(STAR, RING, RING), picture(RING), picture(STAR), np.full((64, 64, 3), 0.5)]
    images[1] = picture(STAR, RING, replace(RING, y=0.2))
    result = score(images, [PROMPT, PROMPT, PROMPT, single, single])
    assert result.judgements == tuple(
        judge(image, prompt) for image, prompt in zip(images, [PROMPT, PROMPT, PROMPT, single, single], strict=True)
    )
    assert result.as_dict() == {
        "images": 5,
        "exact": 2 / 5,
        "asked": 8,
        "read": 7,
        "missing": 2,
        "extra": 1,
        "wrong_color": 0,
        "wrong_shape": 0,
        "wrong_size": 0,
        "relation": 2 / 3,
        "background": 4 / 5,
        "readable": 4 / 5,
    }
    assert json.loads(json.dumps(result.as_dict())) == result.as_dict()


def test_score_takes_one_image_sequences_and_batches():
    image, scenes = picture(STAR, RING), list(sample_scenes(3, 5))
    assert score(image, PROMPT) == score([image], [PROMPT]) == score((i for i in [image]), (PROMPT,))
    batch = np.stack([rasterize(scene) for scene in scenes])
    prompts = [caption(scene) for scene in scenes]
    assert score(batch, prompts) == score(torch.from_numpy(batch).permute(0, 3, 1, 2), prompts)
    assert score(batch, prompts).exact == 1
    assert score(picture(STAR), "a red star on a white background").relation is None


def test_score_refuses_what_does_not_match_up():
    image = picture(STAR, RING)
    with pytest.raises(ValueError, match=r"images and prompts: got 2 and 1.*repeat a prompt"):
        score([image, image], [PROMPT])
    with pytest.raises(ValueError, match="got 0 and 0"):
        score([], [])
    with pytest.raises(TypeError, match=r"single picture.*pass \[image\]"):
        score(image, [PROMPT])
    with pytest.raises(CaptionError, match="not a shapes caption"):
        score(image, "a photo of a cat")
