"""``diffusion-attn evaluate pie-bench``: the command as it is typed, on drawn scenes."""

import csv
import json

import pytest
from PIL import Image

from diffusion_attn.cli.main import main
from diffusion_attn.shapes.edits import write_edits
from tests import tiny

ARGS = ["--count", "2", "--steps", "3", "--guidance", "3", "--device", "cpu", "--ip-scale", "0", "--quiet"]


def run(folder, *args):
    return main(["evaluate", "pie-bench", "--output", str(folder), *ARGS, *args])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pie")
    assert run(folder, "--method", "vimaedit") == 0
    return folder


def test_rows_of_all_items_and_of_each_type(done):
    result = json.loads((done / "pie-bench.json").read_text())
    methods = result["methods"]
    assert list(methods) == ["copy", "vae", "vimaedit"] and result["items"] == 2
    assert methods["copy"]["mse"] == 0 and methods["copy"]["psnr"] is None
    assert methods["copy"]["ssim"] > methods["vae"]["ssim"] > 90
    assert methods["vae"]["iou"] is None and 0 <= methods["vimaedit"]["iou"] <= 1
    assert set(methods["vimaedit"]["types"]) == {"change object", "change colour"}
    rows = list(csv.DictReader((done / "pie-bench.csv").open()))
    assert [(row["method"], row["item"][-1]) for row in rows] == [
        (name, item) for name in ("copy", "vae", "vimaedit") for item in "01"
    ]
    page = (done / "pie-bench.md").read_text()
    assert "| vimaedit | 2 |" in page and "| change colour | copy | 1 |" in page and "lpips" not in page
    with Image.open(done / "vimaedit" / "000000000001.png") as picture:
        assert picture.size == (64, 64) and json.loads(picture.text["diffusion-attn"])["steps"] == 3


def test_what_is_there_is_gone_on_with(done):
    made = {path: path.stat().st_mtime_ns for path in done.glob("*/0*.json")}
    (done / "vimaedit" / "000000000001.json").unlink()
    assert run(done, "--method", "vimaedit", "p2p") == 0
    for path, time in made.items():
        assert (path.stat().st_mtime_ns == time) == (path.parent.name != "vimaedit" or path.stem[-1] == "0")
    assert list(json.loads((done / "pie-bench.json").read_text())["methods"])[-1] == "p2p"


def test_other_settings_are_not_mixed_in(done, capsys):
    assert run(done, "--method", "vimaedit", "--cross", "0.1") == 2
    assert "made with other settings" in capsys.readouterr().err


def test_other_data_under_the_same_names_is_not_taken_for_done(done, tmp_path, capsys):
    write_edits(tmp_path, 2, seed=9)
    assert run(done, "--data", str(tmp_path), "--method", "vimaedit") == 2
    assert "holds edits of other data" in capsys.readouterr().err


def test_words_that_are_cut_off_are_left_out(tmp_path):
    write_edits(tmp_path / "data", 1)
    path = tmp_path / "data" / "mapping_file.json"
    mapping = json.loads(path.read_text())
    [item] = mapping.values()
    before, after = item["blended_word"].split()
    for key, word in (("original_prompt", before), ("editing_prompt", after)):
        item[key] = "a " * 40 + item[key].replace(f"[{word}]", word)
    path.write_text(json.dumps(mapping))
    assert run(tmp_path / "out", "--data", str(tmp_path / "data"), "--method", "direct") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "pie-bench.csv").open()))
    assert rows[-1]["note"] and not rows[0]["note"]


def test_every_way_to_edit_and_a_round_trip(tmp_path):
    data = tmp_path / "data"
    write_edits(data, 3)
    args = ["--data", str(data), "--type", "2", "--jpeg", "--size", "32", "--clip", tiny.clip(tmp_path / "clip")]
    assert run(tmp_path / "out", *args, "--method", "direct", "null-text", "dpl") == 0
    result = json.loads((tmp_path / "out" / "pie-bench.json").read_text())
    assert result["items"] == 1 and result["methods"]["copy"]["mse"] > 0  # that of JPEG
    assert all(row["clip_edited"] is not None for row in result["methods"].values())
    assert result["methods"]["dpl"]["psnr"] == pytest.approx(result["methods"]["null-text"]["psnr"])  # no word


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--type", "10"], "--type 10: expected 0 to 9"),
        (["--type", "9"], "has no such items"),
        (["--data", "nowhere"], "has no mapping_file.json"),
        (["--model", "nowhere/else"], "--data is needed"),
        (["--model", "shapes-flux"], "edit takes Stable Diffusion"),
        (["--cross", "-1"], "--cross -1"),
        (["--dino", "/nowhere"], "could not be loaded as a vision model"),
    ],
)
def test_errors_name_the_option(tmp_path, capsys, args, message):
    assert run(tmp_path, *args) == 2
    assert message in capsys.readouterr().err
