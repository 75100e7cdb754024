"""The command line: what it draws and writes, what it refuses and how, and how it ends when interrupted."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image, ImageFont

import diffusion_attn as da
from diffusion_attn.cli import files, models
from diffusion_attn.cli.comparison import Comparison
from diffusion_attn.cli.errors import sentence
from diffusion_attn.cli.main import main
from diffusion_attn.cli.oracle import consult, in_words
from diffusion_attn.cli.pictures import Cell, Row, fit_cell, labelled_grid, wrap
from diffusion_attn.cli.quiet import silence
from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.method import Plan
from diffusion_attn.methods import METHODS
from diffusion_attn.shapes.models import available
from diffusion_attn.shapes.scenes import sample_scene
from tests import tiny

CAPTION = "a red star above a blue ring on a white background"
STEM = "a-red-star-above-a-blue-ring-on-a-white-background"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with an untrained pipeline of native size 64 pixels, in the layout of SD 1.5."""
    folder = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def generate(model, tmp_path):
    """Run ``diffusion-attn generate`` on the tiny model, two steps, into ``tmp_path / "out"``."""

    def run(*args):
        common = ("--model", model, "--steps", "2", "--device", "cpu", "--output", str(tmp_path / "out"))
        return main(["generate", *map(str, args), *common])

    return run


def draw(model, prompt, seed, methods=(), size=64, steps=2, guidance=7.5, dtype=torch.float32):
    """What the command should draw, by the library's own calls."""
    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(model, dtype=dtype))
    if methods:
        da.enable(pipe, *methods)
    width, height = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    call = {"width": width, "height": height, "num_inference_steps": steps, "guidance_scale": guidance}
    return np.asarray(pipe(prompt, generator=generator, **call).images[0])


def pixels(path):
    return np.asarray(Image.open(path))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def command(*args, **kwargs):
    root = Path(da.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "diffusion_attn", *args], env=env, **streams, **kwargs)


# ---- the command itself


def test_without_a_subcommand_there_is_help_and_an_error_code(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert "generate" in out and "info" in out


def test_version_and_help_succeed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["diffusion-attn", da.__version__]
    assert main(["--help"]) == 0


def test_help_describes_every_option_of_every_method(capsys):
    assert main(["generate", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--hidiffusion.t1_ratio" in out and "share of the run (0 to 1)" in out and "Default: seeded." in out
    assert "usage: diffusion-attn generate PROMPT" in out


BAD_ARGUMENTS = {
    "no prompt": ([], ["no prompt", "--prompts"]),
    "no such file of prompts": (["--prompts", "/no/such/file"], ["--prompts", "/no/such/file"]),
    "unknown command": (None, ["'paint'", "generate"]),
    "unknown argument": (["a", "--sise", "64"], ["--sise"]),
    "no abbreviations": (["a", "--step", "3"], ["--step"]),
    "not a number": (["a", "--steps", "many"], ["--steps 'many'", "int"]),
    "no steps": (["a", "--steps", "0"], ["--steps 0", "1 or more"]),
    "negative guidance": (["a", "--guidance", "-2"], ["--guidance -2", "0 or more"]),
    "negative seed": (["a", "--seed", "-1"], ["--seed -1"]),
    "seeds beyond 64 bits": (["a", "--seed", str(2**63 - 1), "--num-images", "2"], ["--seed", "smaller"]),
    "no images": (["a", "--num-images", "0"], ["--num-images 0"]),
    "size of words": (["a", "--size", "large"], ["--size 'large'", "192x128"]),
    "size of nothing": (["a", "--size", "0x64"], ["--size '0x64'"]),
    "unknown dtype": (["a", "--dtype", "int8"], ["int8", "bfloat16"]),
    "unknown device": (["a", "--device", "toaster"], ["--device 'toaster'", "cuda"]),
    "absent device": (["a", "--device", "cuda:99"], ["--device 'cuda:99'", "info"]),
    "unknown method": (["a", "--method", "magic"], ["'magic'", "hidiffusion"]),
    "prompt after the methods": (["--method", "hidiffusion", "a star"], ["'a star'", "prompts come before"]),
    "method twice": (["a", "--method", "hidiffusion", "hidiffusion"], ["hidiffusion", "2 times"]),
    "option of no method": (["a", "--hidiffusion.seed", "0"], ["--hidiffusion.seed", "--method hidiffusion"]),
    "option of the wrong type": (
        ["a", "--method", "hidiffusion", "--hidiffusion.t1_ratio", "half"],
        ["--hidiffusion.t1_ratio 'half'", "float", "null"],
    ),
    "option out of range": (["a", "--method", "hidiffusion", "--hidiffusion.t1_ratio", "7"], ["t1_ratio=7", "0 and 1"]),
    "unknown option": (["a", "--method", "hidiffusion", "--hidiffusion.t3", "1"], ["--hidiffusion.t3"]),
    "weights of no method": (["a", "--method", "hidiffusion", "--weights", "."], ["--weights '.'", "linfusion"]),
    "no such weights": (["a", "--method", "linfusion", "--weights", "./none"], ["'./none'", "config.json"]),
    "weights are no option": (["a", "--method", "linfusion", "--linfusion.layers", "1"], ["--linfusion.layers"]),
    "nothing to compare": (["a", "--compare"], ["--compare", "--method"]),
    "no such model": (["a", "--model", "no-such-model"], ["'no-such-model'", "owner/name"]),
    "no such folder": (["a", "--model", "./models/none"], ["'./models/none'", "no folder"]),
    "output below a file": (["a", "--model", "MODEL", "--output", f"{__file__}/out"], ["--output", "another folder"]),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_told_in_one_sentence_before_a_model_is_loaded(case, model, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    args, expected = BAD_ARGUMENTS[case]
    argv = ["paint"] if args is None else ["generate", *(model if arg == "MODEL" else arg for arg in args)]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diffusion-attn: error: ") and err.count("\n") == 1
    assert all(words in err for words in expected), err
    assert names(tmp_path) == []


def test_prompts_that_are_not_text_are_refused(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe\x80")
    assert main(["generate", "--prompts", str(file)]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_debug_shows_the_traceback_before_or_after_the_subcommand(capsys):
    for argv in (["--debug", "generate"], ["generate", "--debug"]):
        assert main(argv) == 2
        assert "Traceback" in capsys.readouterr().err
    assert main(["generate"]) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---- models that are not what they should be


def one_error_line(capsys):
    """The sentence on stderr, below whatever the loaders themselves showed."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("diffusion-attn: error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def test_a_hub_model_out_of_reach_is_told_in_one_sentence(generate, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["generate", "a", "--model", "nobody/nothing", "--output", str(tmp_path), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "'nobody/nothing'" in err and "connection" in err and err.count("\n") == 1


def test_folders_that_hold_no_text_to_image_pipeline(tmp_path, capsys):
    empty, broken, unconditional = (tmp_path / name for name in ("empty", "broken", "unconditional"))
    empty.mkdir()
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}')
    unet = UNet2DModel(8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, **_BLOCKS)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(unconditional)
    for folder, expected in ((empty, "model_index.json"), (broken, "check the folder"), (unconditional, "'prompt'")):
        argv = ["generate", "a", "--model", str(folder), "--output", str(tmp_path / "out")]
        assert main(argv) == 2
        assert expected in one_error_line(capsys)


_BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


@pytest.mark.parametrize(("size", "nearest"), [("130", "128x128"), ("66x3", "64x8")])
def test_sizes_that_do_not_divide_name_the_nearest(generate, size, nearest, capsys):
    assert generate("a", "--size", size) == 2
    assert nearest in one_error_line(capsys)


def test_a_method_that_refuses_the_model_does_so_before_drawing(generate, tmp_path, capsys):
    assert generate("a", "--method", "hidiffusion", "--hidiffusion.aggressive", "true", "--compare") == 2
    assert "aggressive=True" in one_error_line(capsys)
    assert names(tmp_path / "out") == []


# ---- drawing


def test_a_picture_is_the_pipelines_own_with_its_settings(generate, model, tmp_path, capsys):
    assert generate(CAPTION, "--seed", 5, "--guidance", 3) == 0
    out = tmp_path / "out"
    assert names(out) == [f"0000-{STEM}-seed5.json", f"0000-{STEM}-seed5.png"]
    path = out / f"0000-{STEM}-seed5.png"
    assert str(path) in capsys.readouterr().out
    assert (pixels(path) == draw(model, CAPTION, 5, guidance=3.0)).all()

    settings = json.loads(Image.open(path).text[files.TEXT_KEY])
    assert settings["prompt"] == CAPTION and settings["model"] == model and settings["methods"] == {}
    assert (settings["size"], settings["steps"], settings["guidance"]) == ([64, 64], 2, 3.0)
    assert (settings["seed"], settings["dtype"], settings["device"]) == (5, "float32", "cpu")
    assert settings["versions"]["torch"] == torch.__version__ and len(settings["versions"]) == 3
    record = json.loads(path.with_suffix(".json").read_text())
    assert record.items() >= settings.items()
    assert record["seconds"] > 0 and record["peak_memory_bytes"] >= 0
    assert record["oracle"]["judgement"]["asked"] == 2


def test_prompts_seeds_and_names(generate, model, tmp_path):
    listed = tmp_path / "prompts.txt"
    listed.write_text("\ufeffsecond\n\n  Dritte: \u00c4pfel/../etc!  \n\u661f\n", encoding="utf-8")
    assert generate("first", "--prompts", listed, "--num-images", 2, "--seed", 7, "--quiet") == 0
    out = tmp_path / "out"
    stems = ["0000-first-seed7", "0001-first-seed8", "0002-second-seed7", "0003-second-seed8"]
    stems += ["0004-dritte-apfel-etc-seed7", "0005-dritte-apfel-etc-seed8", "0006-prompt-seed7", "0007-prompt-seed8"]
    assert names(out) == sorted(f"{stem}.{kind}" for stem in stems for kind in ("json", "png"))
    assert (pixels(out / "0003-second-seed8.png") == draw(model, "second", 8)).all()
    assert json.loads((out / "0007-prompt-seed8.json").read_text())["prompt"] == "\u661f"
    assert json.loads((out / "0000-first-seed7.json").read_text())["oracle"] is None


def test_a_method_draws_what_the_library_draws_with_it(generate, model, tmp_path):
    options = ("--hidiffusion.t1_ratio", "0.5", "--hidiffusion.window_attention", "false")
    assert generate(CAPTION, "--method", "hidiffusion", *options, "--size", "128x96") == 0
    path = tmp_path / "out" / f"0000-{STEM}-seed0-hidiffusion.png"
    method = da.HiDiffusion(t1_ratio=0.5, window_attention=False)
    expected = draw(model, CAPTION, 0, [method], size=(128, 96))
    assert (pixels(path) == expected).all() and expected.shape == (96, 128, 3)
    assert (expected != draw(model, CAPTION, 0, size=(128, 96))).any()
    assert json.loads(path.with_suffix(".json").read_text())["methods"] == {"hidiffusion": asdict(method)}


@pytest.mark.parametrize("shift", [2, "seeded"])
def test_options_of_several_types_take_each_of_them(generate, tmp_path, shift):
    assert generate("a", "--method", "hidiffusion", "--hidiffusion.shift", shift) == 0
    record = json.loads((tmp_path / "out" / "0000-a-seed0-hidiffusion.json").read_text())
    assert record["methods"]["hidiffusion"]["shift"] == shift


def test_weights_of_a_method_are_loaded_from_a_folder(generate, model, tmp_path):
    unet = DiffusionPipeline.from_pretrained(model).unet
    da.LinFusion.for_model(unet).save_pretrained(tmp_path / "weights")
    assert generate("a", "--method", "linfusion", "--weights", tmp_path / "weights") == 0
    stem = tmp_path / "out" / "0000-a-seed0-linfusion"
    expected = draw(model, "a", 0, [da.LinFusion.from_pretrained(tmp_path / "weights")])
    assert np.array_equal(pixels(stem.with_suffix(".png")), expected)
    record = json.loads(stem.with_suffix(".json").read_text())
    assert record["methods"] == {"linfusion": {"source": str(tmp_path / "weights"), "base_weights": "device"}}


def test_without_published_weights_there_is_a_way_out(generate, capsys):
    assert generate("a", "--method", "linfusion", "--quiet") == 2
    err = capsys.readouterr().err
    assert "no published LinFusion weights" in err and "from_pretrained" in err and err.count("\n") == 1


def test_a_second_run_gives_the_same_files_and_leaves_others_alone(generate, tmp_path):
    assert generate("a", "--quiet") == 0
    out = tmp_path / "out"
    (out / "mine.txt").write_text("keep")
    before = (out / "0000-a-seed0.png").read_bytes()
    assert generate("a", "--quiet") == 0
    assert (out / "0000-a-seed0.png").read_bytes() == before and (out / "mine.txt").read_text() == "keep"
    assert names(out) == ["0000-a-seed0.json", "0000-a-seed0.png", "mine.txt"]


def test_dtype_reaches_the_model(generate, model, tmp_path):
    assert generate("a", "--dtype", "bfloat16") == 0
    path = tmp_path / "out" / "0000-a-seed0.png"
    assert (pixels(path) == draw(model, "a", 0, dtype=torch.bfloat16)).all()
    assert json.loads(path.with_suffix(".json").read_text())["dtype"] == "bfloat16"


def test_quiet_shows_nothing_and_otherwise_there_is_progress(generate, capfd):
    assert generate("a", "b", "--method", "hidiffusion", "--compare", "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert generate("a", "b") == 0
    out, err = capfd.readouterr()
    assert "pictures" in err and "2/2" in err and len(out.strip().splitlines()) == 2


def test_silence_gives_everything_back():
    logger = logging.getLogger("diffusers")
    with silence():
        assert not logger.isEnabledFor(logging.ERROR)
    assert logger.isEnabledFor(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    assert diffusers_logging.is_progress_bar_enabled() and transformers_logging.is_progress_bar_enabled()


def test_sdxl_too(tmp_path):
    folder = tmp_path / "model"
    tiny.sdxl().save_pretrained(folder)
    argv = ["generate", "a", "--model", str(folder), "--steps", "1", "--output", str(tmp_path), "--device", "cpu"]
    assert main([*argv, "--method", "hidiffusion", "--size", "128"]) == 0
    record = json.loads((tmp_path / "0000-a-seed0-hidiffusion.json").read_text())
    assert record["guidance"] == 5.0  # the pipeline's own default


def test_flux_too(tmp_path, capsys):
    folder = tmp_path / "model"
    pipe = tiny.flux()
    pipe.tokenizer_2.model_max_length = 16
    pipe.save_pretrained(folder)
    argv = ["generate", "a", "--model", str(folder), "--steps", "1", "--output", str(tmp_path), "--device", "cpu"]
    assert main([*argv, "--method", "clear"]) == 2
    assert "no published CLEAR weights" in capsys.readouterr().err
    options = ["--clear.radius", "2", "--clear.backend", "tiles"]
    assert main([*argv, "--method", "clear", "--weights", "none", *options]) == 0
    record = json.loads((tmp_path / "0000-a-seed0-clear.json").read_text())
    assert record["guidance"] == 3.5 and record["size"] == [64, 64]  # the pipeline's and the autoencoder's own
    assert record["methods"]["clear"]["radius"] == 2
    da.Clear.for_model(pipe.transformer, 3).save_pretrained(tmp_path / "weights")
    assert main([*argv, "--method", "clear", "--weights", str(tmp_path / "weights")]) == 0
    record = json.loads((tmp_path / "0000-a-seed0-clear.json").read_text())
    assert record["methods"]["clear"]["radius"] == 3 and "clear_local_3" in record["methods"]["clear"]["source"]


def test_guidance_where_it_is_no_input_is_held_against_the_empty_prompt():
    pipe = tiny.flux(guidance_embeds=False)
    assert call_arguments(pipe, ["a"]) == {"prompt": ["a"], "max_sequence_length": 512}
    guided = call_arguments(pipe, ["a", "b"], 2.0)
    assert guided["negative_prompt"] == ["", ""] and guided["true_cfg_scale"] == 2.0
    assert "guidance_scale" not in guided and "true_cfg_scale" not in call_arguments(pipe, ["a"], 1.0)
    assert call_arguments(tiny.flux(), ["a"], 2.0)["guidance_scale"] == 2.0
    assert models.guidance_of(pipe, "schnell", None) == 1.0 and models.guidance_of(pipe, "schnell", 2.0) == 2.0
    assert models.guidance_of(tiny.flux(), "dev", None) == 3.5


# ---- comparing


def test_compare_draws_both_and_shows_them_side_by_side(generate, model, tmp_path, capsys):
    assert generate(CAPTION, "something else", "--method", "hidiffusion", "--size", 128, "--compare") == 0
    out = tmp_path / "out"
    stems = [f"0000-{STEM}-seed0", "0001-something-else-seed0"]
    pictures = [f"{stem}{variant}" for stem in stems for variant in ("", "-hidiffusion")]
    made = [*pictures, "comparison-hidiffusion"]
    assert names(out) == sorted(f"{stem}.{kind}" for stem in made for kind in ("json", "png"))
    assert (pixels(out / f"{pictures[0]}.png") == draw(model, CAPTION, 0, size=128)).all()
    expected = draw(model, CAPTION, 0, [da.HiDiffusion()], size=128)
    assert (pixels(out / f"{pictures[1]}.png") == expected).all()

    book = json.loads((out / "comparison-hidiffusion.json").read_text())
    assert list(book["variants"]) == ["plain", "hidiffusion"] and book["methods"]["hidiffusion"]["raunet"] is True
    for name, variant in book["variants"].items():
        suffix = "" if name == "plain" else f"-{name}"
        assert [record["file"] for record in variant["pictures"]] == [f"{stem}{suffix}.png" for stem in stems]
        assert variant["summary"]["judged"] == 1 and variant["summary"]["asked"] == 2

    grid = Image.open(out / "comparison-hidiffusion.png")
    assert grid.width > 2 * 256 and grid.height > 2 * 256
    assert json.loads(grid.text[files.TEXT_KEY])["prompts"] == [CAPTION, "something else"]
    enlarged = np.asarray(fit_cell(Image.fromarray(expected)))
    right = np.asarray(grid)[:, -272:-16]
    assert any((right[y : y + 256] == enlarged).all() for y in range(150))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-4:-1]] == ["seconds", "plain", "hidiffusion"]
    assert printed[-1] == str(out / "comparison-hidiffusion.png")


def record(seconds, judgement=None):
    oracle = judgement and {"judgement": judgement}
    return {"prompt": "p", "seed": 0, "seconds": seconds, "peak_memory_bytes": 12_000_000, "oracle": oracle}


def test_summaries_of_a_comparison():
    image = Image.new("RGB", (64, 64))
    comparison = Comparison(("plain", "m"))
    good, bad = {"exact": True, "read": 2, "asked": 2}, {**_FLAWLESS, "exact": False, "read": 5, "extra": 3}
    comparison.add([(image, record(2.0, bad)), (image, record(1.0, good))])
    comparison.add([(image, record(4.0)), (image, record(1.0))])
    summary = comparison.as_dict()["variants"]["plain"]["summary"]
    assert summary == {
        "pictures": 2,
        "seconds": 3.0,
        "peak_memory_bytes": 12_000_000,
        "judged": 1,
        "exact": 0,
        "shapes": 5,
        "asked": 2,
    }
    assert [line.split() for line in comparison.table().splitlines()] == [
        ["seconds", "peak", "MB", "exact", "shapes", "asked"],
        ["plain", "3.00", "12", "0", "of", "1", "5", "2"],
        ["m", "1.00", "12", "1", "of", "1", "2", "2"],
    ]


_FLAWLESS = {
    "exact": True,
    "asked": 2,
    "read": 2,
    "missing": 0,
    "extra": 0,
    "wrong_color": 0,
    "wrong_shape": 0,
    "wrong_size": 0,
    "relation": True,
    "background": True,
    "readable": True,
}


@pytest.mark.parametrize(
    ("judgement", "words"),
    [
        ({}, "2 of 2 shapes, exact"),
        ({"asked": 1, "read": 1, "relation": None}, "1 of 1 shape, exact"),
        ({"exact": False, "read": 5, "extra": 3}, "5 shapes, 3 extra"),
        ({"exact": False, "read": 1, "missing": 1, "relation": False}, "1 shape, 1 missing"),
        ({"exact": False, "wrong_color": 1, "relation": False}, "2 shapes, 1 wrong color, wrong relation"),
        ({"exact": False, "read": 0, "missing": 2, "background": False}, "0 shapes, 2 missing, wrong background"),
        ({"exact": False, "readable": False}, "2 shapes, partly unreadable"),
    ],
)
def test_judgements_in_words(judgement, words):
    assert in_words({**_FLAWLESS, **judgement}) == words


def test_the_oracle_is_consulted_on_captions_only():
    scene = sample_scene(3)
    image, caption = da.shapes.render(scene, 64), da.shapes.caption(scene)
    opinion = consult(image, caption)
    assert opinion["judgement"]["exact"] and len(opinion["reading"]["shapes"]) == len(scene.shapes)
    assert json.loads(json.dumps(opinion)) is not None
    assert consult(image, "a photograph of a cat") is None


# ---- the grid


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (256, 256)), ((96, 48), (288, 144)), ((300, 200), (300, 200)), ((2048, 1024), (512, 256))],
)
def test_cells_are_legible_and_bounded(size, expected):
    assert fit_cell(Image.new("RGB", size)).size == expected


def test_texts_stay_within_their_column():
    font = ImageFont.load_default(size=16)
    for text in ("short", "many words " * 30, "x" * 200, "", "a " + "y" * 100 + " b"):
        lines = wrap(text, font, 200)
        assert 1 <= len(lines) <= 3 and all(font.getlength(line) <= 200 for line in lines)
    assert wrap("many words " * 30, font, 200)[-1].endswith("...")


def test_rows_of_a_grid_do_not_overlap():
    images = [Image.new("RGB", (256, 256), color) for color in ("red", "green", "blue", "black")]
    rows = [
        Row("first", (Cell(images[0], ("a",)), Cell(images[1], ("a", "b", "c")))),
        Row("second " * 40, (Cell(images[2], ()), Cell(images[3], ("a",)))),
    ]
    grid = labelled_grid(("left", "right"), rows)
    counts = {color: count for count, color in grid.getcolors(maxcolors=2**16)}
    assert all(counts[color] >= 256 * 256 for color in ((255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)))


# ---- files


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("A red star!", "a-red-star"), ("../../etc/passwd", "etc-passwd"), ("\u661f", "prompt"), ("", "prompt")],
)
def test_slugs_are_safe(prompt, expected):
    assert files.slug(prompt) == expected


def test_slugs_are_bounded():
    assert len(files.slug("word " * 100)) <= 60 and not files.slug("word " * 100).endswith("-")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    files.save_png(path, Image.new("RGB", (2, 2)), {})
    before = path.read_bytes()
    with pytest.raises(OSError, match="HSV"):
        files.save_png(path, Image.new("HSV", (2, 2)), {})
    assert path.read_bytes() == before and names(tmp_path) == ["a.png"]


# ---- methods come from the registry alone


@dataclass(frozen=True)
class Toy:
    """A toy.

    Args:
        stride: rows
            and columns.
        mode, rate: how, how much.
    """

    name: ClassVar[str] = "toy"

    stride: tuple[int, int] = (2, 2)
    mode: Literal["soft", "hard"] = "soft"
    rate: float | None = None
    choose: Callable[[int], int] | None = None

    def plan(self, target):
        return Plan(["conv_in"], lambda attachment: None)


def test_a_new_method_shows_up_by_itself(generate, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(METHODS, "toy", Toy)
    assert main(["generate", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rows and columns. Default: [2, 2]." in out
    assert "--toy.choose" not in out  # a function cannot be written on a command line
    assert generate("a", "--method", "toy", "hidiffusion", "--toy.stride", "[4, 2]", "--toy.mode", "hard") == 0
    record = json.loads((tmp_path / "out" / "0000-a-seed0-toy+hidiffusion.json").read_text())
    assert record["methods"]["toy"] == {"stride": [4, 2], "mode": "hard", "rate": None, "choose": None}
    assert list(record["methods"]) == ["toy", "hidiffusion"]


# ---- info


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == da.__version__ and facts["packages"]["torch"] == torch.__version__
    assert "cpu" in facts["devices"] and "native" in facts["attention_backends"]
    assert list(facts["methods"]) == list(METHODS) and all(facts["methods"].values())
    assert facts["embedded_models"] == available() and "unet" in facts["model_families"]
    assert facts["optional_packages"]["peft"] and "xformers" in facts["optional_packages"]
    assert "shapes-linfusion" in facts["embedded_weights"] and not {*facts["embedded_weights"]} & {*available()}
    assert facts["optional_parts"]["metrics"] == f"torchmetrics {version('torchmetrics')}"
    assert not {"test", "dev"} & facts["optional_parts"].keys()


def test_info_as_text(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"diffusion-attn {da.__version__}\n") and all(name in out for name in METHODS)


# ---- the real process


def test_the_module_runs_as_a_command(model, tmp_path):
    process = command("generate", "a", "--model", model, "--steps", "1", "--output", str(tmp_path), "--quiet")
    assert process.communicate(timeout=120) == ("", "") and process.returncode == 0
    assert names(tmp_path) == ["0000-a-seed0.json", "0000-a-seed0.png"]


def test_an_interrupt_keeps_finished_pictures_and_nothing_else(model, tmp_path):
    args = ("--model", model, "--steps", "20", "--num-images", "1000", "--output", str(tmp_path), "--quiet")

    def listen():  # where the tests run in the background of a shell, SIGINT is ignored, and that is inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = command("generate", "a", *args, preexec_fn=listen)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*.png")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == "" and err.count("\n") == 1 and "interrupted" in err
    made = names(tmp_path)
    assert f"{files.picture_name(0, 'a', 0)}.png" in made and all(name.endswith((".png", ".json")) for name in made)
    for path in tmp_path.glob("*.png"):
        Image.open(path).load()
        assert json.loads(path.with_suffix(".json").read_text())["file"] == path.name


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_running_out_of_memory_is_told_with_a_remedy(model, tmp_path):
    limit = 12 << 30  # what torch and its libraries map is below, the latents of the picture asked for far above
    process = command(
        *("generate", "a", "--model", model, "--size", "400000", "--device", "cpu", "--output", str(tmp_path)),
        *("--steps", "1", "--quiet"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("\n") == 1
    assert all(remedy in err for remedy in ("--size", "--dtype float16", "--method"))


def test_memory_errors_of_all_devices_are_told_alike():
    errors = (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    )
    assert len({sentence(error) for error in errors}) == 1
    assert sentence(RuntimeError("something\nelse")).startswith("RuntimeError: something else; add --debug")


# ---- the embedded model


def test_the_embedded_model_is_the_default_and_loads_silently(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("diffusion_attn.shapes.models.FOLDER", tmp_path / "models")
    tiny.sd().save_pretrained(tmp_path / "models" / "shapes-sd")
    capfd.readouterr()
    assert main(["generate", "a", "--output", str(tmp_path), "--device", "cpu", "--size", "32"]) == 0
    record = json.loads((tmp_path / "0000-a-seed0.json").read_text())
    assert (record["model"], record["steps"], record["guidance"]) == ("shapes-sd", 30, 2.0)
    assert "Loading" not in capfd.readouterr().err


@pytest.mark.skipif("shapes-sd" not in available(), reason="the weights of shapes-sd are not there")
class TestEmbedded:
    """With the embedded model, which is the default."""

    def test_draws_what_is_asked(self, tmp_path):
        argv = ["generate", CAPTION, "--num-images", "4", "--steps", "20", "--device", "cpu", "--quiet"]
        assert main([*argv, "--output", str(tmp_path)]) == 0
        records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
        assert len(records) == 4 and all(record["model"] == "shapes-sd" for record in records)
        assert all(record["size"] == [64, 64] for record in records)
        assert sum(record["oracle"]["judgement"]["exact"] for record in records) >= 2

    def test_compares_above_the_native_size(self, tmp_path, capsys):
        argv = ["generate", CAPTION, "--size", "128", "--steps", "10", "--device", "cpu", "--output", str(tmp_path)]
        assert main([*argv, "--method", "hidiffusion", "--compare"]) == 0
        out, err = capsys.readouterr()
        assert "exact" in out and "Loading" not in err  # a model that loads in a moment shows no bars for it
        book = json.loads((tmp_path / "comparison-hidiffusion.json").read_text())
        assert all(variant["summary"]["judged"] == 1 for variant in book["variants"].values())
