"""Whatever a prompt, a word or a file of data is called, files are written where they were asked for."""

import json
import re
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from diffusion_attn.cli.files import picture_name, slug
from diffusion_attn.cli.main import main
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.metrics import pie_bench

RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(1, 10))}
"""Names that Windows keeps for devices."""


@given(st.text(), st.integers(0, 10**6), st.integers(0, 2**63 - 1))
@example("../../etc/passwd", 0, 0)
@example("a\0b", 0, 0)
@example("." * 300, 0, 0)
@example("con", 0, 0)
@example("C:\\Windows\\win.ini", 0, 0)
@example("\ud800", 0, 0)
@example("\uff41\uff0f\uff42", 0, 0)
def test_pictures_of_any_prompt_have_a_plain_name(prompt, index, seed):
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", slug(prompt)) and len(slug(prompt)) <= 60
    name = f"{picture_name(index, prompt, seed)}.png"
    assert len(name) < 120 and not name.startswith((".", "-"))
    assert PurePosixPath(name).name == PureWindowsPath(name).name == name
    assert name.split(".")[0] not in RESERVED


@pytest.fixture
def folder(tmp_path):
    """A folder like PIE-Bench's, and a function that writes its one item."""
    (tmp_path / "data/annotation_images").mkdir(parents=True)
    for place in ("data/annotation_images/a.png", "secret.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    entry = {
        "image_path": "a.png",
        "original_prompt": "a [red] star",
        "editing_prompt": "a [blue] star",
        "editing_type_id": "6",
        "mask": [3, 2],
    }

    def write(name="a", **changes):
        (tmp_path / "data/mapping_file.json").write_text(json.dumps({name: {**entry, **changes}}))
        return tmp_path / "data"

    return write


@pytest.mark.parametrize("name", ["../a", "a/b", "..", ".a", "", "a\0", "a" * 101, "/a", "C:\\a", "ä", "a\n"])
def test_items_whose_results_would_go_elsewhere_are_refused(folder, name):
    assert [item.name for item in pie_bench.load(folder())] == ["a"]
    with pytest.raises(DiffusionAttnError, match="called what no file can be"):
        pie_bench.load(folder(name))


@pytest.mark.parametrize("path", ["../../secret.png", "/etc/hostname", "..", ".", "", "a\0.png", "a" * 5000])
def test_pictures_outside_their_folder_are_refused(folder, path):
    with pytest.raises(DiffusionAttnError, match="which is not there"):
        pie_bench.load(folder(image_path=path))


def test_prompts_that_no_file_can_hold_are_refused_before_anything_is_drawn(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["generate", "a red \udcff star", "--size", "64", "--steps", "1", "--output", str(output)]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err and not output.exists()
