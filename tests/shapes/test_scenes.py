"""Scenes, captions and the renderer of the shapes world."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.shapes.captions import CaptionError, caption, parse_caption
from diffusion_attn.shapes.renderer import coverage, rasterize, render, rgb
from diffusion_attn.shapes.scenes import COLORS, KINDS, RELATIONS, SIZES, Scene, Shape, sample_scene, sample_scenes

SOURCES = {
    "random": random.Random,
    "numpy": np.random.default_rng,
    "torch": lambda seed: torch.Generator().manual_seed(seed),
}


def content(scene: Scene) -> tuple:
    """What the caption can tell of a scene."""
    return scene.background, scene.relation, [(shape.kind, shape.color, shape.size) for shape in scene.shapes]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_generators_give_reproducible_sequences(source):
    first, again, other = source(3), source(3), source(4)
    drawn = [sample_scene(first) for _ in range(5)]
    assert drawn == [sample_scene(again) for _ in range(5)]
    assert drawn != [sample_scene(other) for _ in range(5)]
    assert len(set(drawn)) == 5


def test_integer_seeds_are_reproducible():
    assert sample_scene(3) == sample_scene(3) == sample_scene(random.Random(3))
    assert sample_scene(3) != sample_scene(4)


def test_drawing_leaves_global_generators_alone():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for source in SOURCES.values():
        sample_scene(source(0))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("rng", ["7", None, 1.5])
def test_other_sources_are_refused(rng):
    with pytest.raises(TypeError, match=r"rng=.*expected random\.Random.*pass a seed"):
        sample_scene(rng)


def test_sample_scenes_is_a_sequence_of_sample_scene():
    rng = random.Random(11)
    assert list(sample_scenes(6, 11)) == [sample_scene(rng) for _ in range(6)]


def test_splits_are_disjoint_and_a_tenth_is_held_out():
    scenes = list(sample_scenes(2000, 0))
    assert 0.07 < np.mean([scene.held_out for scene in scenes]) < 0.13
    assert all(scene.held_out for scene in sample_scenes(50, 1, held_out=True))
    assert not any(scene.held_out for scene in sample_scenes(50, 1, held_out=False))


def test_held_out_depends_on_content_not_on_place():
    for scene in sample_scenes(50, 2):
        moved = tuple(Shape(s.kind, s.color, s.size, 0.5, 0.5, 0.2) for s in scene.shapes)
        assert Scene(moved, scene.background, scene.relation).held_out == scene.held_out


def test_scenes_use_the_whole_vocabulary():
    scenes = list(sample_scenes(500, 3))
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert {shape.kind for shape in shapes} == set(KINDS)
    assert {shape.color for shape in shapes} == {scene.background for scene in scenes} == set(COLORS)
    assert {shape.size for shape in shapes} == {*SIZES, None}
    assert {scene.relation for scene in scenes} == {*RELATIONS, None}


def test_colours_differ_and_radii_fit_their_size():
    for scene in sample_scenes(500, 4):
        colors = [scene.background, *(shape.color for shape in scene.shapes)]
        assert len(set(colors)) == len(colors)
        assert (scene.relation is None) == (len(scene.shapes) == 1)
        for shape in scene.shapes:
            ranges = [SIZES[shape.size]] if shape.size else SIZES.values()
            assert any(low - 1e-3 <= shape.radius <= high + 1e-3 for low, high in ranges)


@pytest.mark.parametrize("size", [64, 128, (96, 64), (64, 160)], ids=str)
def test_shapes_touch_neither_the_border_nor_each_other(size):
    width, height = (size, size) if isinstance(size, int) else size
    side = min(width, height)
    for scene in sample_scenes(150, 5):
        drawn = [coverage(s.kind, s.x * width, s.y * height, s.radius * side, width, height) > 0 for s in scene.shapes]
        for shape in drawn:
            assert shape.any()
            assert not (shape[0].any() or shape[-1].any() or shape[:, 0].any() or shape[:, -1].any())
        for one, other in combinations(drawn, 2):
            grown = np.pad(one, 1)
            near = np.any([np.roll(grown, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)
            assert not (near[1:-1, 1:-1] & other).any()


def test_relations_hold_in_the_drawn_scene():
    for scene in sample_scenes(200, 6):
        if scene.relation:
            first, second = scene.shapes
            dx, dy = second.x - first.x, second.y - first.y
            along, across = (dx, dy) if scene.relation == "left of" else (dy, dx)
            assert along > abs(across)


def test_captions_round_trip():
    for scene in sample_scenes(500, 7):
        parsed = parse_caption(caption(scene))
        assert content(parsed) == content(scene)
        assert caption(parsed) == caption(scene)
        assert parsed.held_out == scene.held_out
        assert all(np.isnan([shape.x, shape.y, shape.radius]).all() for shape in parsed.shapes)


def test_caption_wording():
    star, ring = Shape("star", "red", None, 0.5, 0.2, 0.2), Shape("ring", "blue", "small", 0.5, 0.8, 0.12)
    assert caption(Scene((star,), "white")) == "a red star on a white background"
    both = caption(Scene((star, ring), "white", "above"))
    assert both == "a red star above a small blue ring on a white background"


def test_captions_are_read_whatever_their_case_and_spacing():
    plain = parse_caption("a red star left of a blue ring on a white background")
    assert content(parse_caption("  A red STAR left  of a blue ring\non a white background. ")) == content(plain)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photo of a cat",
        "a red star",
        "a pink star on a white background",
        "a red star below a blue ring on a white background",
        "a red star above a blue ring on a white background at night",
    ],
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(CaptionError) as caught:
        parse_caption(prompt)
    message = str(caught.value)
    assert repr(prompt) in message
    assert "write it like" in message
    assert all(word in message for word in ("above", "left", "purple", "cross", "small"))
    assert isinstance(caught.value, DiffusionAttnError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("size", [0, -8, (64, 0), (0, 64)])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"size=.*positive number of pixels"):
        render(sample_scene(0), size)


@pytest.mark.parametrize(("size", "shape"), [(64, (64, 64)), ((96, 64), (64, 96)), ((50, 75), (75, 50)), (1, (1, 1))])
def test_sizes_are_width_and_height(size, shape):
    scene = sample_scene(0)
    image, array = render(scene, size), rasterize(scene, size)
    assert image.mode == "RGB" and image.size == shape[::-1]
    assert array.shape == (*shape, 3) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1


def test_colours_are_exact_inside_and_outside():
    scene = Scene((Shape("square", "red", "large", 0.5, 0.5, 0.2),), "cyan")
    image = np.asarray(render(scene, 64))
    assert tuple(image[32, 32]) == COLORS["red"]
    assert tuple(image[0, 0]) == COLORS["cyan"]
    np.testing.assert_allclose(rgb("red") * 255, COLORS["red"], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_rendering_is_consistent_across_scales(kind, factor):
    scene = Scene((Shape(kind, "black", None, 0.47, 0.53, 0.2),), "white")
    coarse = rasterize(scene, 64)
    fine = rasterize(scene, 64 * factor).reshape(64, factor, 64, factor, 3).mean((1, 3))
    assert np.abs(coarse - fine).mean() < 0.003
    # Coverage is right to first order: only at the tips of a star does a pixel differ by a quarter.
    assert np.abs(coarse - fine).max() < 0.35


def test_large_renders_reduce_to_small_ones():
    for scene in sample_scenes(30, 8):
        small = np.asarray(render(scene, 64), np.float32) / 255
        reduced = np.asarray(render(scene, 256).reduce(4), np.float32) / 255
        assert np.abs(small - reduced).mean() < 0.004


def test_shapes_stay_round_in_pictures_that_are_not_square():
    scene = Scene((Shape("circle", "red", None, 0.25, 0.75, 0.2),), "white")
    wide = np.asarray(render(scene, (128, 64)), np.int32)
    rows, columns = np.nonzero(np.abs(wide - COLORS["red"]).sum(-1) < 60)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    assert abs(rows.mean() + 0.5 - 48) < 0.5 and abs(columns.mean() + 0.5 - 32) < 0.5


def test_render_is_the_rounded_raster():
    scene = sample_scene(9)
    assert isinstance(render(scene), Image.Image)
    np.testing.assert_array_equal(np.asarray(render(scene)), np.round(rasterize(scene) * 255).astype(np.uint8))
