"""HiDiffusion's identities, limits, and its life beside everything else that touches a pipeline."""

import inspect
import itertools
import logging
from functools import partial

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import diffusion_attn as da
from diffusion_attn.core.context import StepContext
from diffusion_attn.methods.hidiffusion.regime import Regime, regime
from diffusion_attn.methods.unet_layout import trace_sizes
from tests import tiny
from tests.golden.seeded import seed_parameters


def close(a, b):
    """Equal up to the rounding of another order of summation, after a few steps on values of about ten."""
    torch.testing.assert_close(a, b, atol=5e-4, rtol=1e-3)


def forward(unet, x, timestep=801, **kwargs):
    text = torch.randn(len(x), 5, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    if unet.config.addition_embed_type:
        ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(len(x), 1)
        kwargs["added_cond_kwargs"] = {"text_embeds": torch.ones(len(x), 12), "time_ids": ids}
    with torch.no_grad():
        return unet(x, timestep, text, **kwargs).sample


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEN = torch.arange(901, 0, -100)


# ---- identities


@pytest.mark.parametrize("config", [tiny.SD, tiny.SDXL], ids=["sd", "sdxl"])
def test_raunet_is_the_stock_unet_once_its_steps_are_over(config):
    unet = tiny.unet(config)
    x = noise(2, 4, 32, 40)
    plain = {t: forward(unet, x, t) for t in (901, 501)}
    da.enable(unet, da.HiDiffusion(window_attention=False), timesteps=TEN)
    assert torch.equal(forward(unet, x, 501), plain[501])
    assert not torch.equal(forward(unet, x, 901), plain[901])


def test_native_size_leaves_raunet_off_and_says_so(caplog):
    unet = tiny.unet()
    x = noise(1, 4, 16, 24)
    plain = forward(unet, x, 901)
    da.enable(unet, da.HiDiffusion(window_attention=False), timesteps=TEN)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(forward(unet, x, 901), plain)
        forward(unet, x, 801)
    assert [record.message.startswith("RAU-Net stays off: 16 x 24") for record in caplog.records] == [True]
    da.enable(unet, da.HiDiffusion(window_attention=False, min_size=0), timesteps=TEN)
    assert not torch.equal(forward(unet, x, 901), plain)


def test_rolling_the_input_rolls_the_output():
    grid, k = (16, 24), 2
    q, key, v = noise(3, 1, 2, 16 * 24, 8)
    shift = (k * 8 // 4, k * 12 // 4)

    def roll(x, sign):
        image = x.unflatten(2, grid)
        return torch.roll(image, (sign * shift[0], sign * shift[1]), (2, 3)).flatten(2, 3)

    rolled = da.ops.window_attention(roll(q, -1), roll(key, -1), roll(v, -1), grid=grid)
    close(roll(rolled, 1), da.ops.window_attention(q, key, v, grid=grid, shift=shift))


def test_shifts_repeat_with_the_seed_and_differ_between_steps_and_blocks():
    pipe = tiny.sd()
    da.enable(pipe, da.HiDiffusion(raunet=False))
    first = tiny.run(pipe)
    torch.rand(3)
    assert torch.equal(tiny.run(pipe), first)
    state = torch.random.get_rng_state()
    tiny.run(pipe)
    assert torch.equal(torch.random.get_rng_state(), state)
    da.enable(pipe, da.HiDiffusion(raunet=False, seed=1))
    assert not torch.equal(tiny.run(pipe), first)
    asked = []

    def shift(step, block):
        asked.append((step, block))
        return 0

    da.enable(pipe, da.HiDiffusion(raunet=False, shift=shift))
    tiny.run(pipe, steps=3)
    assert len(asked) == len(set(asked)) == 3 * 5


def record_size(seen, name, module, args):
    seen[name] = tuple(args[0].shape[-2:])


@pytest.mark.parametrize("config", [tiny.SD, tiny.SDXL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("size", [(32, 32), (40, 40), (33, 47), (25, 64), (17, 17), (96, 18)])
def test_traced_sizes_are_the_real_ones(config, size):
    unet = tiny.unet(config, layers_per_block=1) if size == (17, 17) else tiny.unet(config)
    for raunet in itertools.product((False, True), repeat=2):
        ratios = {"t1_ratio": float(raunet[0]), "t2_ratio": float(all(raunet)), "aggressive": False}
        da.enable(unet, da.HiDiffusion(min_size=0, **ratios), timesteps=TEN)
        main = 0 if config is tiny.SD else None
        switches = {"dilated": main, "pooled": 1} if config is tiny.SD else {"dilated": 1, "pooled": 1}
        on = {"dilated": raunet[0], "pooled": all(raunet)}
        if config is tiny.SDXL:
            on = {"dilated": all(raunet), "pooled": raunet[0]}
        sizes = trace_sizes(unet, size, **{name: switches[name] if on[name] else None for name in switches})
        seen: dict = {}
        handles = [
            unet.get_submodule(name).register_forward_pre_hook(partial(record_size, seen, name)) for name in sizes.grids
        ]
        assert forward(unet, noise(1, 4, *size), 901).shape[-2:] == size
        for handle in handles:
            handle.remove()
        assert seen == sizes.grids


# ---- when it is on


@pytest.mark.parametrize("size", [(31, 400), (64, 64)])
def test_thresholds_are_relative_to_the_native_size(size):
    large = regime(da.HiDiffusion(), "sd", StepContext(*size, 1, 10), 16)
    assert large == Regime(dilate=True, pool=min(size) >= 64)


@pytest.mark.parametrize(
    ("sample_size", "channels", "expected"),
    [(16, 4, "sdxl"), (64, 4, "sdxl-turbo"), (16, 9, "sdxl")],
)
def test_sdxl_relatives_are_told_by_structure(sample_size, channels, expected):
    unet = tiny.unet(tiny.SDXL, sample_size=sample_size, in_channels=channels)
    report = da.enable(unet, da.HiDiffusion(), timesteps=TEN)
    dilated = "down_blocks.1.downsamplers.0" in report.layers["hidiffusion"]
    assert dilated == (expected == "sdxl")


def test_inpainting_sdxl_is_not_aggressive():
    unet = tiny.unet(tiny.SDXL, in_channels=9)
    da.enable(unet, da.HiDiffusion(window_attention=False, t1_ratio=0.5), timesteps=TEN)
    grids = []
    mid = unet.mid_block.register_forward_pre_hook(lambda module, args: grids.append(args[0].shape[-1]))
    for t in (901, 801, 501, 401):
        forward(unet, noise(1, 9, 32, 32), t)
    mid.remove()
    assert grids == [4, 4, 4, 8]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"family": "sd3"}, "family='sd3'"),
        ({"t1_ratio": 1.5}, "t1_ratio=1.5"),
        ({"t2_ratio": 0.5}, "t2_ratio=0.5 is above t1_ratio=0.4"),
        ({"t1_ratio": 0.2, "t2_ratio": 0.3}, "raise t1_ratio"),
        ({"shift": 4}, "shift=4"),
        ({"shift": "random"}, "shift='random'"),
        ({"min_size": -1}, "min_size=-1"),
        ({"raunet": False, "window_attention": False}, "nothing is left"),
        ({"control_end": -0.1}, "control_end=-0.1"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(ValueError, match=says):
        da.HiDiffusion(**options)


def test_a_unet_of_unknown_layout_is_refused():
    refiner = tiny.unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(da.UnsupportedModelError, match=r"attention in \[1, 2\]"):
        da.enable(refiner, da.HiDiffusion(), timesteps=TEN)
    with pytest.raises(ValueError, match="aggressive=True is a mode of SDXL"):
        da.enable(tiny.unet(), da.HiDiffusion(aggressive=True), timesteps=TEN)


def test_an_attention_mask_is_refused_with_the_way_out():
    unet = tiny.unet()
    da.enable(unet, da.HiDiffusion(raunet=False), timesteps=TEN)
    mask = torch.ones(1, 32 * 32)
    with pytest.raises(da.UnsupportedModelError, match="window_attention=False"):
        forward(unet, noise(1, 4, 32, 32), attention_mask=mask)


def test_a_shift_out_of_range_names_the_block():
    unet = tiny.unet()
    da.enable(unet, da.HiDiffusion(shift=lambda step, block: 7), timesteps=TEN)
    with pytest.raises(ValueError, match=r"shift\(0, 'down_blocks.0.*returned 7"):
        forward(unet, noise(1, 4, 32, 32), 901)


# ---- state


def test_two_sizes_on_one_pipeline_equal_fresh_runs():
    pipe = tiny.sdxl()
    fresh = {}
    for size in (128, 256):
        with da.using(pipe, da.HiDiffusion()):
            fresh[size] = tiny.run(pipe, size)
    da.enable(pipe, da.HiDiffusion())
    for size in (128, 256, 128):
        assert torch.equal(tiny.run(pipe, size), fresh[size])


def test_a_sibling_pipeline_runs_as_if_alone():
    pipe = tiny.sd()
    da.enable(pipe, da.HiDiffusion())
    expected = tiny.run(pipe, steps=6)
    tiny.run(pipe, steps=5)
    sibling = tiny.quiet(type(pipe)(**pipe.components, requires_safety_checker=False))
    assert torch.equal(tiny.run(sibling, steps=6), expected)


def test_guidance_branch_by_branch_equals_the_batch():
    unet = tiny.unet()
    da.enable(unet, da.HiDiffusion(), timesteps=TEN)
    x = noise(2, 4, 36, 52)
    text = noise(2, 5, 12, seed=4)
    with torch.no_grad():
        for t in (901, 301):
            both = unet(x, t, text).sample
            each = torch.cat([unet(x[i : i + 1], t, text[i : i + 1]).sample for i in range(2)])
            close(each, both)


def test_keyword_arguments():
    unet = tiny.unet()
    da.enable(unet, da.HiDiffusion(), timesteps=TEN)
    x, text = noise(1, 4, 32, 32), noise(1, 5, 12)
    with torch.no_grad():
        by_name = unet(sample=x, timestep=torch.tensor([901]), encoder_hidden_states=text, return_dict=False)[0]
        assert torch.equal(by_name, unet(x, 901, text).sample)


# ---- beside others, in either order


def before_and_after(change, make=tiny.sd, options=None, size=128, **kwargs):
    """The change made before enabling and after it gives the same pictures; so does taking the method off again."""
    options = options or da.HiDiffusion()
    outputs = []
    for order in ("before", "after"):
        pipe = make()
        if order == "before":
            change(pipe)
        da.enable(pipe, options)
        if order == "after":
            change(pipe)
        outputs.append(tiny.run(pipe, size, **kwargs))
        assert da.enabled(pipe) == [options]
    da.disable(pipe)
    plain = make()
    change(plain)
    close(tiny.run(pipe, size, **kwargs), tiny.run(plain, size, **kwargs))
    close(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], tiny.run(plain, size, **kwargs))
    return outputs[0]


@pytest.fixture(scope="module")
def reference():
    pipe = tiny.sd()
    da.enable(pipe, da.HiDiffusion())
    return tiny.run(pipe)


def test_with_fused_projections(reference):
    close(before_and_after(lambda pipe: pipe.fuse_qkv_projections()), reference)


def test_with_attention_slicing(reference):
    close(before_and_after(lambda pipe: pipe.enable_attention_slicing()), reference)


def test_with_processors_set_by_hand(reference):
    close(before_and_after(lambda pipe: pipe.unet.set_attn_processor(da.processors.UNetAttnProcessor())), reference)


def test_with_an_attention_backend(reference):
    def change(pipe):
        pipe.unet.set_attn_processor(da.processors.UNetAttnProcessor())
        for processor in pipe.unet.attn_processors.values():
            processor._attention_backend = "_native_math"

    close(before_and_after(change), reference)


def test_with_freeu():
    before_and_after(lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4))


@pytest.mark.parametrize(
    "targets", [["to_q", "to_v"], ["conv", "conv1", "to_out.0"]], ids=["attention", "convolutions"]
)
def test_with_lora(targets):
    def change(pipe):
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        pipe.unet.add_adapter(config)

    before_and_after(change)


def test_with_lora_weights_loaded_fused_and_unloaded(tmp_path, reference):
    source = tiny.sd()
    torch.manual_seed(0)
    source.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "conv"], init_lora_weights=False))
    layers = get_peft_model_state_dict(source.unet)
    source.save_lora_weights(tmp_path, unet_lora_layers=layers)

    with_lora = before_and_after(lambda pipe: pipe.load_lora_weights(tmp_path))
    pipe = tiny.sd()
    da.enable(pipe, da.HiDiffusion())
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    close(tiny.run(pipe), with_lora)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    close(tiny.run(pipe), reference)


def test_with_perturbed_attention_guidance():
    def guided(pipe):
        pag = tiny.quiet(
            diffusers.AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers=["down_blocks.0"])
        )
        return tiny.run(pag, pag_scale=2.0)

    pipe = tiny.sd()
    plain = guided(pipe)
    da.enable(pipe, da.HiDiffusion())
    on = guided(pipe)
    assert on.isfinite().all() and not torch.allclose(on, plain)
    assert not torch.allclose(on, tiny.run(pipe))
    da.disable(pipe)
    assert torch.equal(guided(pipe), plain)


def ip_adapter(unet):
    projections = {}
    for index, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            width = unet.get_submodule(name.rsplit(".", 1)[0]).to_q.weight.shape[0]
            for kind in "kv":
                projections[f"{index}.to_{kind}_ip.weight"] = noise(width, 12, seed=index) * 0.3
    image = {"proj.weight": noise(4 * 12, 6), "proj.bias": noise(4 * 12)}
    image |= {"norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)}
    return {"image_proj": image, "ip_adapter": projections}


def test_with_an_ip_adapter():
    def change(pipe):
        pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])

    embeds = [torch.cat([torch.zeros(1, 1, 6), noise(1, 1, 6)])]
    with_adapter = before_and_after(change, ip_adapter_image_embeds=embeds)
    pipe = tiny.sd()
    da.enable(pipe, da.HiDiffusion())
    plain = tiny.run(pipe)
    assert not torch.allclose(with_adapter, plain)
    change(pipe)
    pipe.unload_ip_adapter()
    close(tiny.run(pipe), plain)


def offload_sequentially(pipe):
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"), offload_buffers=True)


def offload_as_a_whole(pipe):
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device=torch.device("cpu"))


def offload_in_groups(pipe):
    apply_group_offloading(
        pipe.unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


@pytest.mark.parametrize("offload", [offload_sequentially, offload_as_a_whole, offload_in_groups])
def test_with_offloading(offload, reference):
    close(before_and_after(offload), reference)


def test_offloading_taken_off_again_leaves_the_method(reference):
    pipe = tiny.sd()
    offload_sequentially(pipe)
    da.enable(pipe, da.HiDiffusion())
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    close(tiny.run(pipe), reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    pipe = tiny.sd().to(dtype)
    da.enable(pipe, da.HiDiffusion())
    latents = tiny.run(pipe, (144, 104))
    assert latents.dtype == dtype and latents.isfinite().all()


@pytest.mark.parametrize("size", [(192, 128), (72, 264), (136, 136), (104, 184)])
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_odd_and_oblong_sizes(make, size):
    pipe = make()
    da.enable(pipe, da.HiDiffusion(t1_ratio=0.7, t2_ratio=0.5, aggressive=False))
    latents = tiny.run(pipe, size)
    assert latents.shape[-2:] == (size[1] // 4, size[0] // 4) and latents.isfinite().all()


def count_compilations(run):
    torch._dynamo.utils.counters.clear()
    result = run()
    return result, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("order", ["before", "after", "in place"])
def test_compiled_as_a_whole(reference, fresh_dynamo, order):
    pipe = tiny.sd()
    if order == "before":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        tiny.run(pipe)
    da.enable(pipe, da.HiDiffusion())
    if order == "after":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    if order == "in place":
        pipe.unet.compile(backend="eager")
    latents, _ = count_compilations(lambda: tiny.run(pipe))
    close(latents, reference)
    again, more = count_compilations(lambda: tiny.run(pipe))
    close(again, reference)
    assert more == 0, "a second run of the same regimes compiled again"
    da.disable(pipe)
    plain = tiny.run(tiny.sd())
    assert not torch.allclose(plain, reference)
    close(tiny.run(pipe), plain)


def test_compiled_block_by_block(reference, fresh_dynamo):
    pipe = tiny.sd()
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    tiny.run(pipe)
    da.enable(pipe, da.HiDiffusion())
    latents, _ = count_compilations(lambda: tiny.run(pipe))
    close(latents, reference)
    assert count_compilations(lambda: tiny.run(pipe))[1] == 0


def test_trains_with_gradient_checkpointing():
    grads = []
    for checkpointing in (False, True):
        unet = tiny.unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        da.enable(unet, da.HiDiffusion(t1_ratio=0.7, t2_ratio=0.5), timesteps=TEN)
        unet(noise(1, 4, 36, 44), 901, noise(1, 5, 12)).sample.square().mean().backward()
        grads.append(unet.conv_in.weight.grad)
    close(*grads)


# ---- ControlNet, adapters, other pipelines


def picture(size=128, mode="RGB"):
    return Image.effect_mandelbrot((size, size), (-2, -1.5, 1, 1.5), 20).convert(mode)


def with_controlnet(make, nets=1):
    pipe = make()
    nets = [tiny.controlnet(pipe.unet) for _ in range(nets)]
    controlnet = diffusers.MultiControlNetModel(nets) if len(nets) > 1 else nets[0]
    return tiny.quiet(diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet))


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("nets", [1, 2])
def test_with_controlnets(make, nets):
    pipe = with_controlnet(make, nets)
    image = picture() if nets == 1 else [picture()] * 2
    plain = tiny.run(pipe, image=image)
    da.enable(pipe, da.HiDiffusion())
    full = tiny.run(pipe, image=image)
    da.enable(pipe, da.HiDiffusion(control_reduce=True, control_end=0.6))
    reduced = tiny.run(pipe, image=image)
    assert full.isfinite().all() and not torch.allclose(full, reduced) and not torch.allclose(full, plain)
    da.disable(pipe)
    assert torch.equal(tiny.run(pipe, image=image), plain)


def test_control_ends_where_it_is_told():
    pipe = with_controlnet(tiny.sd)
    seen = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)
    da.enable(pipe, da.HiDiffusion(control_end=0.6))
    inner = pipe.unet.forward

    def look(*args, **kwargs):
        seen.append(kwargs["mid_block_additional_residual"] is not None)
        return inner(*args, **kwargs)

    pipe.unet.forward = look
    tiny.run(pipe, steps=5, image=picture())
    assert seen == [True, True, True, False, False]


def test_text_to_image_control_lengthens_sdxl():
    unet = tiny.unet(tiny.SDXL)
    for controlled, expected in ((False, 4), (True, 5)):
        on = [
            regime(da.HiDiffusion(), "sdxl", StepContext(32, 32, step, 10), 16, controlled=controlled)
            for step in range(10)
        ]
        assert sum(r != Regime() for r in on) == expected
    da.enable(unet, da.HiDiffusion(window_attention=False), timesteps=TEN)
    residuals = {
        "down_block_additional_residuals": [noise(1, c, s, s) for c, s in SDXL_SKIPS],
        "mid_block_additional_residual": noise(1, 24, 8, 8),
    }
    mids = []
    unet.mid_block.register_forward_pre_hook(lambda module, args: mids.append(args[0].shape[-1]))
    for t in (901, 501, 401):
        forward(unet, noise(1, 4, 32, 32), t, **residuals)
    assert mids == [4, 4, 8]


SDXL_SKIPS = [(8, 32), (8, 32), (8, 32), (8, 16), (16, 16), (16, 16), (16, 8), (24, 8), (24, 8)]


def test_residuals_of_the_right_size_are_added_unchanged():
    unet = tiny.unet(tiny.SDXL)
    residuals = {
        "down_block_additional_residuals": tuple(noise(1, c, s, s) for c, s in SDXL_SKIPS),
        "mid_block_additional_residual": noise(1, 24, 8, 8),
    }
    x = noise(1, 4, 32, 32)
    plain = forward(unet, x, 301, **residuals)
    da.enable(unet, da.HiDiffusion(window_attention=False), timesteps=TEN)
    assert torch.equal(forward(unet, x, 301, **residuals), plain)


def test_control_reduce_needs_a_controlnet():
    with pytest.raises(da.UnsupportedModelError, match="control_reduce=True"):
        da.enable(tiny.sd(), da.HiDiffusion(control_reduce=True))


T2I_ADAPTERS = {
    tiny.sd: ("full_adapter", [8, 16, 24, 32], 4, diffusers.StableDiffusionAdapterPipeline),
    tiny.sdxl: ("full_adapter_xl", [8, 16, 24, 24], 8, diffusers.StableDiffusionXLAdapterPipeline),
}


@pytest.mark.parametrize("make", T2I_ADAPTERS)
def test_with_t2i_adapters(make):
    kind, channels, factor, cls = T2I_ADAPTERS[make]
    adapter = diffusers.T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
    seed_parameters(adapter.eval())
    accepted = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in make().components.items() if name in accepted}
    extra = {"requires_safety_checker": False} if make is tiny.sd else {}
    pipe = tiny.quiet(cls(**parts, adapter=adapter, **extra))
    kwargs = {"image": picture(), "height": 128, "width": 128}
    plain = tiny.run(pipe, **kwargs)
    for options in (da.HiDiffusion(), da.HiDiffusion(t1_ratio=1.0, t2_ratio=1.0, aggressive=False)):
        da.enable(pipe, options)
        with_feature = tiny.run(pipe, **kwargs)
        assert with_feature.isfinite().all() and not torch.allclose(with_feature, plain)
        assert not torch.allclose(with_feature, tiny.run(pipe, **kwargs, adapter_conditioning_scale=0.0))


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_image_to_image_and_inpainting(make):
    pipe = make()
    da.enable(pipe, da.HiDiffusion())
    for auto in (diffusers.AutoPipelineForImage2Image, diffusers.AutoPipelineForInpainting):
        other = tiny.quiet(auto.from_pipe(pipe))
        kwargs = {"image": picture(), "strength": 0.8}
        if auto is diffusers.AutoPipelineForInpainting:
            kwargs |= {"mask_image": picture(mode="L"), "height": 128, "width": 128}
        on = tiny.run(other, **kwargs)
        with_plain = make()
        plain = tiny.run(tiny.quiet(auto.from_pipe(with_plain)), **kwargs)
        assert on.isfinite().all() and not torch.allclose(on, plain)


def test_inpainting_unet_of_nine_channels():
    pipe = tiny.sd(in_channels=9)
    pipe = tiny.quiet(diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False))
    da.enable(pipe, da.HiDiffusion())
    latents = tiny.run(pipe, image=picture(), mask_image=picture(mode="L"), height=128, width=128)
    assert latents.isfinite().all()
