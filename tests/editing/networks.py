"""The tiny networks of the DPL cases, as a pipeline has them, and the tolerances of whole runs."""

from types import SimpleNamespace

from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.editing import tokenizers
from tests.editing.golden import DPL
from tests.golden.seeded import seed_parameters


def tiny():
    networks = DPL.manifest["conventions"]["networks"]["tiny"]
    unet = UNet2DConditionModel(**networks["unet"]["config"])
    encoder = CLIPTextModel(CLIPTextConfig(**networks["text_encoder"]["config"]))
    for network in (unet, encoder):
        seed_parameters(network)
        network.eval()
    scheduler = DDIMScheduler(**networks["scheduler"]["config"])
    return SimpleNamespace(unet=unet, text_encoder=encoder, tokenizer=tokenizers.clip(), scheduler=scheduler)


def assert_near(actual, name, output):
    """Errors in parts of the largest value, or in quantiles: Adam turns tiny differences into flipped signs."""
    expected, tolerance = DPL.expected(name, output), DPL.cases[name]["tolerance"]
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    if tolerance["kind"] == "quantile":
        assert (error <= tolerance["atol"]).float().mean() >= 0.99
        assert error.mean() < tolerance["mean"]
    else:
        assert error.max() <= tolerance["limit"] * expected.abs().max()
