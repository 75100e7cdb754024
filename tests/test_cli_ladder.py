"""Large pictures on the command line: generate with a ladder, and upscale."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import diffusion_attn as da
from diffusion_attn.cli.ladder import PRESETS
from diffusion_attn.cli.main import main
from diffusion_attn.pipelines import HighResolutionPipeline, Ladder
from tests import tiny

CAPTION = "a red star above a blue ring on a white background"
STEM = "0000-a-red-star-above-a-blue-ring-on-a-white-background-seed0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command(model, tmp_path):
    def run(name, *args):
        common = ("--model", model, "--steps", "6", "--device", "cpu", "--output", str(tmp_path / "out"), "--quiet")
        return main([name, *map(str, args), *common])

    return run


def pixels(path):
    return np.asarray(Image.open(path))


def test_generate_with_a_ladder_is_the_pipeline(command, model, tmp_path):
    assert command("generate", CAPTION, "--size", "150x100", "--ladder", "auto", "--method", "low_memory") == 0
    out = tmp_path / "out"
    record = json.loads((out / f"{STEM}-low_memory.json").read_text())
    assert [stage["size"] for stage in record["stages"]] == [[80, 56], [152, 104]]
    assert record["stages"][1]["methods"] == ["low_memory"] and record["ladder"] == "auto"
    assert (out / f"{STEM}-low_memory-stages" / "stage-2-104x152.png").is_file()

    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(model))
    hires = HighResolutionPipeline.from_pipe(pipe, methods=[da.LowMemory()])
    hires.set_progress_bar_config(disable=True)
    expected = hires(
        CAPTION,
        height=100,
        width=150,
        num_inference_steps=6,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
    )
    assert np.array_equal(pixels(out / f"{STEM}-low_memory.png"), np.asarray(expected.images[0]))


def test_resume_takes_finished_stages_as_they_are(command, tmp_path):
    args = ("generate", CAPTION, "--size", "128", "--ladder", "auto")
    command(*args)
    stages = tmp_path / "out" / f"{STEM}-stages"
    first = stages / "stage-1-64x64.png"
    before = pixels(tmp_path / "out" / f"{STEM}.png")
    Image.new("RGB", (64, 64), "red").save(first)
    (stages / "stage-2-128x128.png").unlink()
    assert command(*args, "--resume") == 0
    assert pixels(first)[0, 0].tolist() == [255, 0, 0]
    assert not np.array_equal(pixels(tmp_path / "out" / f"{STEM}.png"), before)


def test_a_base_of_its_own(command, tmp_path):
    args = ("--ladder", "auto", "--base-method", "hidiffusion", "--base-scale", "2", "--method", "low_memory")
    assert command("generate", CAPTION, "--size", "192", *args) == 0
    record = json.loads((tmp_path / "out" / f"{STEM}-low_memory.json").read_text())
    assert [stage["methods"] for stage in record["stages"]] == [["hidiffusion"], ["low_memory"]]
    assert record["stages"][0]["size"] == [128, 128]
    assert record["base_methods"]["hidiffusion"]["raunet"] is True


def test_upscale(command, tmp_path):
    tiny.picture().resize((60, 40)).save(tmp_path / "My photo.png")
    args = ("upscale", tmp_path / "My photo.png", "--prompt", CAPTION, "--strength", "0.5", "--memory", "low")
    assert command(*args) == 0
    assert pixels(tmp_path / "out" / "0000-my-photo-120x80.png").shape == (80, 120, 3)
    record = json.loads((tmp_path / "out" / "0000-my-photo-120x80.json").read_text())
    assert record["stages"][0]["strength"] == 0.5 and record["oracle"] is not None
    assert command(*args[:4], "--size", "130x70") == 0
    assert pixels(tmp_path / "out" / "0000-my-photo-130x70.png").shape == (70, 130, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", CAPTION, "--memory", "low"), "--memory belongs to a ladder; add --ladder auto"),
        (("generate", CAPTION, "--strength", "0.3"), "--strength belongs to a ladder"),
        (("generate", CAPTION, "--resume"), "--resume belongs to a ladder"),
        (("generate", CAPTION, "--base-method", "hidiffusion"), "--base-method and --base-scale belong to a ladder"),
        (("generate", CAPTION, "--ladder", "auto", "--vae-tile", "0"), "--vae-tile 0: expected pixels"),
        (("generate", CAPTION, "--ladder", "auto", "--size", "200", "--vae-tile", "30"), "vae_tile=30"),
        (("generate", CAPTION, "--ladder", "auto", "--size", "200", "--refine", "demofusion"), "SDXL"),
        (("upscale", "nowhere.png"), "'nowhere.png' was not found"),
        (("upscale", __file__), "cannot be read as a picture"),
        (("upscale", __file__, "--scale", "2", "--size", "9"), "exclude each other"),
        (("upscale", __file__, "--strength", "1.5"), "--strength 1.5: expected a share"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(command, capsys, args, message):
    assert command(*args) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("scale", ["0", "1e9"])
def test_a_scale_that_makes_no_picture(command, tmp_path, capsys, scale):
    tiny.picture(16).save(tmp_path / "small.png")
    assert command("upscale", tmp_path / "small.png", "--scale", scale) == 2
    assert "give one that makes sides of 1 to 999999" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_ladders_of_the_command_are_those_of_the_library():
    assert tuple(Ladder.PRESETS) == PRESETS


def test_interrupted_it_keeps_the_last_finished_stage(model, tmp_path):
    out = tmp_path / "out"
    args = ("generate", CAPTION, "--model", model, "--size", "512", "--ladder", "auto", "--steps", "60")
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusion_attn", *args, "--device", "cpu", "--output", str(out), "--quiet"],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    first = out / f"{STEM}-stages" / "stage-1-64x64.png"
    deadline = time.time() + 120
    while not first.is_file() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in error
    assert pixels(first).shape == (64, 64, 3)
    assert not (out / f"{STEM}.png").exists() and not list(out.rglob("*.part"))
