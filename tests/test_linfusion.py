"""LinFusion: its files, what it refuses, and that the known defects of the official code are not ours."""

import dataclasses
import json
import logging

import accelerate
import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import diffusion_attn as da
from benchmarks.common import LAYOUTS
from diffusion_attn.methods.linfusion.layers import LayerConfig
from diffusion_attn.methods.linfusion.processor import LinFusionProcessor
from tests import tiny
from tests.golden.seeded import seed_parameters
from tests.tiny import forward, noise

WEIGHTS = "diffusion_pytorch_model.safetensors"


def linfusion_for(unet, mid_dim=4):
    return seed_parameters(da.LinFusion.for_model(unet, mid_dim))


@pytest.fixture
def unet():
    return tiny.unet()


@pytest.fixture
def folder(unet, tmp_path):
    linfusion_for(unet).save_pretrained(tmp_path)
    return tmp_path


# ---- files


def test_saved_and_loaded_it_computes_the_same(unet, folder):
    x = noise(1, 4, 24, 20)
    da.enable(unet, linfusion_for(unet))
    expected = forward(unet, x)
    da.enable(unet, da.LinFusion.from_pretrained(folder))
    assert torch.equal(forward(unet, x), expected)


def test_the_older_form_of_config_loads_too(unet, folder):
    da.LinFusion.for_model(unet).save_pretrained(folder)  # the older form knows no projection_mid_dim
    config = json.loads((folder / "config.json").read_text())
    entries = [[entry["module_name"], entry["dim_n"], entry["heads"]] for entry in config["modules_list"]]
    (folder / "config.json").write_text(json.dumps({"_class_name": "StableMamba", "modules_list": entries}))
    assert da.LinFusion.from_pretrained(folder).layers == da.LinFusion.for_model(unet).layers


REAL = {
    "sd15": ({}, None, 16, 272, 99_235_520, 2667),
    "sd21": ({"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}, None, 16, 272, 99_235_520, 2678),
    "sdxl": (None, lambda width: width // 16, 70, 1190, 435_480_800, 11309),
}


@pytest.mark.parametrize("name", REAL)
def test_real_layouts_have_the_published_counts(name, tmp_path):
    changes, mid_dim, layers, keys, parameters, config_bytes = REAL[name]
    config = LAYOUTS["sdxl"].config if changes is None else {**LAYOUTS["sd"].config, **changes}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    linfusion = da.LinFusion.for_model(unet, mid_dim)
    assert len(linfusion.layers) == layers and len(linfusion.state_dict()) == keys
    assert sum(p.numel() for p in linfusion.parameters()) == parameters
    assert len(da.enable(unet, linfusion).layers["linfusion"]) == layers
    text = linfusion.config_text()
    assert len(text.encode()) == config_bytes, "with a diffusers version of six characters, as the published ones have"
    assert [entry["module_name"] for entry in json.loads(text)["modules_list"]][-1].startswith("mid_block.")


def break_key(tensors):
    tensors["0.to_qq.weight"] = tensors.pop("0.to_q.weight")


def break_shape(tensors):
    tensors["3.to_out.0.bias"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (break_key, r"1 missing \(0.to_q.weight\); 1 unexpected \(0.to_qq.weight\)"),
        (break_shape, r"3.to_out.0.bias is \(5,\), expected \(16,\)"),
    ],
)
def test_wrong_keys_and_shapes_are_listed(folder, change, says):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(da.CheckpointFormatError, match=says):
        da.LinFusion.from_pretrained(folder)
    linfusion = da.LinFusion.for_model(tiny.unet(), 4)
    before = {k: v.clone() for k, v in linfusion.state_dict().items()}
    with pytest.raises(da.CheckpointFormatError, match=says):
        linfusion.load_state_dict(tensors)
    assert all(torch.equal(v, before[k]) for k, v in linfusion.state_dict().items())


def test_files_that_are_no_weights(folder, tmp_path, monkeypatch):
    whole = (folder / WEIGHTS).read_bytes()
    for content in (whole[: len(whole) // 2], b"\x80\x04pickle", b""):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(da.CheckpointFormatError, match="truncated"):
            da.LinFusion.from_pretrained(folder)
    tensors = {k: v.to(torch.int8) for k, v in linfusion_for(tiny.unet()).state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(da.CheckpointFormatError, match=r"of no dtype to compute with .*torch.int8"):
        da.LinFusion.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(da.CheckpointFormatError, match=f"has no {WEIGHTS}"):
        da.LinFusion.from_pretrained(folder)
    for text, says in (("{", "not JSON"), ("{}", "no modules_list"), ('{"modules_list": [["a", 0, 1]]}', "'a', 0, 1")):
        (folder / "config.json").write_text(text)
        with pytest.raises(da.CheckpointFormatError, match=says):
            da.LinFusion.from_pretrained(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for id_or_dir in ("nobody/nothing", "not a folder"):
        with pytest.raises(da.DiffusionAttnError, match="is no folder here"):
            da.LinFusion.from_pretrained(id_or_dir, local_files_only=True)


def test_a_save_that_fails_leaves_the_old_files(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        linfusion_for(tiny.unet()).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- which model


def test_weights_of_another_base_are_refused():
    """SD 1.5 and 2.1 weights have the same keys and shapes: only heads tell them apart."""
    models = {}
    for name in ("sd15", "sd21"):
        with torch.device("meta"):
            models[name] = UNet2DConditionModel(**{**LAYOUTS["sd"].config, **REAL[name][0]})
    with pytest.raises(da.CheckpointFormatError) as error:
        da.enable(models["sd15"], da.LinFusion.for_model(models["sd21"]))
    assert "Stable Diffusion 2.x" in str(error.value) and "Stable Diffusion 1.x" in str(error.value)
    assert da.enabled(models["sd15"]) == []
    with pytest.raises(da.CheckpointFormatError, match="16 layers"):
        da.enable(tiny.unet(tiny.SDXL), da.LinFusion.for_model(tiny.unet()))


@pytest.mark.parametrize("name", REAL)
def test_the_published_weights_of_a_pipeline(name, monkeypatch):
    config = LAYOUTS["sdxl"].config if name == "sdxl" else {**LAYOUTS["sd"].config, **REAL[name][0]}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, *args, **kwargs: asked.append(repo) or 1 / 0)
    with pytest.raises(da.DiffusionAttnError):
        da.LinFusion.for_pipeline(unet)
    assert asked == [
        {"sd15": "Yuanshi/LinFusion-1-5", "sd21": "Yuanshi/LinFusion-2-1", "sdxl": "Yuanshi/LinFusion-XL"}[name]
    ]
    with pytest.raises(da.UnsupportedModelError, match="for_model"):
        da.LinFusion.for_pipeline(tiny.sd())


def test_other_denoisers_are_refused():
    flux = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=4, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    with pytest.raises(da.UnsupportedModelError, match="CLEAR"):
        da.LinFusion.for_model(flux)
    plain = {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "block_out_channels": (8, 8),
    }
    without = tiny.unet(**plain, mid_block_type=None)
    with pytest.raises(da.UnsupportedModelError, match="no spatial self-attention"):
        da.LinFusion.for_model(without)


def test_motion_modules_are_left_alone():
    motion = tiny.motion()
    x, text = noise(1, 4, 3, 16, 16), noise(3, 5, 12)  # frames share what their prompt says
    with torch.no_grad():
        plain = motion(x, 5, text).sample
        report = da.enable(motion, linfusion_for(motion))
        assert not any("motion" in name for name in report.layers["linfusion"])
        assert not torch.allclose(motion(x, 5, text).sample, plain)
        da.disable(motion)
        assert torch.equal(motion(x, 5, text).sample, plain)


def test_quantised_projections_are_refused(unet):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    unet.get_submodule(name).to_q.to(torch.float8_e4m3fn)
    for use in (da.LinFusion.for_model, lambda unet: da.enable(unet, da.LinFusion.for_model(tiny.unet()))):
        with pytest.raises(da.UnsupportedModelError, match=rf"{name}.to_q .*float8.*modules_to_not_convert"):
            use(unet)


# ---- what is computed with


def test_it_starts_from_the_models_own_weights(unet):
    state = torch.random.get_rng_state()
    linfusion = da.LinFusion.for_model(unet)
    assert torch.equal(torch.random.get_rng_state(), state)
    for layer, (name, own) in zip(linfusion.weights, linfusion.attentions(unet), strict=True):
        assert torch.equal(layer.to_q.weight, own.to_q.weight) and layer.to_q.weight is not own.to_q.weight, name
        hidden = noise(1, 9, own.to_q.in_features)
        own.set_processor(LinFusionProcessor(layer))
        q, k, v = (
            part(hidden).unflatten(-1, (own.heads, -1)).transpose(1, 2) for part in (own.to_q, own.to_k, own.to_v)
        )
        expected = own.to_out[0](da.ops.linear_attention(q, k, v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(own(hidden), expected)
    assert forward(unet, noise(1, 4, 16, 16)).isfinite().all()


def test_its_tensors_are_the_live_ones(unet):
    linfusion = linfusion_for(unet)
    da.enable(unet, linfusion)
    x = noise(1, 4, 16, 16)
    before = forward(unet, x)
    linfusion.state_dict()["0.to_v.weight"].mul_(2)
    changed = forward(unet, x)
    assert not torch.allclose(changed, before)
    with torch.no_grad():
        next(p for n, p in linfusion.weights.named_parameters() if n == "0.to_v.weight").div_(2)
    assert torch.equal(forward(unet, x), before)


def test_only_its_own_parameters_are_trained(unet):
    linfusion = linfusion_for(unet)
    da.enable(unet, linfusion)
    unet(noise(1, 4, 16, 16), 5, noise(1, 5, 12)).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in linfusion.parameters())
    assert all(attn.to_q.weight.grad is None for _, attn in linfusion.attentions(unet))


def test_base_weights_elsewhere_change_nothing(unet):
    linfusion = linfusion_for(unet)
    x = noise(1, 4, 16, 16)
    plain = forward(unet, x)
    da.enable(unet, linfusion)
    expected = forward(unet, x)
    for place in ("cpu", "disk"):
        da.enable(unet, da.LinFusion(linfusion.layers, linfusion.weights, base_weights=place))
        assert torch.equal(forward(unet, x), expected)
        da.disable(unet)
        assert torch.equal(forward(unet, x), plain)
    with pytest.raises(ValueError, match="base_weights='cloud'"):
        da.LinFusion(linfusion.layers, linfusion.weights, base_weights="cloud")


# ---- defects of the official code that are not ours


def test_saving_the_enabled_unet_saves_the_base_model(unet, tmp_path):
    """The official code saves a mixture that loads as a plain UNet and draws wrong pictures."""
    x = noise(1, 4, 16, 16)
    plain, keys = forward(unet, x), list(unet.state_dict())
    da.enable(unet, linfusion_for(unet))
    assert list(unet.state_dict()) == keys
    unet.save_pretrained(tmp_path)
    assert torch.equal(forward(UNet2DConditionModel.from_pretrained(tmp_path), x), plain)


def test_an_attention_mask_is_refused(unet):
    """The official code ignores it."""
    da.enable(unet, linfusion_for(unet))
    with pytest.raises(da.UnsupportedModelError, match="mask"):
        forward(unet, noise(1, 4, 16, 16), attention_mask=torch.ones(1, 256))


def test_unknown_attention_kwargs_are_told(unet, caplog, monkeypatch):
    """The official code swallows them."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    da.enable(unet, linfusion_for(unet))
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        forward(unet, noise(1, 4, 16, 16), cross_attention_kwargs={"colour": "red"})
    assert "colour" in caplog.text


@pytest.mark.parametrize("auto", ["pag", "sag"])
def test_guidance_that_needs_softmax_is_refused_and_taken_back(auto):
    """In the official code it has no effect."""
    pipe = tiny.sd()
    linfusion = linfusion_for(pipe.unet)
    da.enable(pipe, linfusion)
    if auto == "pag":
        options = {"enable_pag": True, "pag_applied_layers": ["down_blocks.0"]}
        guided = tiny.quiet(diffusers.AutoPipelineForText2Image.from_pipe(pipe, **options))
        kwargs = {"pag_scale": 2.0}
    else:
        parts = {**pipe.components, "requires_safety_checker": False}
        guided = tiny.quiet(diffusers.StableDiffusionSAGPipeline(**parts))
        kwargs = {"sag_scale": 0.75}
    with pytest.raises(da.MethodConflictError, match="PAG and SAG"):
        tiny.run(guided, **kwargs)
    pipe.unet.set_attn_processor(da.processors.UNetAttnProcessor())
    assert tiny.run(pipe).isfinite().all()
    da.disable(pipe)
    assert tiny.run(guided, **kwargs).isfinite().all()


def test_a_processor_that_is_more_than_attention_is_not_replaced(unet):
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.set_processor(diffusers.models.attention_processor.PAGIdentitySelfAttnProcessor2_0())
    with pytest.raises(da.MethodConflictError, match=r"mid_block.*PAGIdentity"):
        da.enable(unet, linfusion_for(unet))
    assert da.enabled(unet) == []


def test_windows_conflict_and_raunet_composes():
    pipe = tiny.sd()
    linfusion = linfusion_for(pipe.unet)
    alone = {}
    for methods in ((linfusion,), (da.HiDiffusion(window_attention=False),)):
        with da.using(pipe, *methods):
            alone[methods[0].name] = tiny.run(pipe)
    da.enable(pipe, linfusion)
    with pytest.raises(da.MethodConflictError, match=r"HiDiffusion\(window_attention=False\)"):
        da.enable(pipe, da.HiDiffusion())
    assert da.enabled(pipe) == [linfusion]
    da.enable(pipe, da.HiDiffusion(window_attention=False))
    both = tiny.run(pipe)
    assert both.isfinite().all() and not any(torch.allclose(both, other) for other in alone.values())
    da.disable(pipe, "hidiffusion")
    assert torch.equal(tiny.run(pipe), alone["linfusion"])


@pytest.mark.parametrize("dora", [False, True])
def test_fused_and_weight_scaling_adapters_are_refused(unet, dora):
    """By `enable` where they are there already, else by the call."""
    x, linfusion = noise(1, 4, 16, 16), linfusion_for(unet)
    before, after = tiny.unet(), tiny.unet()
    da.enable(after, linfusion)
    for model in (before, after):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=dora))
    expected = None if dora else forward(after, x)
    if not dora:
        before.fuse_lora()
        after.fuse_lora()
    with pytest.raises(da.UnsupportedModelError, match="DoRA" if dora else "unfuse_lora"):
        da.enable(before, linfusion)
    with pytest.raises(da.UnsupportedModelError, match="DoRA" if dora else "unfuse_lora"):
        forward(after, x)
    if not dora:
        after.unfuse_lora()
        torch.testing.assert_close(forward(after, x), expected)


def test_a_lora_acts_on_the_linear_layer(unet):
    """As on any layer: W x plus its own B A x, whatever W is in force."""
    linfusion = linfusion_for(unet)
    x, name = noise(1, 9, 8), "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    da.enable(unet, linfusion)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["attn1.to_v"], init_lora_weights=False))
    attn, layer = unet.get_submodule(name), linfusion.weights[0]
    with torch.no_grad():
        actual = attn(x)
        delta = 2.0 * attn.to_v.lora_B["default"].weight @ attn.to_v.lora_A["default"].weight
        layer.to_v.weight.add_(delta)
        unet.disable_adapters()
        torch.testing.assert_close(attn(x), actual)


def test_two_unets_share_a_linfusion_and_disable_one(unet):
    other, linfusion, x = tiny.unet(), linfusion_for(unet), noise(1, 4, 16, 16)
    plain = forward(other, x)
    da.enable(unet, linfusion)
    da.enable(other, linfusion)
    on = forward(unet, x)
    assert torch.equal(forward(other, x), on)
    da.disable(other)
    assert torch.equal(forward(other, x), plain) and torch.equal(forward(unet, x), on)


def test_hub_errors_of_any_kind_are_one_sentence(monkeypatch):
    class OfflineError(Exception):
        pass

    def fail(*args, **kwargs):
        raise OfflineError("connection timed out\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(da.DiffusionAttnError, match="connection timed out") as error:
        da.LinFusion.from_pretrained("owner/name")
    assert "\n" not in str(error.value)


def test_options_that_nobody_knows_are_refused(folder):
    with pytest.raises(TypeError, match="torch_dtype"):
        da.LinFusion.from_pretrained(folder, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="base_weights='cloud'"):
        da.LinFusion.from_pretrained("nobody/nothing", base_weights="cloud")


def test_an_entry_twice_in_the_config_is_refused(unet, folder):
    linfusion = da.LinFusion.from_pretrained(folder)
    twice = da.LinFusion((*linfusion.layers, linfusion.layers[0]), linfusion.weights)
    with pytest.raises(da.CheckpointFormatError, match="17 layers"):
        da.enable(unet, twice)
    for mid in ("abc", 1.5, True, -2, 0):
        with pytest.raises(da.CheckpointFormatError, match="projection_mid_dim"):
            LayerConfig.parse({"module_name": "a", "dim_n": 8, "heads": 2, "projection_mid_dim": mid})


def test_a_pruned_model_has_no_published_weights():
    with torch.device("meta"):
        pruned = UNet2DConditionModel(**{**LAYOUTS["sdxl"].config, "transformer_layers_per_block": (1, 2, 4)})
    with pytest.raises(da.UnsupportedModelError, match="no published LinFusion weights"):
        da.LinFusion.for_pipeline(pruned)


def test_it_starts_from_compiled_and_offloaded_models(unet):
    expected = da.LinFusion.for_model(unet, 4).state_dict()
    compiled = torch.compile(tiny.unet(), backend="eager")
    offloaded = tiny.unet()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    for model in (compiled, offloaded):
        actual = da.LinFusion.for_model(model, 4).state_dict()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_its_dtype_is_the_unets_unless_pinned(unet):
    half = tiny.unet().half()
    pinned = dataclasses.replace(linfusion_for(unet), dtype=torch.float32)
    exact = {k: v.clone() for k, v in pinned.state_dict().items()}
    x = noise(1, 4, 16, 16).half()
    text = noise(1, 5, 12).half()
    da.enable(half, pinned)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert half(x, 5, text).sample.isfinite().all()
    with torch.no_grad(), pytest.raises(da.UnsupportedModelError, match=r"pinned to torch\.float32"):
        half(x, 5, text)
    assert all(torch.equal(v, exact[k]) for k, v in pinned.state_dict().items())
    da.enable(half, dataclasses.replace(pinned, dtype=None))
    assert all(p.dtype == torch.float16 for p in pinned.parameters())


def test_who_brings_a_processor_back_after_disable_is_told(unet):
    """As `unfuse_qkv_projections` does, which remembers the processors of the moment of fusing."""
    plain = forward(unet, noise(1, 4, 16, 16))
    da.enable(unet, linfusion_for(unet))
    kept = dict(unet.attn_processors)
    da.disable(unet)
    assert torch.equal(forward(unet, noise(1, 4, 16, 16)), plain)
    unet.set_attn_processor(kept)
    with pytest.raises(da.UnsupportedModelError, match="enable LinFusion again"):
        forward(unet, noise(1, 4, 16, 16))
    da.enable(unet, linfusion_for(unet))
    assert forward(unet, noise(1, 4, 16, 16)).isfinite().all()
