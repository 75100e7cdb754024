"""DemoFusion against official numbers and against a plain form of itself, and what it must leave as it was."""

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import diffusion_attn as da
from diffusion_attn.core.session import Session
from diffusion_attn.methods.linfusion.layers import LayerConfig
from diffusion_attn.ops.gaussian_blur import gaussian_blur
from diffusion_attn.pipelines.demofusion import DemoFusion, dilated_convolutions
from tests import tiny
from tests.golden.seeded import seed_parameters, seeded_tensor

FOLDER = Path(__file__).parent / "golden" / "linfusion"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
EXPECTED = load_file(FOLDER / "golden.safetensors")
RUN = {"ratio": 2, "strength": 0.5, "num_inference_steps": 6, "guidance_scale": 5.0, "prompt": tiny.PROMPT}


def check(case, name, actual):
    torch.testing.assert_close(actual, EXPECTED[case["outputs"][name]["tensor"]], **case["tolerance"]["float32_cpu"])


def make(cls=None):
    """A tiny SDXL pipeline with the scheduler that SDXL comes with."""
    pipe = tiny.sdxl()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe if cls is None else tiny.quiet(cls.from_pipe(pipe))


@pytest.fixture
def pipe():
    return make()


@pytest.fixture
def latents():
    return tiny.noise(1, 4, 24, 32, seed=5)


def generator():
    return torch.Generator().manual_seed(3)


# ---- the blur


def dense_blur(x, kernel_size, sigma):
    """The weights of the whole square, on what zeros surround."""
    half = kernel_size // 2
    out = torch.zeros_like(x)
    offsets = range(-half, half + 1)
    total = sum(math.exp(-(a * a + b * b) / (2 * sigma**2)) for a in offsets for b in offsets)
    padded = F.pad(x, [half] * 4)
    for a in offsets:
        for b in offsets:
            weight = math.exp(-(a * a + b * b) / (2 * sigma**2)) / total
            out += weight * padded[..., half + a : half + a + x.shape[2], half + b : half + b + x.shape[3]]
    return out


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["kind"] == "gaussian_filter"])
def test_blur_is_the_official_one(name):
    case = CASES[name]
    spec = case["inputs"]["latents"]["seeded_tensor"]
    check(case, "output", gaussian_blur(seeded_tensor(spec[0], tuple(spec[1])), case["kernel_size"], case["sigma"]))


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 4),
    st.floats(0.05, 9),
)
def test_blur_equals_its_dense_form(shape, half, sigma):
    x = torch.randn(shape, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(x, 2 * half + 1, sigma), dense_blur(x, 2 * half + 1, sigma))


def test_blur_of_one_cell_or_of_a_vanishing_sigma_is_none():
    x = tiny.noise(2, 3, 5, 4)
    assert torch.equal(gaussian_blur(x, 1, 0.8), x)
    assert torch.equal(gaussian_blur(x, 7, 1e-30), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blur_keeps_the_dtype(dtype):
    x = tiny.noise(1, 4, 9, 12)
    out = gaussian_blur(x.to(dtype), 5, 0.8)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), gaussian_blur(x, 5, 0.8), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("bad", [{"kernel_size": 4}, {"kernel_size": -1}, {"sigma": 0.0}, {"sigma": math.nan}])
def test_blur_says_what_it_takes(bad):
    [(name, value)] = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*give"):
        gaussian_blur(tiny.noise(1, 4, 8, 8), **{"kernel_size": 3, "sigma": 0.8, **bad})
    with pytest.raises(ValueError, match=r"\(4, 8, 8\)"):
        gaussian_blur(tiny.noise(4, 8, 8), 3, 0.8)


# ---- the loop


def golden_pipeline(case):
    unet = seed_parameters(UNet2DConditionModel(**case["unet_config"]).eval())
    layers = [LayerConfig(**entry) for entry in case["modules_list"]]
    linfusion = da.LinFusion.for_model(unet, mid_dim={x.dim_n: x.projection_mid_dim for x in layers}.get)
    options = {name: value for name, value in case["scheduler"].items() if name != "class"}
    pipe = StableDiffusionXLPipeline(None, None, None, None, None, unet, EulerDiscreteScheduler(**options))
    da.enable(pipe, seed_parameters(linfusion))
    return tiny.quiet(pipe)


def golden_arguments(case):
    settings = case["settings"]
    embeds = {
        name: seeded_tensor(spec["seeded_tensor"][0], spec["seeded_tensor"][1]) for name, spec in case["inputs"].items()
    }
    return {
        "latents": EXPECTED[case["outputs"]["init_latents"]["tensor"]],
        "noise": EXPECTED[case["outputs"]["noise"]["tensor"]],
        "ratio": settings["ratio"],
        "strength": settings["upscale_strength"],
        "num_inference_steps": settings["num_inference_steps"],
        "guidance_scale": settings["guidance_scale"],
        "size": (settings["height"], settings["width"]),
        **embeds,
    }


def golden_options(case):
    names = ("cosine_scale_1", "cosine_scale_2", "cosine_scale_3")
    return {
        "cosine_scales": tuple(case["settings"][name] for name in names),
        "sigma": case["settings"]["gaussian_sigma"],
    }


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["kind"] == "upscale_loop"])
def test_official_mode_is_the_official_loop(name):
    case = CASES[name]
    pipe, arguments = golden_pipeline(case), golden_arguments(case)
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    check(case, "output", DemoFusion(**golden_options(case), mode="official").refine(pipe, **arguments))
    handle.remove()
    assert seen == [t for t in case["timesteps_used"] for _ in range(2)]
    corrected = DemoFusion(**golden_options(case)).refine(pipe, **arguments)
    with pytest.raises(AssertionError):
        check(case, "output", corrected)


def plain_loop(pipe, latents, noise, options, run, text, *, official=False, unscaled_start=False):
    """The loop as the paper's steps read, with a second UNet for the dilated branch."""
    wide = copy.deepcopy(pipe.unet)
    for conv in (x for x in wide.modules() if isinstance(x, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            conv.dilation, conv.padding = (run["ratio"],) * 2, (run["ratio"],) * 2
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(run["num_inference_steps"])
    sigmas, timesteps = scheduler.sigmas.tolist(), scheduler.timesteps
    size = [4.0 * side for side in latents.shape[2:]]
    ids = torch.tensor([[*size, 0, 0, *size]]).repeat(len(latents), 1)

    def noise_in(unet, x, t, sigma):
        negative, positive = (
            unet(
                x / math.sqrt(sigma**2 + 1), t, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
            ).sample
            for embeds, pooled in text
        )
        return negative + run["guidance_scale"] * (positive - negative)

    def match(x, like):
        scale = like.std((2, 3), keepdim=True) / x.std((2, 3), keepdim=True)
        return (x - x.mean((2, 3), keepdim=True)) * scale + like.mean((2, 3), keepdim=True)

    first = len(timesteps) - math.ceil(run["num_inference_steps"] * run["strength"])
    x = None
    for step in range(first, len(timesteps)):
        t, sigma, after = timesteps[step], sigmas[step], sigmas[step + 1]
        c = (1 + math.cos(math.pi * (1000 - float(t)) / 1000)) / 2
        c1, c2, c3 = (c**scale for scale in options["cosine_scales"])
        noised = latents + sigma * noise
        x = noised if x is None else (1 - c1) * x + c1 * noised
        start = 0 if unscaled_start and step == first else sigma
        plain = x + (after - sigma) * noise_in(pipe.unet, x, t, start)
        blurred = dense_blur(x, 2 * run["ratio"] - 1, options["sigma"] * (0.99 * c3 + 0.01))
        dilated = x + (after - sigma) * noise_in(wide, match(blurred, x), t, after if official else sigma)
        x = (1 - c2) * plain + c2 * dilated
    return match(x, latents)


@pytest.mark.parametrize("mode", ["corrected", "official", "official, unscaled start"])
@pytest.mark.parametrize("ratio", [2, 3])
@torch.no_grad()
def test_equals_the_plain_loop(pipe, latents, mode, ratio):
    latents = torch.cat([latents, latents.flip(-1) + 0.3])
    options = {"cosine_scales": (2.0, 0.5, 1.5), "sigma": 0.9}
    run = {**RUN, "ratio": ratio}
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt([RUN["prompt"]], num_images_per_prompt=2)
    noise = tiny.noise(*latents.shape, seed=8)
    flags = {"official": mode != "corrected", "unscaled_start": "start" in mode}
    expected = plain_loop(pipe, latents, noise, options, run, [(negative, negative_pooled), (embeds, pooled)], **flags)
    method = DemoFusion(**options, mode=mode.split(",")[0])
    refined = method.refine(pipe, latents, **run, noise=noise, unscaled_start=flags["unscaled_start"])
    torch.testing.assert_close(refined, expected, atol=2e-4, rtol=1e-3)
    assert refined.dtype == torch.float32


def test_modes_differ_and_the_left_over_counter_is_of_the_official_one(pipe, latents):
    run = {**RUN, "noise": tiny.noise(*latents.shape)}
    corrected, official = DemoFusion(), DemoFusion(mode="official")
    assert torch.equal(
        corrected.refine(pipe, latents, **run), corrected.refine(pipe, latents, **run, unscaled_start=True)
    )
    outputs = [
        corrected.refine(pipe, latents, **run),
        official.refine(pipe, latents, **run),
        official.refine(pipe, latents, **run, unscaled_start=True),
    ]
    for index, output in enumerate(outputs):
        for other in outputs[:index]:
            assert (output - other).abs().max() > 1e-3


def test_statistics_are_the_anchors(pipe, latents):
    for anchor in (None, 0.3 + 0.7 * tiny.noise(1, 4, 12, 16, seed=9)):
        refined = DemoFusion().refine(pipe, latents, **RUN, anchor=anchor, generator=generator())
        like = latents if anchor is None else anchor
        torch.testing.assert_close(refined.mean((2, 3)), like.mean((2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(refined.std((2, 3)), like.std((2, 3)), atol=1e-5, rtol=1e-4)


def test_the_generator_decides_the_noise(pipe, latents):
    before = torch.get_rng_state()
    first, again = (DemoFusion().refine(pipe, latents, **RUN, generator=generator()) for _ in range(2))
    other = DemoFusion().refine(pipe, latents, **RUN, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    noise = torch.randn(latents.shape, generator=generator())
    assert torch.equal(first, DemoFusion().refine(pipe, latents, **RUN, noise=noise))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_prompts_and_embeddings_come_to_the_same(pipe, latents, guidance_scale):
    latents = torch.cat([latents, -latents])
    run = {**RUN, "guidance_scale": guidance_scale, "noise": tiny.noise(*latents.shape)}
    prompts = [run.pop("prompt"), "a blue circle on a red background"]
    negative = None if guidance_scale == 1 else "a green ring on a white background"
    with torch.no_grad():
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeds = pipe.encode_prompt(prompts, negative_prompt=negative, do_classifier_free_guidance=guidance_scale > 1)
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    by_prompt = DemoFusion().refine(pipe, latents, **run, prompt=prompts, negative_prompt=negative)
    handle.remove()
    by_embeds = DemoFusion().refine(pipe, latents, **run, **dict(zip(names, embeds, strict=True)))
    assert torch.equal(by_prompt, by_embeds)
    assert set(rows) == {2 if guidance_scale == 1 else 4}
    alone = DemoFusion().refine(
        pipe, latents[1:], **{**run, "noise": run["noise"][1:]}, prompt=prompts[1], negative_prompt=negative
    )
    torch.testing.assert_close(by_prompt[1:], alone, atol=1e-4, rtol=1e-3)


def test_the_unet_is_told_the_size(pipe, latents):
    told = []

    def look(module, args, kwargs):
        told.append(kwargs["added_cond_kwargs"]["time_ids"].tolist())

    with_kwargs = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    DemoFusion().refine(pipe, latents, **RUN)
    assert told[0] == [[96, 128, 0, 0, 96, 128]] * 2
    told.clear()
    DemoFusion().refine(pipe, latents, **RUN, size=(200, 300))
    assert told == [[[200, 300, 0, 0, 200, 300]] * 2] * 6
    with_kwargs.remove()


def test_strength_decides_the_steps_and_the_bar_shows_them(pipe, latents, monkeypatch):
    totals = []
    shown = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda total: totals.append(total) or shown(total=total))
    for strength, steps in ((0.01, 1), (0.32, 4), (0.4, 4), (1.0, 10)):
        DemoFusion().refine(pipe, latents, **{**RUN, "strength": strength, "num_inference_steps": 10})
        assert totals.pop() == steps


def test_the_image_to_image_sibling_serves_as_well(pipe, latents):
    other = make(StableDiffusionXLImg2ImgPipeline)
    outputs = [DemoFusion().refine(x, latents, **RUN, generator=generator()) for x in (pipe, other)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(pipe, latents, dtype):
    noise = tiny.noise(*latents.shape)
    exact = DemoFusion().refine(pipe, latents, **RUN, noise=noise)
    pipe.to(dtype)
    refined = DemoFusion().refine(pipe, latents.to(dtype), **RUN, noise=noise)
    assert refined.isfinite().all() and refined.dtype == torch.float32
    assert (refined - exact).abs().mean() < 0.05 * exact.abs().mean()


# ---- what is left as it was


def state_of(module):
    return [
        (conv.dilation, conv.padding, conv.stride, conv._reversed_padding_repeated_twice)
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d)
    ]


def test_convolutions_are_dilated_inside_only(pipe):
    before, trace = state_of(pipe.unet), tiny.trace_of(pipe.unet)
    with dilated_convolutions(pipe.unet, 3):
        for conv in (x for x in pipe.unet.modules() if isinstance(x, nn.Conv2d)):
            reach = 1 if conv.kernel_size == (1, 1) else 3
            assert conv.dilation == (reach, reach)
            assert conv.padding == tuple(reach * (side // 2) for side in conv.kernel_size)
    assert state_of(pipe.unet) == before and tiny.trace_of(pipe.unet) == trace


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_a_dilated_convolution_sees_every_other_cell(padding_mode, padding):
    conv = nn.Conv2d(2, 3, 3, padding=padding, padding_mode=padding_mode)
    x = tiny.noise(1, 2, 8, 8)
    before = conv(x)
    with dilated_convolutions(conv, 2):
        out = conv(x)
    for rows in range(2):
        for columns in range(2):
            torch.testing.assert_close(out[..., rows::2, columns::2], conv(x[..., rows::2, columns::2]))
    assert torch.equal(conv(x), before)


def test_convolutions_under_lora_are_dilated(pipe):
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1"], init_lora_weights="gaussian"))
    before = state_of(pipe.unet)
    layer = pipe.unet.mid_block.resnets[0].conv1
    with dilated_convolutions(pipe.unet, 2):
        assert layer.base_layer.dilation == layer.lora_A["default"].dilation == (2, 2)
        assert layer.lora_B["default"].dilation == (1, 1)
    assert state_of(pipe.unet) == before
    assert DemoFusion().refine(pipe, tiny.noise(1, 4, 24, 32), **RUN).isfinite().all()


class Broken(Exception):
    pass


@pytest.mark.parametrize("call", [None, 1, 2, 4], ids=["no exception", "plain", "dilated", "later"])
def test_everything_is_given_back(pipe, latents, call):
    da.enable(pipe, da.HiDiffusion(min_size=0))
    tiny.run(pipe, steps=3)
    scheduler, session = pipe.scheduler, Session.of(pipe.unet)
    schedule, state = session.schedule, dict(vars(scheduler))
    before, trace = state_of(pipe.unet), tiny.trace_of(pipe.unet)
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == call:
            raise Broken

    handle = pipe.unet.mid_block.resnets[0].register_forward_pre_hook(fail)
    if call is None:
        DemoFusion().refine(pipe, latents, **RUN)
    else:
        with pytest.raises(Broken):
            DemoFusion().refine(pipe, latents, **RUN)
    handle.remove()
    assert state_of(pipe.unet) == before and tiny.trace_of(pipe.unet) == trace
    assert pipe.scheduler is scheduler and session.schedule is schedule
    assert (
        all(vars(scheduler)[name] is value for name, value in state.items()) and vars(scheduler).keys() == state.keys()
    )


@pytest.mark.parametrize("method", [da.HiDiffusion(min_size=0), da.AgentAttention(), da.TokenMerging(), "linfusion"])
def test_methods_in_force_work_inside_and_after(pipe, latents, method):
    plain = DemoFusion().refine(pipe, latents, **RUN, generator=generator())
    if method == "linfusion":
        method = seed_parameters(da.LinFusion.for_model(pipe.unet))
    da.enable(pipe, method)
    generated = tiny.run(pipe, steps=4)
    refined = DemoFusion().refine(pipe, latents, **RUN, generator=generator())
    assert refined.isfinite().all() and not torch.equal(refined, plain)
    assert torch.equal(refined, DemoFusion().refine(pipe, latents, **RUN, generator=generator()))
    assert torch.equal(tiny.run(pipe, steps=4), generated)
    da.disable(pipe)
    assert torch.equal(DemoFusion().refine(pipe, latents, **RUN, generator=generator()), plain)


def other_pipeline(pipe):
    return StableDiffusionXLPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})


@pytest.mark.parametrize("enabled_on", ["it", "another pipeline", "the UNet"])
@pytest.mark.parametrize("mode", ["corrected", "official"])
def test_methods_are_told_the_step(pipe, latents, enabled_on, mode):
    owner = other_pipeline(pipe)
    if enabled_on == "the UNet":
        da.enable(pipe.unet, da.HiDiffusion(min_size=0), timesteps=torch.tensor([801.0, 401.0, 1.0]))
    else:
        da.enable(pipe if enabled_on == "it" else owner, da.HiDiffusion(min_size=0))
    seen = []

    def look(module, args):
        context = Session.of(pipe.unet).context()
        seen.append((context.step, context.steps, context.skipped))

    handle = pipe.unet.mid_block.register_forward_pre_hook(look)
    DemoFusion(mode=mode).refine(pipe, latents, **RUN)
    handle.remove()
    assert seen == [(step, 3, 3) for step in range(3) for _ in range(2)]


def test_compiled_convolutions_notice():
    stack = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), nn.Conv2d(3, 2, 3, padding=1))
    compiled, x = torch.compile(stack, backend="eager", fullgraph=True), tiny.noise(1, 2, 8, 8)
    before = compiled(x)
    with dilated_convolutions(compiled, 2):
        torch.testing.assert_close(compiled(x), stack(x))
    assert torch.equal(compiled(x), before)


# ---- errors


@pytest.mark.parametrize(
    "bad",
    [
        {"cosine_scales": (3.0, 1.0)},
        {"cosine_scales": (3.0, -1.0, 1.0)},
        {"cosine_scales": (3.0, math.nan, 1.0)},
        {"sigma": 0.0},
        {"sigma": math.inf},
        {"mode": "exact"},
    ],
)
def test_options_are_checked(bad):
    [(name, value)] = bad.items()
    with pytest.raises(ValueError, match=f"{name}=.*give") as error:
        DemoFusion(**bad)
    assert repr(value) in str(error.value)
    assert asdict(DemoFusion()) == {"cosine_scales": (3.0, 1.0, 1.0), "sigma": 0.8, "mode": "corrected"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ratio": 1}, "ratio=1"),
        ({"ratio": 2.0}, "ratio=2.0"),
        ({"strength": 0.0}, "strength=0.0"),
        ({"strength": 1.2}, "strength=1.2"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"latents": torch.zeros(4, 8, 8)}, r"\(4, 8, 8\)"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 8, 8\)"),
        ({"noise": torch.zeros(1, 4, 8, 8)}, "noise has the shape"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "list of 2 for 1 rows"),
        ({"anchor": torch.zeros(2, 4, 8, 8)}, "anchor has the shape"),
        ({"prompt": None}, "prompt_embeds missing"),
        ({"prompt": ["a", "b"]}, "2 prompts for 1 rows"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt_embeds": torch.zeros(1, 5, 24)}, "prompt_embeds given"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 5, 24)}, "pooled_prompt_embeds is missing"),
        ({"negative_prompt_embeds": torch.zeros(1, 5, 24)}, "negative_pooled_prompt_embeds is missing"),
    ],
)
def test_arguments_are_checked(pipe, latents, bad, message):
    with pytest.raises(ValueError, match=message):
        DemoFusion().refine(pipe, **{"latents": latents, **RUN, **bad})


def refiner(pipe):
    pipe.register_to_config(requires_aesthetics_score=True)
    return pipe


def with_scheduler(change):
    def build():
        pipe = make()
        pipe.scheduler = change(pipe.scheduler)
        return pipe

    return build


def continuous(scheduler):
    return EulerDiscreteScheduler.from_config(
        scheduler.config, timestep_type="continuous", prediction_type="v_prediction"
    )


def with_ip_adapter():
    pipe = make()
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return pipe


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny.sd, "no pipeline of SDXL"),
        (tiny.flux, "no pipeline of SDXL"),
        (lambda: refiner(make()), "no pipeline of SDXL"),
        (tiny.sdxl, r"DDIMScheduler.*EulerDiscreteScheduler.from_config\(pipe.scheduler.config\)"),
        (with_scheduler(continuous), "continuous"),
        (with_ip_adapter, "unload_ip_adapter"),
    ],
    ids=["sd", "flux", "refiner", "ddim", "continuous", "ip-adapter"],
)
def test_pipelines_are_checked_before_any_work(build, message, latents):
    pipe = build()
    pipe.encode_prompt = None  # would raise if it came to that
    with pytest.raises(da.UnsupportedModelError, match=message):
        DemoFusion().refine(pipe, latents, **RUN)
