"""CLEAR against numbers of the official implementation: single layers, and a whole transformer."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed
from safetensors.torch import load_file

import diffusion_attn as da
from diffusion_attn.distill import losses
from diffusion_attn.distill.features import Features
from diffusion_attn.methods.clear.layers import ClearLayer
from diffusion_attn.methods.clear.processor import ClearProcessor
from diffusion_attn.methods.clear.rule import Rule
from diffusion_attn.methods.clear.tokens import Tokens, find_cells
from tests.golden.seeded import seed_parameters, seeded_tensor
from tests.tiny import image_ids

GOLDEN = Path(__file__).parent / "golden" / "clear"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
OUTPUTS = load_file(GOLDEN / "outputs.safetensors")


def cases(kind):
    return pytest.mark.parametrize("case", [x for x in CASES if x["kind"] == kind], ids=lambda case: case["name"])


def ids(case):
    return torch.cat([torch.zeros(case["text_tokens"], 3), image_ids(case["grid"])])


def inputs(case):
    return {
        name: seeded_tensor(x["name"], x["shape"]) if "name" in x else torch.tensor(x["values"])
        for name, x in case["inputs"].items()
    }


def compare(case, outputs):
    for name, output in outputs.items():
        stored = case["outputs"][name]
        assert list(output.shape) == stored["full_shape"]
        expected = OUTPUTS[stored["key"]]
        if "stored_rows" in stored:  # of the text, every 16th
            text = case["text_tokens"]
            image = range(text, output.shape[1]) if "image" in stored["stored_rows"] else []
            output = output[:, [*range(0, text, 16), *image]]
        torch.testing.assert_close(output, expected, **case["tolerance"])


@cases("attention_layer")
@pytest.mark.parametrize("backend", ["reference", "tiles", "flex"])
@torch.no_grad()
def test_layers(case, backend):
    attn = seed_parameters(FluxAttention(**case["module"]["kwargs"]))
    factor, grid = case["down_factor"], tuple(case["grid"])
    layer = ClearLayer.like(attn, factor)
    layer.start_from(attn)
    if case.get("spatial_weight", "uniform") != "uniform":
        noise = seeded_tensor(case["spatial_weight"], case["spatial_weight_shape"])
        layer.spatial_weight.copy_(factor**-2 + 0.5 * factor**-2 * noise)
    rule = Rule(case["radius"], factor, case["proportional"], backend)
    cells = find_cells(grid, factor, False, None) if factor > 1 else None
    tokens = Tokens(case["text_tokens"], grid, cells=cells)
    sequence = case["text_tokens"] + grid[0] * grid[1]
    assert rule.scale(case["head_dim"], sequence) == pytest.approx(case["attention_scale"])
    attn.set_processor(ClearProcessor(rule, layer))
    theta = 10000 * case.get("ntk_factor", 1)
    rotary = FluxPosEmbed(theta, case["axes_dims_rope"])(ids(case)) if case["rope"] else None
    output = attn(**inputs(case), image_rotary_emb=rotary, local_tokens=tokens)
    names = list(case["outputs"])
    compare(case, dict(zip(names, output if isinstance(output, tuple) else [output], strict=True)))


@cases("transformer")
@pytest.mark.parametrize("backend", ["auto", "reference", "flex"])
@torch.no_grad()
def test_transformer(case, backend):
    model = seed_parameters(FluxTransformer2DModel(**case["model_config"]), case["gain"]).eval()
    method = da.Clear(case["radius"], proportional=case["proportional"], backend=backend)
    report = da.enable(model, method)
    assert len(report.layers["clear"]) == 4
    output = model(
        **inputs(case), img_ids=image_ids(case["grid"]), txt_ids=torch.zeros(case["text_tokens"], 3), return_dict=False
    )[0]
    compare(case, {"sample": output})


@cases("distillation_loss")
def test_distillation(case):
    """The three terms of the loss, by the trainer's own parts, with teacher and student in one transformer."""
    model = seed_parameters(FluxTransformer2DModel(**case["model_config"])).eval().requires_grad_(False)
    student = da.Clear.for_model(model, case["radius"])
    given = inputs(case)
    latents, noise, sigmas = given.pop("latents"), given.pop("noise"), given.pop("sigmas")
    call = {
        "hidden_states": losses.add_noise(latents, noise, 1 - sigmas, sigmas),
        "timestep": sigmas,
        "img_ids": image_ids(case["grid"]),
        "txt_ids": torch.zeros(case["text_tokens"], 3),
        "return_dict": False,
        **given,
    }
    layers = [module for name, module in student.attentions(model) if name in case["distilled_layers"]]
    with torch.no_grad(), Features(layers) as theirs:
        taught = model(**call)[0]
    with da.using(model, student):
        with Features(layers) as ours:
            predicted = model(**call)[0]
        target = losses.denoising_target("flow", latents, noise, 1 - sigmas, sigmas)
        terms = [
            losses.mse(predicted, target),
            losses.mse(predicted, taught),
            losses.attention_mse(ours.outputs, theirs.outputs),
        ]
        total = terms[0] + 0.5 * terms[1] + 0.5 * terms[2]
        total.backward()
    compare(case, {"student_prediction": predicted.detach(), "teacher_prediction": taught})
    compare(case, {"losses": torch.stack([*terms, total]).detach()})
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
