"""The numbers of PIE-Bench against those of the official code."""

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTConfig, ViTModel

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.metrics import pie_bench
from diffusion_attn.metrics.networks import ClipScorer
from tests import tiny
from tests.editing.golden import VIMAEDIT
from tests.golden.seeded import seed_parameters, seeded_tensor
from tests.tiny import noise


@VIMAEDIT.named("mask_pub")
def test_official_masks(name):
    params = VIMAEDIT.cases[name]["parameters"]
    mask = pie_bench.decode_mask(params["code"], params["shape"], params["border"])
    sums = {"mask": mask, "row_sums": mask.sum(1), "column_sums": mask.sum(0)}
    for output in VIMAEDIT.cases[name]["outputs"]:
        VIMAEDIT.close(sums[output], name, output)


def pictures(case):
    inputs = case["inputs"]
    source, other = (
        (seeded_tensor(inputs[name]["seeded_tensor"], inputs[name]["shape"]).sigmoid() * 255).floor()
        for name in ("source", "edit")
    )
    edit = (0.85 * source + 0.15 * other).floor()
    return [image.permute(2, 0, 1) / 255 for image in (edit, source)]


@VIMAEDIT.named("metrics")
def test_official_similarities(name):
    case = VIMAEDIT.cases[name]
    edit, source = pictures(case)
    cells = seeded_tensor(case["inputs"]["mask"]["seeded_tensor"], case["inputs"]["mask"]["shape"])
    mask = (cells > case["parameters"]["mask_threshold"]).repeat_interleave(8, 0).repeat_interleave(8, 1)
    mask = mask[: source.shape[1], : source.shape[2]].float()
    mask[[0, -1]] = mask[:, [0, -1]] = 1
    for metric in ("psnr", "mse", "ssim"):
        function = getattr(pie_bench, metric)
        for part, where in {"": None, "_unedit_part": 1 - mask, "_edit_part": mask}.items():
            value = torch.tensor([function(edit, source, where)])
            expected = VIMAEDIT.expected(name, f"{metric}{part}")
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


@VIMAEDIT.named("structure")
def test_official_structure(name):
    case = VIMAEDIT.cases[name]
    width = case["parameters"]["dim"]
    keys = [
        seeded_tensor(entry["seeded_tensor"], entry["shape"])[0][:, width : 2 * width]
        for entry in case["inputs"].values()
    ]
    a, b = map(pie_bench.self_similarity, keys)
    VIMAEDIT.close(a, name, "self_similarity_a")
    VIMAEDIT.close((a - b).square().mean()[None], name, "distance")


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 20)), max_size=5))
def test_runs_are_those_pixels(runs):
    mask = pie_bench.decode_mask([number for run in runs for number in run], (6, 10), border=False)
    pixels = {pixel for start, length in runs for pixel in range(start, min(start + length, 60))}
    assert set(mask.flatten().nonzero().flatten().tolist()) == pixels


def test_empty_masks_and_bad_arguments():
    image = noise(3, 16, 16).sigmoid()
    for function in (pie_bench.psnr, pie_bench.mse, pie_bench.ssim):
        assert math.isnan(function(image, image, torch.zeros(16, 16, dtype=torch.bool)))
        with pytest.raises(ValueError, match=r"\(3, 16, 16\) and reference \(3, 8, 8\)"):
            function(image, image[:, :8, :8])
        with pytest.raises(ValueError, match=r"mask has the shape \(8, 8\); give \(16, 16\)"):
            function(image, image, torch.ones(8, 8))
    with pytest.raises(ValueError, match="pairs of a start and a length"):
        pie_bench.decode_mask([1, 2, 3])


# ---- items


def mapping(folder, **changes):
    """A folder with one item, laid out like the benchmark."""
    entry = {
        "image_path": "0_random_140/000000000000.jpg",
        "original_prompt": "a [red] star",
        "editing_prompt": "a [blue] star and a ring",
        "editing_instruction": "make it blue",
        "editing_type_id": "6",
        "blended_word": "star ring",
        "mask": [0, 2, 66, 64],
    } | changes
    path = folder / "annotation_images" / "0_random_140" / "000000000000.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.picture(64).save(path)
    (folder / "mapping_file.json").write_text(json.dumps({"000000000000": entry}))
    return folder


def test_items_are_read_as_the_benchmark_asks(tmp_path):
    [item] = pie_bench.load(mapping(tmp_path))
    assert (item.source_prompt, item.target_prompt) == ("a red star", "a blue star and a ring")
    assert item.blend_words == ("star", "ring") and item.kind == 6 and item.image().size == (64, 64)
    inner = item.mask((64, 64), border=False)
    assert inner.sum() == 66 and inner[0, :2].all() and inner[1, 2:].all() and inner[2, :2].all()
    assert item.mask((64, 64))[:, [0, -1]].all()


@pytest.mark.parametrize("words", ["", "star", "star lion", "star ring lion"])
def test_words_that_are_no_pair_of_the_prompts_are_left_out(tmp_path, words):
    [item] = pie_bench.load(mapping(tmp_path, blended_word=words))
    assert item.blend_words is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"editing_type_id": "12"}, "has the type '12'; expected 0 to 9"),
        ({"image_path": "gone.jpg"}, r"gone\.jpg', which is not there"),
    ],
)
def test_broken_items_are_named(tmp_path, changes, message):
    with pytest.raises(DiffusionAttnError, match=message):
        pie_bench.load(mapping(tmp_path, **changes))


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(DiffusionAttnError, match=r"has no mapping_file\.json"):
        pie_bench.load(tmp_path)
    for text, message in (("{", "is not JSON"), ("{}", "holds no items"), ('{"1": {}}', "'1' .* has no 'image_path'")):
        (tmp_path / "mapping_file.json").write_text(text)
        with pytest.raises(DiffusionAttnError, match=message):
            pie_bench.load(tmp_path)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_what_is_encoded_is_decoded(seed, height, width):
    mask = noise(height, width, seed=seed) > 0.3
    code = pie_bench.encode_mask(mask)
    assert torch.equal(pie_bench.decode_mask(code, (height, width), border=False).bool(), mask)


# ---- all numbers of an edit


def test_numbers_without_networks_are_nan_where_there_are_none(tmp_path):
    [item] = pie_bench.load(mapping(tmp_path))
    scorer = pie_bench.EditScorer()
    numbers = scorer(item, item.image())
    assert numbers["mse"] == 0 and math.isinf(numbers["psnr"]) and numbers["ssim"] == pytest.approx(1, abs=1e-3)
    assert [name for name, value in numbers.items() if math.isnan(value)] == scorer.missing
    [whole] = pie_bench.load(mapping(tmp_path, mask=[0, 64 * 64]))
    assert all(math.isnan(scorer(whole, whole.image())[name]) for name in ("psnr", "mse", "ssim"))
    with pytest.raises(ValueError, match="the edit of item"):
        scorer(item, tiny.picture(32))


def test_clip_scores_are_of_the_whole_picture_and_of_the_edited_part(tmp_path):
    clip = ClipScorer(tiny.clip(tmp_path / "clip"))
    [item] = pie_bench.load(mapping(tmp_path))
    edited = tiny.picture(64).rotate(90)
    numbers = pie_bench.EditScorer(clip=clip)(item, edited)
    mask = item.mask((64, 64)).bool().numpy()
    inside = Image.fromarray(np.where(mask[..., None], np.asarray(edited), 0).astype(np.uint8))
    expected = clip([edited, inside, item.image()], [item.target_prompt, item.target_prompt, item.source_prompt])
    assert [numbers[name] for name in ("clip_whole", "clip_edited", "clip_source")] == pytest.approx(expected)


def test_structure_is_the_distance_of_keys(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, patch_size=32)
    model = seed_parameters(ViTModel(config).eval())
    model.save_pretrained(tmp_path)
    distance = pie_bench.StructureDistance(str(tmp_path))
    first, second = (seeded_tensor(name, (3, 224, 224)).sigmoid() for name in ("first", "second"))
    assert distance(first, first) == 0

    def matrix(image):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (image * 255 - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            states = model(pixels[None], output_hidden_states=True).hidden_states[-2]
            layer = [x for name, x in model.named_modules() if name.endswith(("layernorm_before", "layer_norm1"))][-1]
            keys = [x for name, x in model.named_modules() if name.endswith(("k_proj", "key"))][-1](layer(states))
        return pie_bench.self_similarity(keys[0])

    expected = (matrix(first) - matrix(second)).square().mean()
    assert distance(first, second) == pytest.approx(float(expected), rel=1e-4) and expected > 0
    wide = seeded_tensor("wide", (3, 60, 90)).sigmoid()
    assert distance(wide, wide.flip(-1)) > 0


def test_lpips_says_what_it_needs():
    if find_spec("torchvision") is None:
        with pytest.raises(DiffusionAttnError, match="torchvision"):
            pie_bench.EditScorer.load(lpips=True)


def test_means_leave_out_what_there_is_not():
    rows = [dict.fromkeys(pie_bench.COLUMNS, math.nan) | {"mse": value} for value in (0.1, 0.3, math.nan)]
    result = pie_bench.means(rows)
    assert result["mse"] == pytest.approx(2000) and math.isnan(result["psnr"])
