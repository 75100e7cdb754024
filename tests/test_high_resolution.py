"""The ladder: its rungs, what stock pipelines make of the same settings, and runs that break off."""

import errno
import json
import math
from functools import partial
from itertools import pairwise

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, AutoPipelineForImage2Image, AutoPipelineForText2Image, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import diffusion_attn as da
from diffusion_attn.pipelines import DemoFusion, HighResolutionPipeline, Ladder, Stage
from diffusion_attn.pipelines.autoencoder import decode, encode, tiled
from diffusion_attn.pipelines.pictures import open_png, to_picture, to_pixels
from tests import tiny
from tests.golden.seeded import seed_parameters

TWO = (Stage(96, 64), Stage(208, 144, 0.6))


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def ladder_of(pipe, **kwargs):
    made = HighResolutionPipeline.from_pipe(pipe, **kwargs)
    made.set_progress_bar_config(disable=True)
    return made


def run(made, prompt=tiny.PROMPT, size=(200, 136), **kwargs):
    kwargs = {"ladder": TWO, "num_inference_steps": 5, "generator": generator(), **kwargs}
    return made(prompt, height=size[0], width=size[1], **kwargs)


def same(a, b):
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))


def difference(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


# ---- the rungs


def rungs(stages):
    return [(stage.name, stage.strength) for stage in stages]


def test_the_published_ladders():
    stages = Ladder.PRESETS["linfusion"].stages((8192, 16384), (512, 512), 8)
    assert rungs(stages) == [
        ("512x1024", None),
        ("1024x2048", 0.4),
        ("2048x4096", 0.3),
        ("4096x8192", 0.2),
        ("8192x16384", 0.1),
    ]
    assert rungs(Ladder.PRESETS["clear"].stages((2048, 4096), (1024, 1024), 16)) == [
        ("512x1024", None),
        ("2048x4096", 0.7),
    ]
    assert rungs(Ladder.PRESETS["demofusion"].stages((1024, 2048), (1024, 1024), 8)) == [
        ("512x1024", None),
        ("1024x2048", 0.32),
    ]
    above = Ladder.PRESETS["demofusion"].above((512, 1024), (8192, 16384), 8)
    assert [stage.strength for stage in above] == [0.32, 0.24, 0.16, 0.08]
    assert [stage.name for stage in above] == ["1024x2048", "2048x4096", "4096x8192", "8192x16384"]


@given(
    st.integers(64, 20000),
    st.integers(64, 20000),
    st.sampled_from([64, 512, 1024]),
    st.sampled_from([8, 16]),
    st.sampled_from(sorted(Ladder.PRESETS)),
)
def test_any_target_is_reached_in_steps_of_the_factor(height, width, native, multiple, preset):
    rule = Ladder.PRESETS[preset]
    stages = rule.stages((height, width), (native, native), multiple)
    assert stages[0].strength is None and all(0 < stage.strength <= 1 for stage in stages[1:])
    assert 0 <= stages[-1].height - height < multiple and 0 <= stages[-1].width - width < multiple
    assert all(side % multiple == 0 for stage in stages for side in (stage.height, stage.width))
    for below, above in pairwise(stages):
        assert above.height * above.width >= below.height * below.width
        # Sizes on the way are rounded to an eighth of the native side.
        slack = 1 + 1.2 * native / 8 / min(below.height, below.width)
        assert above.height / below.height <= rule.factor * slack * 1.05
    base = stages[0]
    if len(stages) > 1 and rule.fit == "area" and max(height, width) < 4 * min(height, width):
        assert 0.6 < math.sqrt(base.height * base.width) / native < 1.4


def test_a_base_that_a_method_draws_is_larger():
    plain, larger = (Ladder(base_scale=scale).stages((512, 512), (64, 64), 8) for scale in (1, 2))
    assert (plain[0].height, larger[0].height) == (64, 128) and len(plain) == len(larger) + 1


# ---- against stock pipelines


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.flux, tiny.sd3])
def test_it_is_the_stock_cascade(make):
    pipe = make()
    sizes = {"max_sequence_length": 16} if make in (tiny.flux, tiny.sd3) else {}
    result = run(ladder_of(pipe), negative_prompt="a cross", **sizes)
    assert [stage.stage.name for stage in result.stages] == ["96x64", "208x144"]
    assert result.images[0].size == (136, 200)

    call = {"num_inference_steps": 5, "negative_prompt": "a cross", **sizes}
    base = pipe(tiny.PROMPT, height=96, width=64, generator=generator(), **call).images[0]
    assert same(result.stages[0].images[0], base)
    refine = tiny.quiet(AutoPipelineForImage2Image.from_pipe(pipe))
    sides = {"height": 208, "width": 144} if sizes else {}
    large = base.resize((144, 208))
    above = refine(tiny.PROMPT, image=large, strength=0.6, generator=generator(), **call, **sides).images[0]
    # The stock pipeline hands the picture to the autoencoder over numpy: a last bit may differ.
    assert difference(result.stages[1].images[0], above) <= 1
    assert same(result.images[0], result.stages[1].images[0].crop((4, 4, 140, 204)))


def test_at_the_native_size_there_is_one_stage():
    pipe = tiny.sd()
    result = ladder_of(pipe)(tiny.PROMPT, height=64, width=64, num_inference_steps=3, generator=generator())
    assert len(result.stages) == 1
    plain = pipe(tiny.PROMPT, height=64, width=64, num_inference_steps=3, generator=generator())
    assert same(result.images[0], plain.images[0])


def test_methods_are_in_force_where_they_are_asked_for_and_nowhere_after():
    pipe = tiny.sd()
    trace = tiny.trace_of(pipe.unet)
    lin = seed_parameters(da.LinFusion.for_model(pipe.unet, mid_dim=4))
    result = run(ladder_of(pipe, methods=[lin], base_methods=[da.HiDiffusion()]))
    assert [stage.methods for stage in result.stages] == [["hidiffusion"], ["linfusion"]]
    plain = run(ladder_of(pipe))
    assert not same(result.stages[0].images[0], plain.stages[0].images[0])
    assert tiny.trace_of(pipe.unet) == trace


def test_several_prompts_are_the_pictures_they_are_alone():
    made = ladder_of(tiny.sd())
    prompts = [tiny.PROMPT, "a green cross on a black background"]
    both = run(made, prompts, generator=[generator(1), generator(2)])
    alone = run(made, prompts[1], generator=generator(2))
    assert len(both.images) == 2 and same(both.images[1], alone.images[0])


def test_the_fixed_shift_of_the_clear_cascade_is_taken_back():
    pipe = tiny.flux()
    made = ladder_of(pipe, methods=[da.Clear(radius=3)])
    shifts = []

    def note(pipe, step, timestep, kwargs):
        shifts.append(pipe.scheduler.config.shift if not pipe.scheduler.config.use_dynamic_shifting else None)
        return kwargs

    before = made.image2image.scheduler
    made(tiny.PROMPT, height=512, width=256, num_inference_steps=4, ladder="clear", callback_on_step_end=note)
    assert 3.0 in shifts and made.image2image.scheduler is before


@pytest.mark.parametrize("embedded", [True, False])
def test_the_guidance_of_the_clear_cascade_is_the_embedded_one(embedded):
    """A distilled model without that input would be held against an empty prompt, seven and a half times."""
    pipe = tiny.flux(guidance_embeds=embedded)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    made = ladder_of(pipe, methods=[da.Clear(radius=3)])
    made(tiny.PROMPT, height=512, width=256, num_inference_steps=4, guidance_scale=1.0, ladder="clear")
    told = [call["guidance"].item() if call.get("guidance") is not None else None for call in seen]
    assert told == ([1.0] * 4 + [7.5] * 6 if embedded else [None] * 10)  # of the two larger stages three steps each


@pytest.mark.parametrize("mode", ["corrected", "official"])
def test_demofusion(mode, tmp_path):
    pipe = tiny.sdxl()
    made = ladder_of(pipe)
    with pytest.raises(da.UnsupportedModelError, match="EulerDiscreteScheduler"):
        run(made, refine="demofusion")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    made = ladder_of(pipe)
    go = partial(run, made, refine=DemoFusion(mode=mode), ladder=None, size=(128, 128), output_dir=tmp_path)
    result = go()
    assert [stage.stage.name for stage in result.stages] == ["64x64", "128x128"]
    assert not same(result.images[0], run(made, ladder="demofusion", size=(128, 128)).images[0])
    (tmp_path / "stage-2-128x128.png").unlink()
    assert same(go(resume=True).images[0], result.images[0])  # with the base's statistics, kept beside it
    enlarged = made.upscale(result.stages[0].images[0], tiny.PROMPT, scale=2, refine=DemoFusion(mode=mode))
    assert enlarged.images[0].size == (128, 128)
    with pytest.raises(TypeError, match="'guidance_rescale' is no argument of DemoFusion's loop"):
        go(guidance_rescale=0.5)


def test_upscale():
    made = ladder_of(tiny.sd())
    picture = tiny.picture().resize((72, 48))
    result = made.upscale(picture, tiny.PROMPT, scale=3, num_inference_steps=10, generator=generator())
    assert [stage.stage.name for stage in result.stages] == ["72x112", "144x216"]
    assert result.images[0].size == (216, 144)
    again = made.upscale(picture, tiny.PROMPT, height=144, width=216, num_inference_steps=10, generator=generator())
    assert same(again.images[0], result.images[0])
    stronger = made.upscale(picture, tiny.PROMPT, scale=1, strength=0.9, num_inference_steps=4, generator=generator())
    assert [stage.stage.strength for stage in stronger.stages] == [0.9]


# ---- memory


@pytest.mark.parametrize("make", [tiny.sd, tiny.flux])
def test_the_exact_switches_draw_the_same_picture(make):
    made = ladder_of(make())
    plain, low = run(made), run(made, memory=da.LowMemory(park_skips="disk"))
    assert low.stages[1].methods == ["low_memory"]
    assert difference(plain.images[0], low.images[0]) <= 1


def test_low_tiles_the_autoencoder_and_leaves_it_as_it_was():
    pipe = tiny.sd()
    made, tiles = ladder_of(pipe), []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: tiles.append(tuple(args[0].shape[-2:])))
    run(made, memory="low", vae_tile=64)
    assert (16, 16) in tiles and (52, 36) not in tiles
    assert not pipe.vae.use_tiling


@pytest.mark.parametrize("name", ["shapes-sd", "shapes-flux"])
def test_seams_are_below_what_the_autoencoder_loses(name):
    """Tiles are held to 38 dB of the whole picture; by diffusers alone, a plain background is 20 dB off."""
    pipe = da.shapes.load_pipeline(name)
    rng = np.random.default_rng(0)
    for _ in range(4):
        picture = da.shapes.render(da.shapes.sample_scene(rng), 256).convert("RGB")
        pixels = to_pixels(picture)
        latents = encode(pipe, pixels, generator())
        whole = decode(pipe, latents, (256, 256))
        with tiled(pipe.vae, 64):
            seams = decode(pipe, latents, (256, 256))
            tiles = encode(pipe, pixels, generator())
        with tiled(pipe.vae, 256):
            torch.testing.assert_close(decode(pipe, latents, (256, 256)), whole, atol=1e-5, rtol=0)
        assert -10 * (seams - whole).square().mean().log10() > 38
        assert (decode(pipe, tiles, (256, 256)) - whole).square().mean() < 10**-3


def test_pictures_pass_through_tensors_unchanged():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 333, 3), np.uint8))
    assert same(to_picture(to_pixels(picture)[0]), picture)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.flux, tiny.sd3])
def test_in_half_precision(make):
    pipe = make().to(torch.bfloat16 if make is tiny.flux else torch.float16)
    result = run(ladder_of(pipe), memory="low")
    assert np.asarray(result.images[0]).std() > 1
    assert pipe.vae.dtype != torch.float32


def test_offloaded_models_draw_the_same():
    pipe = tiny.sd()
    plain = run(ladder_of(pipe))
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"), offload_buffers=True)
    accelerate.cpu_offload_with_hook(pipe.vae, execution_device=torch.device("cpu"))
    assert same(run(ladder_of(pipe)).images[0], plain.images[0])


def test_tiles_of_an_autoencoder_whose_weights_are_elsewhere():
    pipe = tiny.sd()
    in_tiles = run(ladder_of(pipe), vae_tile=64)
    accelerate.cpu_offload(pipe.vae, execution_device=torch.device("cpu"), offload_buffers=True)
    assert same(run(ladder_of(pipe), vae_tile=64).images[0], in_tiles.images[0])


def test_low_memory_among_the_methods_is_not_in_the_way():
    result = run(ladder_of(tiny.sd(), methods=[da.LowMemory(one_row=False)]), memory="low")
    assert [stage.methods for stage in result.stages] == [["low_memory"]] * 2


def test_further_texts_go_with_their_prompts():
    made = ladder_of(tiny.sdxl())
    texts = {"negative_prompt": ("red", "blue"), "negative_prompt_2": ["blue", "red"], "prompt_2": "a ring"}
    both = run(made, ["a cross", "a star"], generator=[generator(1), generator(2)], **texts)
    second = {"negative_prompt": "blue", "negative_prompt_2": "red", "prompt_2": "a ring"}
    assert same(both.images[1], run(made, "a star", generator=generator(2), **second).images[0])


def test_few_steps_of_flow_matching_are_rounded_up():
    result = run(ladder_of(tiny.flux()), num_inference_steps=2, ladder=[TWO[0], Stage(208, 144, 0.2)])
    assert result.images[0].size == (136, 200)


# ---- runs that break off


class Stop(Exception):
    pass


def stop_after(number):
    def callback(result):
        if len(finished) == number - 1:
            raise Stop
        finished.append(result)

    finished = []
    return callback


THREE = (Stage(64, 64), Stage(96, 96, 0.6), Stage(128, 128, 0.6))


def test_a_run_goes_on_where_it_broke_off(tmp_path):
    made = ladder_of(tiny.sd())
    go = partial(run, made, size=(128, 128), ladder=THREE)
    whole = go()
    with pytest.raises(Stop):
        go(output_dir=tmp_path, callback_on_stage_end=stop_after(2))
    assert [stage.stage.name for stage in made.finished] == ["64x64", "96x96"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stage-1-64x64.png",
        "stage-2-96x96.png",
        "stages.json",
    ]
    steps = []
    rest = go(output_dir=tmp_path, resume=True, callback_on_step_end=lambda p, i, t, k: steps.append(i) or k)
    assert len(steps) == 3 and same(rest.images[0], whole.images[0])
    assert rest.stages[0].files == [tmp_path / "stage-1-64x64.png"] and rest.stages[0].seconds > 0


def test_other_settings_are_not_gone_on_with(tmp_path):
    made = ladder_of(tiny.sd())
    run(made, output_dir=tmp_path)
    with pytest.raises(da.DiffusionAttnError, match="another prompts"):
        run(made, "a green cross", output_dir=tmp_path, resume=True)
    run(made, "a green cross", output_dir=tmp_path)  # without resume, begin anew


def test_a_generator_that_a_broken_run_has_used_goes_on_with_it(tmp_path):
    made, g = ladder_of(tiny.sd()), generator()
    with pytest.raises(Stop):
        run(made, generator=g, output_dir=tmp_path, callback_on_stage_end=stop_after(1))
    rest = run(made, generator=g, output_dir=tmp_path, resume=True)
    assert same(rest.images[0], run(made).images[0])


@pytest.mark.parametrize(
    "change",
    [
        {"target_size": (16, 16)},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"guidance_rescale": 0.5},
        {"negative_prompt": "a cross"},
        {"prompt_2": ["a ring"]},
        {"ladder": [TWO[0], Stage(208, 144, 0.8)]},
    ],
)
def test_every_option_is_compared(change, tmp_path):
    made = ladder_of(tiny.sdxl())
    few = {"num_inference_steps": 2, "output_dir": tmp_path}
    run(made, **few)
    with pytest.raises(da.DiffusionAttnError, match=r"another (options|stages)"):
        run(made, resume=True, **{**few, **change})


def test_a_broken_file_is_drawn_again(tmp_path):
    made = ladder_of(tiny.sd())
    first = run(made, output_dir=tmp_path)
    path = tmp_path / "stage-2-208x144.png"
    path.write_bytes(path.read_bytes()[:100])
    assert same(run(made, output_dir=tmp_path, resume=True).images[0], first.images[0])


def test_missing_memory_names_the_stage_and_the_switch():
    pipe = tiny.sd()
    made = ladder_of(pipe)

    def fill(module, args):
        if args[0].shape[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe.unet.conv_in.register_forward_pre_hook(fill)
    with pytest.raises(da.DiffusionAttnError, match=r"stage 2 \(208x144\); try memory='low'") as caught:
        run(made)
    assert "1 of 2 stages are finished" in str(caught.value) and len(made.finished) == 1


def test_a_full_disk_names_the_stage(tmp_path, monkeypatch):
    made = ladder_of(tiny.sd())
    save = Image.Image.save

    def full(image, *args, **kwargs):
        if image.width > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(da.DiffusionAttnError, match=r"stage 2 \(208x144\) is not saved: the disk is full.*resume=True"):
        run(made, output_dir=tmp_path)
    assert not list(tmp_path.glob("*.part")) and (tmp_path / "stage-1-96x64.png").is_file()
    assert list(json.loads((tmp_path / "stages.json").read_text())["stages"]) == ["1"]


def test_a_full_disk_under_the_base_of_demofusion(tmp_path, monkeypatch):
    pipe = tiny.sdxl()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffusion_attn.pipelines.stage_files.save_file", full)
    with pytest.raises(da.DiffusionAttnError, match=r"stage 1 .* is not saved: the disk is full"):
        run(ladder_of(pipe), refine="demofusion", ladder=None, size=(128, 128), output_dir=tmp_path)


def test_pictures_beyond_pillows_limit(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("RGB", (300, 200), "red").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert open_png(path, (200, 300)).getpixel((5, 5)) == (255, 0, 0)
    with pytest.raises(OSError, match="100x300 was expected"):
        open_png(path, (100, 300))


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": (0, 64)}, ValueError, "height=0"),
        ({"ladder": "steep"}, ValueError, "ladder='steep': expected one of auto, linfusion"),
        ({"ladder": [Stage(64, 64)]}, ValueError, "ends at 64x64, below height=200"),
        ({"ladder": [Stage(64, 64, 0.3)]}, ValueError, "the first without strength"),
        ({"refine": "more"}, ValueError, "refine='more'"),
        ({"memory": "tiny"}, ValueError, "memory='tiny'"),
        ({"vae_tile": 30}, ValueError, "vae_tile=30: expected a multiple of 4"),
        ({"num_inference_steps": 1}, ValueError, "leaves no step at 208x144; give 2 or more"),
        ({"resume": True}, ValueError, "output_dir"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt holds 2"),
        ({"prompt": []}, ValueError, "0 prompts"),
        ({"prompt": ["a", "b"]}, ValueError, "one for each"),
        ({"generator": [generator()] * 2}, ValueError, "generator holds 2"),
        ({"eta_": 1}, TypeError, "'eta_' is no argument"),
        ({"strength": 0.5}, TypeError, r"give ladder=Ladder\(strength=...\)"),
        ({"latents": torch.zeros(1)}, TypeError, "'latents' is no argument"),
        ({"output_type": "np"}, TypeError, "'output_type' is no argument"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_drawn(change, error, message):
    pipe = tiny.sd()
    made = ladder_of(pipe)
    pipe.unet.register_forward_pre_hook(lambda module, args: pytest.fail("something was drawn"))
    with pytest.raises(error, match=message):
        run(made, **change)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "either scale, or both sides"),
        ({"scale": 2, "height": 8, "width": 8}, "either scale, or both sides"),
        ({"scale": 0.001}, "larger scale"),
        ({"scale": 2, "ladder": [Stage(8, 8)]}, "give a Ladder"),
        ({"scale": 2, "image": []}, "not all of one size"),
        ({"scale": 2, "prompt": ["a", "b"]}, "2 prompts for 1 pictures"),
    ],
)
def test_bad_arguments_of_upscale(kwargs, message):
    call = {"image": tiny.picture(), "prompt": tiny.PROMPT, **kwargs}
    with pytest.raises(ValueError, match=message):
        ladder_of(tiny.sd()).upscale(**call)


def test_what_has_no_siblings_is_refused():
    pipe = tiny.sd()
    with pytest.raises(da.UnsupportedModelError, match="ControlNet"):
        net = tiny.controlnet(pipe.unet)
        HighResolutionPipeline.from_pipe(AutoPipelineForText2Image.from_pipe(pipe, controlnet=net))
    with pytest.raises(da.UnsupportedModelError, match="no text-to-image and image-to-image siblings"):
        HighResolutionPipeline.from_pipe(da.pipelines.PromptToPromptPipeline.from_pipe(pipe))
    with pytest.raises(da.UnsupportedModelError, match="LinFusion"):
        HighResolutionPipeline.from_pipe(tiny.flux(), methods=[da.LinFusion.for_model(pipe.unet)])
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with pytest.raises(da.UnsupportedModelError, match="AutoencoderTiny"):
        HighResolutionPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="strength=2"):
        Stage(8, 8, 2)
    with pytest.raises(ValueError, match="fit='wide'"):
        Ladder(fit="wide")
