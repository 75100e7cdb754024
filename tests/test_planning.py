"""Plans hold what they promise: FLOPs as torch counts them, peaks as they are measured, and nothing is changed."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_attn as da
from diffusion_attn.core.enable import using
from diffusion_attn.methods import Clear, LowMemory
from diffusion_attn.metrics.cost import measure
from diffusion_attn.planning import forecast, forecast_decode, load_layout, on_meta
from diffusion_attn.planning.forecast import _over_run
from diffusion_attn.planning.inputs import call_of
from tests import tiny

STEPS = 5
TIMESTEPS = torch.arange(STEPS, 0, -1) * (1000 / STEPS)
TEXT = 7
WIDE = {  # wide enough for activations to count, not weights
    "unet": (UNet2DConditionModel, {**tiny.SD, "sample_size": 16, "block_out_channels": (64, 128, 128, 128)}),
    "flux": (FluxTransformer2DModel, {**tiny.FLUX, "num_attention_heads": 8, "attention_head_dim": 64}),
    "sd3": (SD3Transformer2DModel, {**tiny.SD3, "num_attention_heads": 12}),
}
WIDE["unet"][1].update(layers_per_block=1, norm_num_groups=32, attention_head_dim=4)
WIDE["flux"][1].update(num_layers=1, num_single_layers=1, axes_dims_rope=(16, 24, 24))
WIDE["sd3"][1].update(caption_projection_dim=192)
PLANS = {
    "unet": ("unet", (64, 64), lambda model: ()),
    "unet linfusion": ("unet", (64, 64), lambda model: (da.LinFusion.for_model(model),)),
    "unet hidiffusion": ("unet", (64, 64), lambda model: (da.HiDiffusion(),)),
    "unet agent": ("unet", (64, 64), lambda model: (da.AgentAttention(),)),
    # Skips have to go to the disk: on a CPU those that are parked there stay where they are.
    "unet low_memory": ("unet", (64, 64), lambda model: (LowMemory(park_skips="disk"),)),
    "unet linfusion low_memory": (
        "unet",
        (64, 64),
        lambda model: (da.LinFusion.for_model(model), LowMemory(park_skips="disk")),
    ),
    "flux": ("flux", (64, 96), lambda model: ()),
    "flux clear": ("flux", (64, 96), lambda model: (Clear(radius=6),)),
    "sd3": ("sd3", (96, 96), lambda model: ()),
}
BY_STEP = ("unet hidiffusion", "unet agent")


def build(kind):
    torch.manual_seed(0)
    cls, config = WIDE[kind]
    return cls(**config).eval()


def real_call(model, size, batch, step):
    """What a forecast calls a model with, with numbers."""
    call = call_of(on_meta(type(model), model.config, model.dtype), size, batch, TEXT, float(TIMESTEPS[step]))

    def filled(x):
        if isinstance(x, dict):
            return {name: filled(value) for name, value in x.items()}
        return torch.randn(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) and x.is_meta else x

    return filled(call)


def enabling(model, methods):
    return using(model, *methods, timesteps=TIMESTEPS) if methods else nullcontext()


def plan(model, size, methods=(), **options):
    return forecast(
        model, height=size[0], width=size[1], text_tokens=TEXT, methods=methods, steps=STEPS, **{"batch": 2, **options}
    )


# ---- FLOPs


@pytest.mark.parametrize("name", [name for name in PLANS if "low_memory" not in name])
def test_flops_are_those_that_torch_counts_in_a_real_run(name):
    kind, size, methods = PLANS[name]
    size = size[0] // 2, size[1] // 2
    model = build(kind)
    methods = methods(model)
    counted = []
    with torch.no_grad(), enabling(model, methods), sdpa_kernel(SDPBackend.MATH):  # which torch can look into
        for step in range(STEPS):
            with FlopCounterMode(display=False) as counter:
                model(**real_call(model, size, 2, step))
            counted.append(counter.get_total_flops())
    assert plan(model, size, methods).flops == pytest.approx(statistics.mean(counted), rel=0.01)


def test_attention_is_what_is_computed_without_weights():
    model = build("flux")
    tokens, width, layers = 20 * 24 + TEXT, 512, len(model.transformer_blocks) + len(model.single_transformer_blocks)
    cost = plan(model, (40, 48), batch=1)
    assert cost.attention_flops == layers * 4 * tokens**2 * width
    assert cost.attention_share == cost.attention_flops / cost.flops


def exponent(of, methods, sizes=(64, 128)):
    """How ``of`` a forecast grows with the number of tokens."""
    model = build("unet")
    small, large = (of(plan(model, (side, side), methods(model))) for side in sizes)
    return math.log(large / small) / (2 * math.log(sizes[1] / sizes[0]))


def test_linear_attention_grows_with_tokens_and_exact_attention_with_their_square():
    linear = PLANS["unet linfusion"][2]
    assert exponent(lambda cost: cost.flops, linear) <= 1.1
    assert exponent(lambda cost: cost.activation_bytes, linear) <= 1.1
    assert exponent(lambda cost: cost.flops, lambda model: ()) > 1.1
    assert exponent(lambda cost: cost.attention_flops, lambda model: (), (256, 512)) == pytest.approx(2, abs=0.02)
    assert exponent(lambda cost: cost.activation_bytes, lambda model: ()) <= 1.1  # kernels keep no scores


# ---- memory


def peaks(name):
    """In bytes: the forecast, and that of real passes, at the first step and the last where methods tell them apart."""
    kind, size, methods = PLANS[name]
    model = build(kind)
    expected = plan(model, size, methods(model), cpu=True).activation_bytes
    peak = 0
    with torch.no_grad(), enabling(model, methods(model)):
        for step in (0, STEPS - 1) if name in BY_STEP else (0,):
            call = real_call(model, size, 2, step)
            model(**call)  # makes what stays
            for _ in range(3):  # the meter looks now and then, and may miss a peak, but sees none that is not there
                with measure() as cost:
                    model(**call)
                peak = max(peak, cost.peak_bytes)
                if peak > 0.9 * expected:
                    break
    return expected, peak


@pytest.mark.skipif(sys.platform != "linux", reason="tells the C library how to allocate")
def test_peaks_are_those_of_real_runs():
    """In a process whose memory goes back as soon as it is free: the C library else keeps what lies between blocks."""
    script = (
        "import json; from tests.test_planning import PLANS, peaks; "
        "print(json.dumps({name: peaks(name) for name in PLANS}))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
        timeout=250,
    ).stdout
    told = json.loads(told.splitlines()[-1])
    expected, measured = ({name: pair[i] for name, pair in told.items()} for i in range(2))
    assert expected == pytest.approx(measured, rel=0.15)


def test_decoding_in_tiles_takes_less_memory():
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    whole, tiled = (forecast_decode(vae, height=128, width=96, tiled=tiled) for tiled in (False, True))
    assert tiled.activation_bytes < whole.activation_bytes / 4
    assert tiled.weight_bytes == whole.weight_bytes == 4 * sum(x.numel() for x in vae.parameters())
    assert not vae.use_tiling


def test_weights_are_the_models_and_the_methods():
    model = build("unet")
    linfusion = da.LinFusion.for_model(model)
    own = 4 * sum(x.numel() for x in linfusion.parameters())
    assert plan(model, (16, 16), (linfusion,)).weight_bytes == plan(model, (16, 16)).weight_bytes + own
    assert {x.device.type for x in linfusion.parameters()} == {"cpu"}  # the method can still be enabled
    half = plan(on_meta(type(model), model.config, torch.float16), (16, 16))
    assert half.weight_bytes * 2 == plan(model, (16, 16)).weight_bytes
    assert half.activation_bytes < 0.6 * plan(model, (16, 16)).activation_bytes


def test_costs_over_a_run_are_found_from_few_steps():
    asked = []

    def cost_at(step):
        asked.append(step)
        return (1 + (step >= 13) + (step >= 31),)

    assert _over_run(cost_at, 50) == [(1,)] * 13 + [(2,)] * 18 + [(3,)] * 19
    assert len(asked) < 20
    assert _over_run(lambda step: (7,), 1) == [(7,)]


# ---- models


MILLIONS = {"sd15": 859.5, "sd21": 865.9, "sdxl": 2567.5, "flux": 11901.4, "sd3": 2028.3, "sd35-large": 8056.6}


@pytest.mark.parametrize("name", MILLIONS)
def test_layouts_have_the_published_numbers_of_parameters(name):
    layout = load_layout(name)
    count = sum(x.numel() for x in layout.denoiser(torch.bfloat16).parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.1)
    assert sum(x.numel() for x in layout.vae(torch.bfloat16).parameters()) / 1e6 == pytest.approx(83.7, abs=0.2)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.flux, tiny.sd3])
def test_the_layout_of_a_folder_is_read_without_weights(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    layout = load_layout(str(tmp_path))
    model = layout.denoiser(torch.float32)
    own = tiny.denoiser(pipe)
    assert {name: x.shape for name, x in model.named_parameters()} == {n: x.shape for n, x in own.named_parameters()}
    assert layout.scale == 4
    assert forecast(model, height=32, width=32, text_tokens=layout.text_tokens).flops > 0


def test_models_of_other_families_are_refused(tmp_path):
    index = {"_class_name": "X", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(da.UnsupportedModelError, match="PixArt"):
        load_layout(str(tmp_path))
    with pytest.raises(da.UnsupportedModelError, match="AutoencoderKL"):
        forecast(tiny.vae(), height=8, width=8, text_tokens=7)


# ---- nothing is changed


@pytest.mark.parametrize("name", PLANS)
def test_no_trace_is_left(name):
    kind, _, methods = PLANS[name]
    real, meta = build(kind), on_meta(*WIDE[kind], torch.float32)
    for model in (real, meta):
        before = tiny.trace_of(model)
        plan(model, (32, 32), methods(meta))
        assert tiny.trace_of(model) == before
    assert not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack()


def test_no_trace_is_left_by_a_failure():
    meta = on_meta(*WIDE["sd3"], torch.float32)
    before = tiny.trace_of(meta)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        plan(meta, (256, 256))
    with pytest.raises(da.UnsupportedModelError):
        plan(meta, (32, 32), (da.HiDiffusion(),))
    assert tiny.trace_of(meta) == before


def test_a_forecast_can_be_made_again():
    model = build("unet")
    assert plan(model, (32, 32), (da.HiDiffusion(),)) == plan(model, (32, 32), (da.HiDiffusion(),))
