"""LinFusion against numbers of the official implementation (see ``golden/linfusion/manifest.json``)."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file

import diffusion_attn as da
from diffusion_attn.methods.linfusion.layers import LayerConfig, LinFusionLayer
from diffusion_attn.methods.linfusion.processor import LinFusionProcessor
from tests.golden.seeded import seed_parameters, seeded_tensor

FOLDER = Path(__file__).parent / "golden" / "linfusion"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
EXPECTED = load_file(FOLDER / "golden.safetensors")


def named(kind):
    return pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["kind"] == kind])


def drawn(spec):
    return seeded_tensor(spec["seeded_tensor"][0], tuple(spec["seeded_tensor"][1])) * spec.get("times", 1.0)


def inputs_of(case):
    def value(spec):
        if isinstance(spec, dict) and "seeded_tensor" in spec:
            return drawn(spec)
        if isinstance(spec, dict):
            return {name: value(part) for name, part in spec.items()}
        return torch.tensor(spec) if isinstance(spec, list) else spec

    return {name: value(spec) for name, spec in case["inputs"].items()}


def check(case, name, actual):
    torch.testing.assert_close(actual, EXPECTED[case["outputs"][name]["tensor"]], **case["tolerance"]["float32_cpu"])


@named("layer")
def test_layer(name):
    case = CASES[name]
    width = case["dim"]
    layer = LinFusionLayer(width, case["projection_mid_dim"])
    assert {k: list(v.shape) for k, v in layer.state_dict().items()} == case["parameters"]["keys"]
    seed_parameters(layer, case["parameters"]["gain"])
    attn = Attention(width, heads=case["heads"], dim_head=case["dim_head"], processor=LinFusionProcessor(layer))
    inputs = inputs_of(case)
    hidden = inputs["hidden_states"].requires_grad_("gradient" in case)
    output = attn(**inputs)
    if "encoder_hidden_states" in inputs:
        # The official layer divides its state by the wrong number here: ours is off by the known factor.
        bias = layer.to_out[0].bias
        factor = hidden.shape[1] / inputs["encoder_hidden_states"].shape[1]
        output = (output - bias) / factor + bias
    check(case, "output", output)
    for part in ("to_q_", "to_k_"):
        if part in case["outputs"]:
            check(case, part, layer.get_submodule(part)(hidden))
    if "gradient" in case:
        (output * drawn(case["gradient"]["cotangent"])).sum().backward()
        gradients = {"hidden_states": hidden, **dict(layer.named_parameters())}
        for part in case["outputs"]:
            if part.startswith("grad."):
                check(case, part, gradients[part.removeprefix("grad.")].grad)


def seeded_unet(case):
    return seed_parameters(UNet2DConditionModel(**case["unet_config"]).eval())


def seeded_linfusion(case, unet):
    layers = [LayerConfig(**entry) for entry in case["modules_list"]]
    linfusion = da.LinFusion.for_model(unet, mid_dim={x.dim_n: x.projection_mid_dim for x in layers}.get)
    assert list(linfusion.layers) == layers
    return seed_parameters(linfusion)


@named("unet")
def test_whole_unets(name):
    case = CASES[name]
    unet = seeded_unet(case)
    linfusion = seeded_linfusion(case, unet)
    if "linfusion_keys" in case:
        assert {k: list(v.shape) for k, v in linfusion.state_dict().items()} == case["linfusion_keys"]
    inputs = inputs_of(case)
    with torch.no_grad():
        if "before" in case["outputs"]:
            check(case, "before", unet(**inputs).sample)
        report = da.enable(unet, linfusion)
        check(case, "output", unet(**inputs).sample)
    assert report.layers["linfusion"] == [entry["module_name"] for entry in case["modules_list"]]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "bfloat16"])
@named("checkpoint")
def test_a_published_folder_loads_unchanged(name, dtype, tmp_path):
    case = CASES[name]
    folder, tolerance = FOLDER / case["directory"], {}
    if dtype is not None:
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        save_file({k: v.to(dtype) for k, v in tensors.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        folder, tolerance = tmp_path, {"atol": 0.05, "rtol": 0.05}
    unet = seeded_unet(case)
    linfusion = da.LinFusion.from_pretrained(folder)
    assert all(p.dtype == (dtype or torch.float16) for p in linfusion.parameters())
    with torch.no_grad():
        before = unet(**inputs_of(case)).sample
        da.enable(unet, linfusion)
        output = unet(**inputs_of(case)).sample
    check(case, "before", before)
    expected = EXPECTED[case["outputs"]["output"]["tensor"]]
    torch.testing.assert_close(output, expected, **(tolerance or case["tolerance"]["float32_cpu"]))


@named("checkpoint")
def test_what_is_written_is_the_official_format(name, tmp_path):
    folder = FOLDER / CASES[name]["directory"]
    da.LinFusion.from_pretrained(folder).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CASES[name]["files"])
    golden = (folder / "config.json").read_text()
    assert '"_diffusers_version": "0.42.1"' in golden  # the writer's own
    assert (tmp_path / "config.json").read_text() == golden.replace("0.42.1", diffusers.__version__)
    ours, theirs = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)


class Feature:
    def __call__(self, module, args, output):
        self.value = output


@named("distillation_step")
def test_distillation_step(name):
    case = CASES[name]
    teacher, student = seeded_unet(case), seeded_unet(case)
    linfusion = seeded_linfusion(case, student)
    da.enable(student, linfusion)
    pairs = []
    for (_, ours), (_, theirs) in zip(linfusion.attentions(student), linfusion.attentions(teacher), strict=True):
        pairs.append((Feature(), Feature()))
        ours.register_forward_hook(pairs[-1][0])
        theirs.register_forward_hook(pairs[-1][1])
    inputs = inputs_of(case)
    target = inputs.pop("target")
    with torch.no_grad():
        expected = teacher(**inputs).sample
    predicted = student(**inputs).sample
    noise, distilled = F.mse_loss(predicted, target), F.mse_loss(predicted, expected)
    feature = torch.stack([F.mse_loss(ours.value, theirs.value) for ours, theirs in pairs]).mean()
    total = noise + 0.5 * distilled + 0.5 * feature
    total.backward()
    check(case, "losses", torch.stack([noise, distilled, feature, total]).detach())
    gradients = {name: parameter.grad for name, parameter in linfusion.weights.named_parameters()}
    check(case, "grad_norms", torch.stack([gradients[key].norm() for key in case["gradient_norms_of"]]))
    assert all(gradient is not None for gradient in gradients.values())
    optimizer = torch.optim.SGD(linfusion.parameters(), lr=1e-3)
    optimizer.step()
    assert F.mse_loss(student(**inputs).sample, expected) < distilled
