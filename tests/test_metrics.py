"""Likeness of pictures, and numbers that networks make of them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import diffusion_attn as da
from diffusion_attn.metrics.images import as_tensor, psnr, ssim
from diffusion_attn.metrics.networks import ClipScorer, FrechetScorer
from tests import tiny

pytest.importorskip("torchmetrics")


def noise(seed, size=(32, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


def test_psnr_is_its_definition():
    one, other = noise(0), noise(1)
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    assert psnr([one], [other]) == pytest.approx([10 * math.log10(255**2 / np.mean(difference**2))], rel=1e-5)
    assert psnr([one], [one]) == [math.inf]


def test_ssim_is_1_of_equal_pictures_and_falls_with_noise():
    one = noise(0)
    assert ssim([one], [one]) == pytest.approx([1.0])
    half = Image.blend(one, noise(1), 0.5)
    values = ssim([one, half, noise(2)], [one, one, one])
    assert values[0] > values[1] > values[2]


def test_pictures_become_tensors_channel_by_channel():
    picture = Image.new("RGBA", (3, 2), (1, 2, 3, 255))
    assert as_tensor([picture]).shape == (1, 3, 2, 3)
    assert as_tensor([picture])[0, :, 0, 0].tolist() == [1, 2, 3]


def test_as_many_references_as_pictures(clip):
    with pytest.raises(ValueError, match="1 images against 2 references"):
        psnr([noise(0)], [noise(0)] * 2)
    with pytest.raises(ValueError, match="1 images against 2 prompts"):
        ClipScorer(clip)([noise(0)], ["a", "b"])


def test_clip_score_is_the_cosine_of_the_two_embeddings(clip):
    images, prompts = [noise(0), noise(1)], ["a red star", "a blue ring on a white background"]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    expected = (100 * logits.diagonal()).clamp(min=0).tolist()
    assert ClipScorer(clip)(images, prompts) == pytest.approx(expected, abs=1e-3)


def test_frechet_distance_is_its_definition(clip):
    """On 40 pictures of 12 features, against the formula in float64."""
    ours, theirs = [noise(seed) for seed in range(40)], [noise(seed) for seed in range(100, 140)]
    theirs = [Image.blend(picture, Image.new("RGB", picture.size, "red"), 0.5) for picture in theirs]
    scorer = FrechetScorer(clip)
    features = [scorer.metric.inception(as_tensor(pictures)).double().numpy() for pictures in (ours, theirs)]
    (mean, cov), (mean_, cov_) = [(x.mean(0), np.cov(x, rowvar=False)) for x in features]
    roots = np.sqrt(np.linalg.eigvals(cov @ cov_).real.clip(0)).sum()
    expected = ((mean - mean_) ** 2).sum() + np.trace(cov) + np.trace(cov_) - 2 * roots
    assert scorer(ours, theirs) == pytest.approx(expected, rel=1e-3)
    assert scorer(ours, ours) == pytest.approx(0, abs=1e-3 * expected)


@pytest.mark.parametrize("scorer", [ClipScorer, FrechetScorer])
def test_a_network_that_is_not_there(scorer, tmp_path):
    with pytest.raises(da.DiffusionAttnError, match="could not be loaded as a"):
        scorer(str(tmp_path))
