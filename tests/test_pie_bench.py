"""The numbers of PIE-Bench against those of the official code."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_attn.metrics import pie_bench
from tests.editing.golden import VIMAEDIT
from tests.golden.seeded import seeded_tensor
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
