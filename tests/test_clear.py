"""CLEAR on FLUX and SD3: who sees whom, in whatever order and size tokens come, and weights in the published format."""

import dataclasses
import os
import tempfile
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import diffusion_attn as da
from diffusion_attn.methods.clear.layers import ClearLayer, ClearWeights, attentions
from diffusion_attn.methods.clear.tokens import find_cells, read_grid
from diffusion_attn.ops.local_rule import tile_order
from tests import tiny
from tests.golden.seeded import seed_parameters
from tests.tiny import noise, picture


def ids_of(grid):
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)


def call(model, grid, hidden=None, ids=None, **kwargs):
    """A forward pass of a FLUX model on a grid of tokens."""
    with torch.no_grad():
        return model(
            noise(1, grid[0] * grid[1], 16) if hidden is None else hidden,
            encoder_hidden_states=noise(1, 5, 12),
            pooled_projections=noise(1, 12),
            timestep=torch.tensor([0.9]),
            img_ids=ids_of(grid) if ids is None else ids,
            txt_ids=torch.zeros(5, 3),
            guidance=torch.tensor([3.5]),
            **kwargs,
        ).sample


@cache
def trained(radius=4, down_factor=1):
    """Weights that differ from the model's."""
    return seed_parameters(da.Clear.for_model(tiny.transformer(), radius, down_factor), 0.8)


# ---- the rule


@settings(max_examples=12, deadline=None)
@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 8), st.data())
def test_a_token_reaches_its_disc_and_the_text(height, width, radius, data):
    """Through one layer; the text it changed would reach the rest in the second."""
    model = tiny.transformer(num_layers=1, num_single_layers=0)
    da.enable(model, da.Clear(radius))
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    hidden = noise(1, height * width, 16)
    changed = hidden.clone()
    changed[0, y * width + x] += 1
    difference = (call(model, (height, width), hidden) - call(model, (height, width), changed))[0].abs().amax(-1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    near = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    assert torch.equal(difference.view(height, width) > 0, near)


@pytest.mark.parametrize("backend", ["reference", "tiles", "flex"])
@pytest.mark.parametrize("method", [da.Clear(4), trained(), trained(3, 2)], ids=["rule", "weights", "pooled"])
def test_the_order_of_tokens_does_not_matter(backend, method):
    model, grid = tiny.transformer(), (10, 18)
    da.enable(model, dataclasses.replace(method, backend="reference"))
    hidden, expected = noise(1, 180, 16), call(model, grid)
    order = torch.randperm(180, generator=torch.Generator().manual_seed(0))
    da.enable(model, dataclasses.replace(method, backend=backend))
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(call(model, grid), expected, **close)
    permuted = call(model, grid, hidden[:, order], ids_of(grid)[order])
    torch.testing.assert_close(permuted, expected[:, order], **close)


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd3])
def test_a_disc_over_the_whole_image_is_full_attention(make):
    pipe = make()
    plain = tiny.run(pipe)
    da.enable(pipe, da.Clear(24))
    torch.testing.assert_close(tiny.run(pipe), plain, atol=1e-4, rtol=1e-4)
    da.enable(pipe, da.Clear(16))
    assert not torch.allclose(tiny.run(pipe), plain, atol=1e-4)


@pytest.mark.parametrize("backend", ["tiles", "flex"])
def test_sizes_may_change_from_call_to_call(backend):
    model = tiny.transformer()
    da.enable(model, da.Clear(3, backend=backend))
    first = call(model, (12, 8))
    call(model, (8, 16))
    assert torch.equal(call(model, (12, 8)), first)


def test_several_pictures_are_each_their_own():
    pipe = tiny.flux()
    da.enable(pipe, trained())
    kwargs = {"prompt": ["a red star", "a blue ring"], "output_type": "latent", "height": 96, "width": 64}
    kwargs |= {"num_inference_steps": 2, "max_sequence_length": 8}
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipe(generator=seeds, **kwargs).images
    second = pipe(generator=torch.Generator().manual_seed(2), **{**kwargs, "prompt": "a blue ring"}).images
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=1e-4)


def test_true_guidance_may_have_prompts_of_another_length():
    pipe = tiny.flux()
    plain = tiny.run(pipe, negative_prompt="a blue ring", true_cfg_scale=3.0)
    da.enable(pipe, da.Clear(4))
    on = tiny.run(pipe, negative_prompt="a blue ring", true_cfg_scale=3.0)
    assert on.isfinite().all() and not torch.allclose(on, plain, atol=1e-3)


# ---- options


def test_the_ntk_factor_multiplies_the_base_of_the_rotary_embedding():
    model, reference = tiny.transformer(), tiny.transformer()
    da.enable(model, da.Clear(4, ntk_factor=10))
    reference.pos_embed.theta *= 10
    da.enable(reference, da.Clear(4))
    assert torch.equal(call(model, (8, 12)), call(reference, (8, 12)))
    assert model.pos_embed.theta == 10000
    with pytest.raises(da.UnsupportedModelError, match="ntk_factor=10"):
        da.enable(tiny.sd3(), da.Clear(4, ntk_factor=10))


def test_proportional_attention_changes_nothing_at_the_length_of_the_training():
    model, grid = tiny.transformer(num_layers=1, num_single_layers=1), (64, 64)
    outputs = {}
    for text in (5, 512):
        for proportional in (False, True):
            da.enable(model, da.Clear(2, proportional=proportional))
            with torch.no_grad():
                outputs[text, proportional] = model(
                    noise(1, 4096, 16),
                    noise(1, text, 12),
                    noise(1, 12),
                    torch.tensor([0.9]),
                    ids_of(grid),
                    torch.zeros(text, 3),
                    torch.tensor([3.5]),
                ).sample
    assert torch.equal(outputs[512, True], outputs[512, False])
    assert not torch.equal(outputs[5, True], outputs[5, False])


def test_pooling_without_weights_is_the_mean():
    model = tiny.transformer()
    da.enable(model, da.Clear(3, down_factor=2))
    rule = call(model, (8, 12))
    da.enable(model, da.Clear.for_model(model, 3, 2))
    torch.testing.assert_close(call(model, (8, 12)), rule, atol=2e-5, rtol=1e-4)
    da.enable(model, da.Clear(3))
    assert not torch.allclose(call(model, (8, 12)), rule, atol=1e-3)


@pytest.mark.parametrize("tiled", [False, True])
def test_cells_are_squares_of_the_grid(tiled):
    grid, factor = (12, 20), 4
    cells = find_cells(grid, factor, tiled, None)
    places = tile_order(grid) if tiled else torch.arange(240)
    rows, columns = places[cells] // 20, places[cells] % 20
    expected = torch.arange(15)
    assert torch.equal(rows // factor * 5 + columns // factor, expected[:, None].expand(-1, 16))
    assert torch.equal(rows[7] % 4 * 4 + columns[7] % 4, torch.arange(16))


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 0},
        {"radius": 2.5},
        {"down_factor": 0},
        {"ntk_factor": 0},
        {"backend": "fast"},
        {"base_weights": "cloud"},
    ],
)
def test_options_are_checked(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        da.Clear(**options)


# ---- weights


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
    weights = {key: x.detach().to(dtype) for key, x in trained(4, factor).state_dict().items()}
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
    plain, kept = call(model, (8, 12)), {key: x.clone() for key, x in model.state_dict().items()}
    da.enable(model, method)
    on = call(model, (8, 12))
    replaced = tiny.transformer()
    if factor == 1:
        replaced.load_state_dict({key: x.float() for key, x in weights.items()}, strict=False)
        da.enable(replaced, da.Clear(4))
        torch.testing.assert_close(on, call(replaced, (8, 12)))
    assert model.state_dict().keys() == kept.keys()
    da.disable(model)
    assert all(torch.equal(x, kept[key]) for key, x in model.state_dict().items())
    assert torch.equal(call(model, (8, 12)), plain) and not torch.allclose(on, plain, atol=1e-2)


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
    weights = {key: x.detach() for key, x in trained(4, 2).state_dict().items()}
    change(weights)
    save_file(weights, tmp_path / "clear_local_4_down_2.safetensors")
    model = tiny.transformer()
    before = tiny.trace_of(model)
    with pytest.raises(da.CheckpointFormatError, match=message):
        da.enable(model, da.Clear.from_pretrained(tmp_path))
    assert tiny.trace_of(model) == before


def test_radius_and_down_factor_come_from_the_name_or_are_asked_for(tmp_path):
    trained().save_pretrained(tmp_path)
    trained(3, 2).save_pretrained(tmp_path)
    with pytest.raises(da.CheckpointFormatError, match=r"2 files .* give radius="):
        da.Clear.from_pretrained(tmp_path)
    assert da.Clear.from_pretrained(tmp_path, down_factor=2).radius == 3
    with pytest.raises(da.CheckpointFormatError, match=r"clear_local_8\.safetensors"):
        da.Clear.from_pretrained(tmp_path, radius=8)
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
    with pytest.raises(ValueError, match="radius is needed"):
        da.Clear.from_pretrained("Huage001/CLEAR")
    with pytest.raises(da.CheckpointFormatError, match="there is no file"):
        da.Clear.from_pretrained(tmp_path / "clear_local_9.safetensors")
    with pytest.raises(ValueError, match="down_factor=0"):
        da.Clear.from_pretrained(other, radius=5, down_factor=0)
    with pytest.raises(TypeError, match="fast"):
        da.Clear.from_pretrained(other, radius=5, fast=True)
    with pytest.raises(ValueError, match="down_factor=3"):
        dataclasses.replace(trained(), down_factor=3)
    assert dataclasses.replace(trained(), radius=9).weights is trained().weights


def test_weights_of_another_model_are_refused():
    with pytest.raises(da.CheckpointFormatError, match="of another shape"):
        da.enable(tiny.transformer(num_attention_heads=3), trained())
    with pytest.raises(da.CheckpointFormatError, match="unexpected"):
        da.enable(tiny.sd3(), trained())
    with pytest.raises(da.UnsupportedModelError, match="no published CLEAR weights"):
        da.Clear.for_pipeline(tiny.flux())
    with pytest.raises(ValueError, match="nothing to save"):
        da.Clear(4).save_pretrained("nowhere")


def test_weights_are_live():
    model, method = tiny.transformer(), da.Clear.for_model(tiny.transformer(), 4)
    da.enable(model, method)
    rule = call(model, (8, 12))
    method.load_state_dict(trained().state_dict())
    changed = call(model, (8, 12))
    da.enable(model, trained())
    assert torch.equal(call(model, (8, 12)), changed) and not torch.equal(rule, changed)
    with pytest.raises(da.CheckpointFormatError, match="missing"):
        method.load_state_dict({})


def test_idle_weights_may_be_on_disk():
    model = tiny.transformer()
    plain, kept = call(model, (8, 12)), {key: x.clone() for key, x in model.state_dict().items()}
    da.enable(model, trained())
    on = call(model, (8, 12))
    files = set(os.listdir(tempfile.gettempdir()))
    da.enable(model, dataclasses.replace(trained(), base_weights="disk"))
    assert torch.equal(call(model, (8, 12)), on)
    assert all(torch.equal(x, kept[key]) for key, x in model.state_dict().items())
    weight = model.transformer_blocks[0].attn.to_q.weight
    mapped = [line for line in Path("/proc/self/smaps").read_text().splitlines() if "(deleted)" in line]
    assert any(".safetensors" in line for line in mapped)
    with torch.no_grad():
        weight += 0  # writable, and not to the file
    da.disable(model)
    assert set(os.listdir(tempfile.gettempdir())) <= files
    assert torch.equal(call(model, (8, 12)), plain)


# ---- what is refused


def test_ids_that_are_no_grid_are_refused():
    model = tiny.transformer()
    da.enable(model, da.Clear(4))
    kontext = ids_of((8, 12)).float()
    kontext[48:, 0] = 1
    with pytest.raises(da.UnsupportedModelError, match="Kontext"):
        call(model, (8, 12), ids=kontext)
    twice = ids_of((8, 12))
    twice[5] = twice[4]
    with pytest.raises(da.GridError, match="not one full grid"):
        call(model, (8, 12), ids=twice)
    with pytest.raises(da.GridError, match="down_factor=4"):
        da.enable(model, da.Clear(4, down_factor=4))
        call(model, (10, 12))


def test_ids_in_half_precision_are_read():
    """Whole numbers above 256 collapse in bfloat16, which is what pipelines give."""
    assert read_grid(ids_of((300, 270)).bfloat16()) == ((300, 270), None)
    assert read_grid(ids_of((3, 700)).half())[0] == (3, 700)
    assert read_grid(ids_of((4, 6)) * 0.5 + 0.25) == ((4, 6), None)
    with pytest.raises(da.GridError, match="not one full grid"):
        read_grid(torch.zeros(24, 3))


def test_other_models_and_methods_are_refused():
    with pytest.raises(da.UnsupportedModelError, match="UNet2DConditionModel"):
        da.enable(tiny.unet(), da.Clear(4))
    with pytest.raises(da.UnsupportedModelError, match="CLEAR"):
        da.LinFusion.for_model(tiny.transformer())
    with pytest.raises(da.UnsupportedModelError):
        da.enable(tiny.flux(), da.HiDiffusion())


def test_a_part_on_its_own_says_so():
    model = tiny.transformer()
    da.enable(model, da.Clear(4))
    with pytest.raises(da.DiffusionAttnError, match="called on its own"):
        model.transformer_blocks[0].attn(noise(1, 16, 32), noise(1, 5, 32))
    call(model, (8, 12))
    with pytest.raises(da.DiffusionAttnError, match="called on its own"):
        model.transformer_blocks[0].attn(noise(1, 16, 32), noise(1, 5, 32))


def test_who_brings_a_processor_back_is_told():
    """SD3's ``unfuse_qkv_projections`` does, and so may the user."""
    model = tiny.transformer()
    da.enable(model, da.Clear(4))
    call(model, (8, 12))
    kept = model.attn_processors
    da.disable(model)
    model.set_attn_processor(kept)
    with pytest.raises(da.UnsupportedModelError, match="without its rule"):
        call(model, (8, 12))
    with pytest.raises(da.MethodConflictError, match="ClearProcessor"):
        da.enable(model, da.Clear(4))


def test_passes_may_interleave_under_gradient_checkpointing():
    """The backward pass runs layers of a call again after the model has seen other sizes and lengths."""
    grads = []
    for checkpointing in (False, True):
        model = tiny.transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        da.enable(model, da.Clear(3))
        total = 0
        for grid, text in (((8, 12), 5), ((12, 8), 5), ((6, 10), 9)):
            output = model(
                noise(1, grid[0] * grid[1], 16),
                noise(1, text, 12),
                noise(1, 12),
                torch.tensor([0.9]),
                ids_of(grid),
                torch.zeros(text, 3),
                torch.tensor([3.5]),
            ).sample
            total = total + output.square().mean()
            call(model, (16, 4))
        total.backward()
        grads.append(model.x_embedder.weight.grad)
    torch.testing.assert_close(*grads)


def test_blocks_that_were_replaced_by_compiled_ones_are_found(monkeypatch):
    model, method = tiny.transformer(), trained()
    da.enable(model, method)
    expected = call(model, (8, 12))
    da.disable(model)
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend="eager")
    assert len(da.enable(model, method).layers["clear"]) == 4
    torch.testing.assert_close(call(model, (8, 12)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [da.Clear(3), trained(4, 2)], ids=["rule", "pooled"])
def test_compiled_blocks_serve_many_sizes(method):
    """No more often than stock blocks, which compile once for a size and once for all others."""
    model, reference = tiny.transformer(), tiny.transformer()
    da.enable(reference, method)
    counts = {}
    for name in ("stock", "clear"):
        torch.compiler.reset()
        if name == "clear":
            da.enable(model, method)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch._dynamo.utils.counters.clear()
        for height in range(4, 24, 2):
            output = call(model, (height, 10))
            if name == "clear":
                torch.testing.assert_close(output, call(reference, (height, 10)), atol=1e-5, rtol=1e-4)
        counts[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    assert counts["clear"] <= counts["stock"]


def test_what_diffusers_sets_meanwhile_goes_back_with_the_processors():
    model = tiny.transformer()
    da.enable(model, da.Clear(4))
    for processor in model.attn_processors.values():
        processor._attention_backend = "_native_math"
    da.enable(model, da.Clear(5))
    assert {p._attention_backend for p in model.attn_processors.values()} == {"_native_math"}
    da.disable(model)
    assert {p._attention_backend for p in model.attn_processors.values()} == {"_native_math"}


def test_lora_on_sd3_whose_projections_were_fused_and_taken_apart():
    def lora(model):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))

    pipe = tiny.sd3(dual_attention_layers=())
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.unfuse_qkv_projections()
    lora(pipe.transformer)
    plain = tiny.run(pipe, steps=2)
    da.enable(pipe, da.Clear(99))
    torch.testing.assert_close(tiny.run(pipe, steps=2), plain, atol=1e-4, rtol=1e-4)


def test_fused_loras_are_refused_when_weights_are_enabled():
    model = tiny.transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    model.fuse_lora()
    with pytest.raises(da.UnsupportedModelError, match="unfuse_lora"):
        da.enable(model, trained())
    da.enable(model, da.Clear(4))  # the rule alone computes with the model's projections


@pytest.mark.parametrize("order", ["before", "after"])
def test_context_parallelism_and_ip_adapters_are_refused(order):
    model = tiny.transformer()
    adapter = diffusers.models.transformers.transformer_flux.FluxIPAdapterAttnProcessor(32, 12)
    if order == "before":
        model.transformer_blocks[1].attn.set_processor(adapter)
        with pytest.raises(da.MethodConflictError, match="FluxIPAdapterAttnProcessor"):
            da.enable(model, da.Clear(4))
        return
    da.enable(model, da.Clear(4))
    model.transformer_blocks[1].attn.set_processor(adapter)
    with pytest.raises(da.MethodConflictError, match="FluxIPAdapterAttnProcessor"):
        call(model, (8, 12))
    model = tiny.transformer()
    da.enable(model, da.Clear(4))
    for processor in model.attn_processors.values():
        processor._parallel_config = object()
    with pytest.raises(da.UnsupportedModelError, match="context parallelism"):
        call(model, (8, 12))


# ---- with the rest of diffusers


def test_the_attention_backend_stays_in_force_where_attention_is_exact():
    pipe = tiny.flux()
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = "_native_math"
    da.enable(pipe, da.Clear(4))
    assert {p._attention_backend for p in pipe.transformer.attn_processors.values()} == {"_native_math"}
    da.enable(pipe, da.Clear(99))
    tiny.run(pipe)
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = "_native_cudnn"  # there is none on CPUs
    with pytest.raises(RuntimeError, match="No viable backend"):
        tiny.run(pipe)


def flux_controlnet(pipe):
    net = diffusers.FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    return diffusers.FluxControlNetPipeline(**pipe.components, controlnet=seed_parameters(net.eval()))


def sd3_controlnet(pipe):
    net = diffusers.SD3ControlNetModel.from_transformer(pipe.transformer, 2, num_extra_conditioning_channels=0)
    return diffusers.StableDiffusion3ControlNetPipeline(
        **{k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")},
        controlnet=seed_parameters(net.eval()),
    )


@pytest.mark.parametrize(("make", "add"), [(tiny.flux, flux_controlnet), (tiny.sd3, sd3_controlnet)])
def test_with_a_controlnet(make, add):
    pipe = tiny.quiet(add(make()))

    def run(**kwargs):
        torch.manual_seed(0)  # the control image's latents are drawn without the generator
        return tiny.run(pipe, control_image=picture(128), height=128, width=128, steps=2, **kwargs)

    plain = run()
    da.enable(pipe, da.Clear(4, backend="tiles"))
    on = run()
    assert not torch.allclose(on, plain, atol=1e-3)
    assert not torch.allclose(on, run(controlnet_conditioning_scale=0.0), atol=1e-3)
    da.enable(pipe, da.Clear(4, backend="flex"))
    torch.testing.assert_close(run(), on, atol=1e-4, rtol=1e-3)
    da.disable(pipe)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize(
    ("make", "auto"),
    [
        (tiny.flux, diffusers.AutoPipelineForImage2Image),
        (tiny.flux, diffusers.AutoPipelineForInpainting),
        (tiny.sd3, diffusers.AutoPipelineForImage2Image),
    ],
)
def test_image_to_image_and_inpainting(make, auto):
    kwargs = {"image": picture(), "strength": 0.8, "height": 128, "width": 128}
    if auto is diffusers.AutoPipelineForInpainting:
        kwargs |= {"mask_image": picture(mode="L")}
    pipe = tiny.quiet(auto.from_pipe(make()))
    plain = tiny.run(pipe, **kwargs)
    da.enable(pipe, da.Clear(4))
    on = tiny.run(pipe, **kwargs)
    assert on.isfinite().all() and not torch.allclose(on, plain, atol=1e-3)


def test_processors_by_hand():
    """The rule in one line, on diffusers' own terms."""
    from functools import partial

    model, grid = tiny.transformer(), (8, 12)
    da.enable(model, da.Clear(4))
    expected = call(model, grid)
    da.disable(model)
    op = partial(da.ops.local_attention, grid=grid, radius=4, text_tokens=5)
    model.set_attn_processor(da.processors.JointAttnProcessor(op))
    torch.testing.assert_close(call(model, grid), expected)
    model.set_attn_processor(da.processors.JointAttnProcessor())
    torch.testing.assert_close(call(model, grid), call(tiny.transformer(), grid))
