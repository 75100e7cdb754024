"""Whatever a prompt, a word or a file of data is called, files are written where they were asked for."""

import json
import re
from pathlib import PurePosixPath, PureWindowsPath

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from diffusion_attn.cli.errors import sentence
from diffusion_attn.cli.files import picture_name, save_json, slug
from diffusion_attn.cli.main import main
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.distill import DistillConfig
from diffusion_attn.distill.cache import Index
from diffusion_attn.editing.inversion import Inversion
from diffusion_attn.methods.checkpoints import WEIGHTS, write_folder
from diffusion_attn.metrics import pie_bench
from diffusion_attn.pipelines.ladder import Stage
from diffusion_attn.pipelines.stage_files import StageFiles

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


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "..", ".a", "", "a\0", "a" * 101, "/a", "C:\\a", "ä", "a\n", "a.", "NUL", "com1.x"]
)
def test_items_whose_results_would_go_elsewhere_are_refused(folder, name):
    assert [item.name for item in pie_bench.load(folder())] == ["a"]
    with pytest.raises(DiffusionAttnError, match="called what no file can be"):
        pie_bench.load(folder(name))


@pytest.mark.parametrize("path", ["../../secret.png", "/etc/hostname", "..", ".", "", "a\0.png", "a" * 5000])
def test_pictures_outside_their_folder_are_refused(folder, path):
    with pytest.raises(DiffusionAttnError, match="which is not there"):
        pie_bench.load(folder(image_path=path))


WRITERS = {
    ".a.json.part": lambda folder: save_json(folder / "a.json", {}),
    ".a.safetensors.part": lambda folder: Inversion().save(folder / "a.safetensors"),
    ".cache.json.part": lambda folder: Index({}, 0).write(folder),
    ".base.safetensors.part": lambda folder: StageFiles(folder, {}, False).save(1, Stage(8, 8), [], {}, torch.ones(1)),
    ".config.json.part": lambda folder: write_folder(folder, {"a": torch.ones(1)}, {"config.json": "{}"}),
    f".{WEIGHTS}.part": lambda folder: write_folder(folder, {"a": torch.ones(1)}, {"config.json": "{}"}),
    "distill.yaml": lambda folder: DistillConfig().save(folder / "distill.yaml"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_links_that_lie_in_a_folder_are_not_written_through(tmp_path, name):
    (tmp_path / "kept").write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "kept")
    WRITERS[name](folder)
    assert (tmp_path / "kept").read_text() == "precious"
    assert not [path for path in folder.iterdir() if path.is_symlink()]


def test_messages_have_no_commands_for_the_terminal():
    error = DiffusionAttnError("tensors \x1b[2J\u202e of a stranger are\n missing: é")
    assert sentence(error) == r"tensors \x1b[2J\u202e of a stranger are missing: é"


def test_prompts_that_no_file_can_hold_are_refused_before_anything_is_drawn(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["generate", "a red \udcff star", "--size", "64", "--steps", "1", "--output", str(output)]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err and not output.exists()
