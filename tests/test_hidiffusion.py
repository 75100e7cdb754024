"""HiDiffusion's identities, limits, and its life beside everything else that touches a pipeline."""

import itertools
import logging
from functools import partial

import diffusers
import pytest
import torch

import diffusion_attn as da
from diffusion_attn.core.context import StepContext
from diffusion_attn.core.unet_layout import trace_sizes
from diffusion_attn.methods.hidiffusion.regime import Regime, regime
from tests import tiny
from tests.tiny import forward, noise, picture


def close(a, b):
    """Equal up to the rounding of another order of summation, after a few steps on values of about ten."""
    torch.testing.assert_close(a, b, atol=5e-4, rtol=1e-3)


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


# ---- beside others (what every method has to live with is in test_matrix.py)


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


@pytest.mark.parametrize("size", [(192, 128), (72, 264), (136, 136), (104, 184)])
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_odd_and_oblong_sizes(make, size):
    pipe = make()
    da.enable(pipe, da.HiDiffusion(t1_ratio=0.7, t2_ratio=0.5, aggressive=False))
    latents = tiny.run(pipe, size)
    assert latents.shape[-2:] == (size[1] // 4, size[0] // 4) and latents.isfinite().all()


# ---- ControlNet, adapters, other pipelines


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


@pytest.mark.parametrize("make", tiny.T2I_ADAPTERS)
def test_features_of_t2i_adapters_reach_every_regime(make):
    pipe = tiny.with_t2i_adapter(make)
    kwargs = {"image": picture(), "height": 128, "width": 128}
    for options in (da.HiDiffusion(), da.HiDiffusion(t1_ratio=1.0, t2_ratio=1.0, aggressive=False)):
        da.enable(pipe, options)
        with_feature = tiny.run(pipe, **kwargs)
        assert not torch.allclose(with_feature, tiny.run(pipe, **kwargs, adapter_conditioning_scale=0.0))


def test_inpainting_unet_of_nine_channels():
    pipe = tiny.sd(in_channels=9)
    pipe = tiny.quiet(diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False))
    da.enable(pipe, da.HiDiffusion())
    latents = tiny.run(pipe, image=picture(), mask_image=picture(mode="L"), height=128, width=128)
    assert latents.isfinite().all()
