"""CLEAR's weights: the published format, what is refused of it, and where they are."""

import dataclasses
import os
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import diffusion_attn as da
from diffusion_attn.core.joint_layout import attentions
from diffusion_attn.methods.clear.layers import ClearLayer, ClearWeights
from tests import tiny
from tests.tiny import call_flux, clear_weights


def test_the_published_table_is_that_of_the_real_model():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        layers = dict(attentions(model))
        tensors = {
            factor: ClearWeights.of((name, ClearLayer.like(attn, factor)) for name, attn in layers.items()).published()
            for factor in (1, 4)
        }
    assert {factor: len(part) for factor, part in tensors.items()} == {1: 380, 4: 437}
    numbers = [sum(tensor.numel() for tensor in part.values()) for part in tensors.values()]
    assert numbers == [1_793_648_640, 1_793_648_640 + 912]
    keys = list(tensors[4])
    assert "transformer_blocks.18.attn.to_out.0.bias" in keys and "single_transformer_blocks.37.attn.to_v.bias" in keys
    assert "single_transformer_blocks.0.attn.processor.spatial_weight" in keys
    assert not any("single" in key and "to_out" in key for key in keys)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_file_loads_and_is_written_again(tmp_path, factor, dtype):
    name = f"clear_local_4{'_down_2' if factor == 2 else ''}.safetensors"
    weights = {key: x.detach().to(dtype) for key, x in clear_weights(4, factor).state_dict().items()}
    save_file(weights, tmp_path / name)
    for method in (
        da.Clear.from_pretrained(tmp_path / name),
        da.Clear.from_pretrained(tmp_path, radius=4, down_factor=factor, proportional=True),
        da.Clear.from_pretrained(str(tmp_path)),
    ):
        assert (method.radius, method.down_factor) == (4, factor) and name in method.source
        assert all(torch.equal(x, weights[key]) for key, x in method.state_dict().items())
    method.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / name)
    assert again.keys() == weights.keys() and all(torch.equal(x, weights[key]) for key, x in again.items())

    model = tiny.transformer()
    plain, kept = call_flux(model, (8, 12)), {key: x.clone() for key, x in model.state_dict().items()}
    da.enable(model, method)
    on = call_flux(model, (8, 12))
    replaced = tiny.transformer()
    if factor == 1:
        replaced.load_state_dict({key: x.float() for key, x in weights.items()}, strict=False)
        da.enable(replaced, da.Clear(4))
        torch.testing.assert_close(on, call_flux(replaced, (8, 12)))
    assert model.state_dict().keys() == kept.keys()
    da.disable(model)
    assert all(torch.equal(x, kept[key]) for key, x in model.state_dict().items())
    assert torch.equal(call_flux(model, (8, 12)), plain) and not torch.allclose(on, plain, atol=1e-2)


BROKEN = {
    "a key is missing": (lambda x: x.pop("transformer_blocks.1.attn.to_k.weight"), "missing"),
    "a bias is missing": (lambda x: x.pop("transformer_blocks.1.attn.to_k.bias"), "missing"),
    "a layer is missing": (lambda x: [x.pop(k) for k in list(x) if k.startswith("transformer_blocks.1.")], "missing"),
    "a key is unknown": (lambda x: x.update({"transformer_blocks.0.ff.net.2.bias": torch.zeros(2)}), "not CLEAR's"),
    "a tensor is unknown": (
        lambda x: x.update({"transformer_blocks.0.attn.norm_q.weight": torch.zeros(2)}),
        "unexpected",
    ),
    "a layer is too many": (
        lambda x: x.update({k.replace(".1.", ".7."): v.clone() for k, v in x.items() if ".1." in k}),
        "unexpected",
    ),
    "another shape": (
        lambda x: x.update({"transformer_blocks.0.attn.to_q.weight": torch.zeros(32, 30)}),
        "another shape",
    ),
    "integers": (
        lambda x: x.update({"transformer_blocks.0.attn.to_q.bias": torch.zeros(32, dtype=torch.int32)}),
        "int32",
    ),
    "one table of pooling is missing": (
        lambda x: x.pop("transformer_blocks.0.attn.processor.spatial_weight"),
        "missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(tmp_path, case):
    change, message = BROKEN[case]
    weights = {key: x.detach() for key, x in clear_weights(4, 2).state_dict().items()}
    change(weights)
    save_file(weights, tmp_path / "clear_local_4_down_2.safetensors")
    model = tiny.transformer()
    before = tiny.trace_of(model)
    with pytest.raises(da.CheckpointFormatError, match=message):
        da.enable(model, da.Clear.from_pretrained(tmp_path))
    assert tiny.trace_of(model) == before


def test_radius_and_down_factor_come_from_the_name_or_are_asked_for(tmp_path):
    clear_weights().save_pretrained(tmp_path)
    clear_weights(3, 2).save_pretrained(tmp_path)
    with pytest.raises(da.CheckpointFormatError, match=r"2 files .* or its radius="):
        da.Clear.from_pretrained(tmp_path)
    assert da.Clear.from_pretrained(tmp_path, down_factor=2).radius == 3
    with pytest.raises(da.CheckpointFormatError, match=r"clear_local_8\.safetensors"):
        da.Clear.from_pretrained(tmp_path, radius=8)
    clear_weights(4, 2).save_pretrained(tmp_path / "one radius")
    assert da.Clear.from_pretrained(tmp_path / "one radius").down_factor == 2
    clear_weights(4, 4).save_pretrained(tmp_path / "one radius")
    with pytest.raises(da.CheckpointFormatError, match=r"2 files .* and down_factor="):
        da.Clear.from_pretrained(tmp_path / "one radius")
    clear_weights().save_pretrained(tmp_path / "one radius")
    assert da.Clear.from_pretrained(tmp_path / "one radius").down_factor == 1
    path = tmp_path / "clear_local_4.safetensors"
    with pytest.raises(ValueError, match=r"radius=8: .* was trained for 4"):
        da.Clear.from_pretrained(path, radius=8)
    with pytest.raises(da.CheckpointFormatError, match="down_factor=1, and down_factor=4 was expected"):
        da.Clear.from_pretrained(path, down_factor=4)
    (tmp_path / "clear_local_3_down_2.safetensors").rename(tmp_path / "clear_local_3.safetensors")
    with pytest.raises(da.CheckpointFormatError, match="down_factor=2, and down_factor=1 was expected"):
        da.Clear.from_pretrained(tmp_path / "clear_local_3.safetensors")
    other = path.rename(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="does not tell the radius"):
        da.Clear.from_pretrained(other)
    assert da.Clear.from_pretrained(other, radius=5).radius == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(da.CheckpointFormatError, match=r"0 files .* give a folder of CLEAR weights"):
        da.Clear.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder or file here, and radius is needed"):
        da.Clear.from_pretrained("Huage001/CLEAR")
    with pytest.raises(da.CheckpointFormatError, match="there is no file"):
        da.Clear.from_pretrained(tmp_path / "clear_local_9.safetensors")
    with pytest.raises(ValueError, match="down_factor=0"):
        da.Clear.from_pretrained(other, radius=5, down_factor=0)
    with pytest.raises(TypeError, match="fast"):
        da.Clear.from_pretrained(other, radius=5, fast=True)
    with pytest.raises(ValueError, match="down_factor=3"):
        dataclasses.replace(clear_weights(), down_factor=3)
    assert dataclasses.replace(clear_weights(), radius=9).weights is clear_weights().weights


def test_weights_of_another_model_are_refused():
    with pytest.raises(da.CheckpointFormatError, match="of another shape"):
        da.enable(tiny.transformer(num_attention_heads=3), clear_weights())
    with pytest.raises(da.CheckpointFormatError, match="unexpected"):
        da.enable(tiny.sd3(), clear_weights())
    with pytest.raises(da.UnsupportedModelError, match="no published CLEAR weights"):
        da.Clear.for_pipeline(tiny.flux())
    with pytest.raises(ValueError, match="nothing to save"):
        da.Clear(4).save_pretrained("nowhere")


def test_weights_are_live():
    model, method = tiny.transformer(), da.Clear.for_model(tiny.transformer(), 4)
    da.enable(model, method)
    rule = call_flux(model, (8, 12))
    method.load_state_dict(clear_weights().state_dict())
    changed = call_flux(model, (8, 12))
    da.enable(model, clear_weights())
    assert torch.equal(call_flux(model, (8, 12)), changed) and not torch.equal(rule, changed)
    with pytest.raises(da.CheckpointFormatError, match="missing"):
        method.load_state_dict({})


def test_idle_weights_may_be_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny.transformer()
    plain, kept = call_flux(model, (8, 12)), {key: x.clone() for key, x in model.state_dict().items()}
    da.enable(model, clear_weights())
    on = call_flux(model, (8, 12))
    da.enable(model, dataclasses.replace(clear_weights(), base_weights="disk"))
    assert torch.equal(call_flux(model, (8, 12)), on)
    assert all(torch.equal(x, kept[key]) for key, x in model.state_dict().items())
    weight = model.transformer_blocks[0].attn.to_q.weight
    mapped = [line for line in Path("/proc/self/smaps").read_text().splitlines() if "(deleted)" in line]
    assert any(".safetensors" in line for line in mapped)
    with torch.no_grad():
        weight += 0  # writable, and not to the file
    da.disable(model)
    assert not os.listdir(tmp_path)
    assert torch.equal(call_flux(model, (8, 12)), plain)
