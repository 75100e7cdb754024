"""CLEAR on FLUX and SD3: who sees whom, in whatever order and size tokens come, beside the rest of diffusers."""

import dataclasses

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import diffusion_attn as da
from diffusion_attn.core.joint_layout import read_grid
from diffusion_attn.methods.clear.tokens import find_cells
from diffusion_attn.ops.local_rule import tile_order
from tests import tiny
from tests.golden.seeded import seed_parameters
from tests.tiny import call_flux, clear_weights, image_ids, noise, picture

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
    difference = (
        (call_flux(model, (height, width), hidden) - call_flux(model, (height, width), changed))[0].abs().amax(-1)
    )
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    near = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    assert torch.equal(difference.view(height, width) > 0, near)


@pytest.mark.parametrize("backend", ["reference", "tiles", "flex"])
@pytest.mark.parametrize(
    "method", [da.Clear(4), clear_weights(), clear_weights(3, 2)], ids=["rule", "weights", "pooled"]
)
def test_the_order_of_tokens_does_not_matter(backend, method):
    model, grid = tiny.transformer(), (10, 18)
    da.enable(model, dataclasses.replace(method, backend="reference"))
    hidden, expected = noise(1, 180, 16), call_flux(model, grid)
    order = torch.randperm(180, generator=torch.Generator().manual_seed(0))
    da.enable(model, dataclasses.replace(method, backend=backend))
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(call_flux(model, grid), expected, **close)
    permuted = call_flux(model, grid, hidden[:, order], image_ids(grid)[order])
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
    first = call_flux(model, (12, 8))
    call_flux(model, (8, 16))
    assert torch.equal(call_flux(model, (12, 8)), first)


def test_several_pictures_are_each_their_own():
    pipe = tiny.flux()
    da.enable(pipe, clear_weights())
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
    assert torch.equal(call_flux(model, (8, 12)), call_flux(reference, (8, 12)))
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
                    image_ids(grid),
                    torch.zeros(text, 3),
                    torch.tensor([3.5]),
                ).sample
    assert torch.equal(outputs[512, True], outputs[512, False])
    assert not torch.equal(outputs[5, True], outputs[5, False])


def test_pooling_without_weights_is_the_mean():
    model = tiny.transformer()
    da.enable(model, da.Clear(3, down_factor=2))
    rule = call_flux(model, (8, 12))
    da.enable(model, da.Clear.for_model(model, 3, 2))
    torch.testing.assert_close(call_flux(model, (8, 12)), rule, atol=2e-5, rtol=1e-4)
    da.enable(model, da.Clear(3))
    assert not torch.allclose(call_flux(model, (8, 12)), rule, atol=1e-3)


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


# ---- what is refused


def test_ids_that_are_no_grid_are_refused():
    model = tiny.transformer()
    da.enable(model, da.Clear(4))
    kontext = image_ids((8, 12)).float()
    kontext[48:, 0] = 1
    with pytest.raises(da.UnsupportedModelError, match="Kontext"):
        call_flux(model, (8, 12), ids=kontext)
    twice = image_ids((8, 12))
    twice[5] = twice[4]
    with pytest.raises(da.GridError, match="not one full grid"):
        call_flux(model, (8, 12), ids=twice)
    with pytest.raises(da.GridError, match="down_factor=4"):
        da.enable(model, da.Clear(4, down_factor=4))
        call_flux(model, (10, 12))


def test_ids_in_half_precision_are_read():
    """Whole numbers above 256 collapse in bfloat16, which is what pipelines give."""
    assert read_grid(image_ids((300, 270)).bfloat16()) == ((300, 270), None)
    assert read_grid(image_ids((3, 700)).half())[0] == (3, 700)
    assert read_grid(image_ids((4, 6)) * 0.5 + 0.25) == ((4, 6), None)
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
    call_flux(model, (8, 12))
    with pytest.raises(da.DiffusionAttnError, match="called on its own"):
        model.transformer_blocks[0].attn(noise(1, 16, 32), noise(1, 5, 32))


def test_who_brings_a_processor_back_is_told():
    """SD3's ``unfuse_qkv_projections`` does, and so may the user."""
    model = tiny.transformer()
    da.enable(model, da.Clear(4))
    call_flux(model, (8, 12))
    kept = model.attn_processors
    da.disable(model)
    model.set_attn_processor(kept)
    with pytest.raises(da.UnsupportedModelError, match="without its rule"):
        call_flux(model, (8, 12))
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
                image_ids(grid),
                torch.zeros(text, 3),
                torch.tensor([3.5]),
            ).sample
            total = total + output.square().mean()
            call_flux(model, (16, 4))
        total.backward()
        grads.append(model.x_embedder.weight.grad)
    torch.testing.assert_close(*grads)


def test_blocks_that_were_replaced_by_compiled_ones_are_found(monkeypatch):
    model, method = tiny.transformer(), clear_weights()
    da.enable(model, method)
    expected = call_flux(model, (8, 12))
    da.disable(model)
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend="eager")
    assert len(da.enable(model, method).layers["clear"]) == 4
    torch.testing.assert_close(call_flux(model, (8, 12)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [da.Clear(3), clear_weights(4, 2)], ids=["rule", "pooled"])
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
            output = call_flux(model, (height, 10))
            if name == "clear":
                torch.testing.assert_close(output, call_flux(reference, (height, 10)), atol=1e-5, rtol=1e-4)
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
        da.enable(model, clear_weights())
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
        call_flux(model, (8, 12))
    model = tiny.transformer()
    da.enable(model, da.Clear(4))
    for processor in model.attn_processors.values():
        processor._parallel_config = object()
    with pytest.raises(da.UnsupportedModelError, match="context parallelism"):
        call_flux(model, (8, 12))


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
    with pytest.raises((RuntimeError, ValueError), match=r"No viable backend|bfloat16 or float16"):  # or by its checks
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
    expected = call_flux(model, grid)
    da.disable(model)
    op = partial(da.ops.local_attention, grid=grid, radius=4, text_tokens=5)
    model.set_attn_processor(da.processors.JointAttnProcessor(op))
    torch.testing.assert_close(call_flux(model, grid), expected)
    model.set_attn_processor(da.processors.JointAttnProcessor())
    torch.testing.assert_close(call_flux(model, grid), call_flux(tiny.transformer(), grid))
