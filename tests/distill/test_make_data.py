"""Pictures that a teacher draws for its student."""

import os

import pytest
import torch
from PIL import Image, ImageChops

from diffusion_attn.distill import DataError
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.make_data import make_data
from diffusion_attn.distill.sources import find_pictures
from tests import tiny

PROMPTS = ["a red star on a white background", "a blue ring on a black background"]


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.sd()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, output, count, **changes):
    options = {"size": (64, 64), "steps": 2, "guidance": 2.0, "batch": 2, "quiet": True, **changes}
    make_data(pipe, PROMPTS, count, output, **options)


def assert_alike(one, other):
    with Image.open(one) as ours, Image.open(other) as theirs:
        assert max(high for _, high in ImageChops.difference(ours, theirs).getextrema()) <= 1


def test_pictures_are_a_folder_for_distillation_and_more_can_be_asked_for(pipe, tmp_path):
    draw(pipe, tmp_path / "data", 3)
    pictures = find_pictures(DataConfig(path=str(tmp_path / "data")))
    assert [pictures.caption(i) for i in range(len(pictures))] == [*PROMPTS, PROMPTS[0]]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.png")}
    draw(pipe, tmp_path / "data", 5)
    assert len(find_pictures(DataConfig(path=str(tmp_path / "data")))) == 5
    assert all((tmp_path / "data" / name).stat().st_mtime_ns == then for name, then in before.items())


def test_an_interrupted_run_ends_with_the_same_pictures(pipe, tmp_path, monkeypatch):
    draw(pipe, tmp_path / "whole", 4)
    calls, replace = [], os.replace

    def interrupted(source, target):
        if str(target).endswith(".png"):
            calls.append(target)
            if len(calls) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        draw(pipe, tmp_path / "parts", 4)
    assert len(list((tmp_path / "parts").glob("*.png"))) == 1
    draw(pipe, tmp_path / "parts", 4)
    for path in (tmp_path / "whole").iterdir():
        other = (tmp_path / "parts" / path.name).read_bytes()
        if path.suffix == ".png":  # in batches of another size, equal to rounding only
            assert_alike(path, tmp_path / "parts" / path.name)
        else:
            assert path.read_bytes() == other


def test_a_folder_of_other_pictures_is_refused(pipe, tmp_path):
    draw(pipe, tmp_path, 1)
    with pytest.raises(DataError, match="another steps, seed"):
        draw(pipe, tmp_path, 2, steps=3, seed=1)


def test_a_picture_depends_on_its_number_alone(pipe, tmp_path):
    for name, options in {"one": {"batch": 1}, "four": {"batch": 4, "seed": 0}}.items():
        torch.manual_seed(len(name))
        draw(pipe, tmp_path / name, 4, **options)
    for path in (tmp_path / "one").glob("*.png"):
        assert_alike(path, tmp_path / "four" / path.name)
