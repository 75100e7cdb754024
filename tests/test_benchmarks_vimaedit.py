"""The table that takes ViMAEdit apart, filled by the embedded model."""

import json

import pytest

from benchmarks import report, vimaedit


def test_a_table_is_filled_edit_by_edit(tmp_path):
    output = tmp_path / "vimaedit-cpu.json"
    common = ["--edits", "3", "--steps", "2", "--output", str(output)]
    first = [*vimaedit.BASELINES, "+ noise: ViMAEdit"]
    vimaedit.main(["ablation", *common, "--methods", *first])
    before = json.loads(output.read_text())["ablation"]["rows"]
    more = ["+ grounding", "direct inversion", "direct inversion, local blend", "LEDITS++ of diffusers"]
    vimaedit.main(["ablation", *common, "--methods", *first, *more])
    rows = json.loads(output.read_text())["ablation"]["rows"]
    names = [name for name in (*vimaedit.BASELINES, *vimaedit.METHODS) if name in (*first, *more)]
    assert [(row["method"], row["edit"]) for row in rows] == [(name, index) for name in names for index in range(3)]
    assert [row for row in rows if row["method"] in first] == before
    assert [row["kind"] for row in rows[:3]] == ["swap", "recolour", "insert"]
    of = {(row["method"], row["kind"]): row for row in rows}
    assert of["copy of the picture", "swap"]["background_mse"] == 0 and not of["copy of the picture", "swap"]["success"]
    blended = {name for name in names if of[name, "swap"]["iou"] is not None}
    assert blended == {name for name in names if "ViMAEdit" in name or "local blend" in name or name == "+ grounding"}
    assert all(of[name, "insert"]["iou"] is None for name in names)
    with pytest.raises(SystemExit, match="steps"):
        vimaedit.main(["ablation", "--edits", "3", "--steps", "3", "--output", str(output)])
    report.write_page(vimaedit.NAME, tmp_path)
    assert "| + noise: ViMAEdit" in (tmp_path / "vimaedit.md").read_text()
