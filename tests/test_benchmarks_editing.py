"""The set of drawn edits, and the table that is made with it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import editing, report
from diffusion_attn.shapes.edits import KINDS_OF_EDIT, scene_edits
from diffusion_attn.shapes.judging import judge
from diffusion_attn.shapes.renderer import render

EDITS = list(scene_edits(120))


def test_the_set_is_fixed_and_of_all_kinds():
    assert list(scene_edits(120)) == EDITS
    counts = {(kind, objects): 0 for kind in KINDS_OF_EDIT for objects in (1, 2)}
    for edit in EDITS:
        counts[edit.kind, len(edit.source.shapes)] += 1
    assert all(counts[kind, objects] == 15 for kind in ("swap", "recolour", "reweight") for objects in (1, 2))
    assert counts["insert", 1] == 30


@pytest.mark.parametrize("edit", EDITS[:24], ids=lambda edit: edit.kind)
def test_source_and_target_differ_where_they_may(edit):
    source, target = (np.asarray(render(scene, 64), float) for scene in (edit.source, edit.target))
    kept = ~edit.editable(64)
    assert kept.any() and np.array_equal(source[kept], target[kept])
    assert edit.masks(64).any((1, 2)).all()
    if edit.kind != "reweight":
        assert editing.succeeded(edit, render(edit.source, 64), render(edit.target, 64))
        assert not editing.succeeded(edit, render(edit.source, 64), render(edit.source, 64))
    assert judge(render(edit.target, 64), edit.prompts[1]).exact


def test_a_radius_has_to_move_its_words_way():
    edit = next(edit for edit in EDITS if edit.kind == "reweight" and len(edit.source.shapes) == 1)
    [shape] = edit.source.shapes
    before = render(edit.source, 64)
    for factor in (0.9, 1.0, 1.1):
        after = render(replace(edit.source, shapes=(replace(shape, radius=shape.radius * factor),)), 64)
        assert editing.succeeded(edit, before, after) == (factor == (1.1 if shape.size == "large" else 0.9))


def test_a_table_is_filled_edit_by_edit(tmp_path, capsys):
    output = tmp_path / "editing-cpu.json"
    common = ["--edits", "2", "--steps", "2", "--output", str(output)]
    editing.main(["quality", *common, "--methods", "plain DDIM", "direct"])
    editing.main(["quality", *common])
    rows = json.loads(output.read_text())["quality"]["rows"]
    assert [(row["method"], row["edit"]) for row in rows] == [(m, e) for m in editing.METHODS for e in (0, 1)]
    assert {row["method"] for row in rows if "overlap" in row} == set(editing.LOOKS)
    calls = {row["method"]: row["unet_calls"] for row in rows}
    assert calls["plain DDIM"] == calls["direct"] == 2 < calls["null-text, 3 updates"] < calls["null-text"]
    assert calls["DPL, 1 and 3 updates"] < calls["DPL"]
    with pytest.raises(SystemExit, match="steps"):
        editing.main(["quality", "--edits", "2", "--steps", "3", "--output", str(output)])
    report.write_page(editing.NAME, tmp_path)
    page = (tmp_path / "editing.md").read_text()
    assert "| direct" in page and "| words of" in page
