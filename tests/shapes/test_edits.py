"""Edits of drawn scenes in the layout of PIE-Bench."""

from itertools import islice

import numpy as np

from diffusion_attn.metrics import pie_bench
from diffusion_attn.shapes.edits import scene_edits, write_edits
from diffusion_attn.shapes.judging import judge
from diffusion_attn.shapes.renderer import render


def test_masks_are_exact_and_prompts_true(tmp_path):
    write_edits(tmp_path, 12, seed=3)
    items = pie_bench.load(tmp_path)
    edits = list(islice((edit for edit in scene_edits(24, 3) if edit.kind != "reweight"), 12))
    assert [pie_bench.KINDS[item.kind] for item in items[:3]] == ["change object", "change colour", "add object"]
    for item, edit in zip(items, edits, strict=True):
        before, after = (np.asarray(render(scene, 64), float) for scene in (edit.source, edit.target))
        assert np.array_equal(np.asarray(item.image(), float), before)
        assert judge(item.image(), item.source_prompt).exact
        assert judge(render(edit.target, 64), item.target_prompt).exact
        mask = item.mask((64, 64), border=False).bool().numpy()
        changed = abs(after - before).max(-1) > 128  # more than half of the way from one colour to another
        assert (mask | ~changed).all()
        if edit.kind != "insert":
            assert (mask & (abs(after - before).max(-1) > 0)).sum() > 0.1 * mask.sum()
            assert item.blend_words == (edit.blend_words[0][0], edit.blend_words[1][0])
        else:
            assert item.blend_words is None


def test_they_are_the_same_each_time(tmp_path):
    for name in ("first", "second"):
        write_edits(tmp_path / name, 3)
    first, second = ((tmp_path / name / "mapping_file.json").read_bytes() for name in ("first", "second"))
    assert first == second
