"""CLEAR's benchmark: work as it was counted before, operations as they are published, resuming, the report."""

import json

import pytest
import torch

import diffusion_attn as da
from benchmarks import clear, common, report
from benchmarks.local_work import (
    BLOCK,
    FULL,
    SORTED,
    TILES,
    Case,
    dense_mask,
    ideal_pairs,
    raster_blocks,
    visited_pairs,
)
from diffusion_attn.shapes import models
from tests import tiny


def test_work_is_what_was_counted(tmp_path, monkeypatch):
    output = tmp_path / "clear-cpu-float32-torch0.json"
    run = f"audit --grids 64 128 --output {output}"
    clear.main(run.split())
    rows = json.loads(output.read_text())["audit"]["rows"]
    assert [(row["side"], row["radius"]) for row in rows] == [(side, r) for side in (64, 128) for r in (8, 16, 32)]
    assert rows[0]["ideal"] == pytest.approx(173.4, abs=0.051)
    output.unlink()
    monkeypatch.setattr(clear, "blocks_per_query", lambda disc: [1])
    with pytest.raises(SystemExit, match="off what was counted before"):
        clear.main(run.split())
    assert not output.exists()


@pytest.mark.parametrize("pixels", clear.PUBLISHED)
def test_operations_are_those_that_are_published(pixels):
    for radius, gflop in clear.PUBLISHED[pixels].items():
        counted = 4 * 3072 * ideal_pairs(Case((pixels // 16, pixels // 16), radius)) / 1e9
        assert counted == pytest.approx(gflop, abs=0.0051 if pixels == 1024 else 0.051)


@pytest.mark.parametrize(
    "case",
    [
        Case((20, 36), 8, 40, 4),
        Case((17, 23), 5, 0),
        Case((16, 64), 40, 128),
        Case((8, 300), 150, 3),
        Case((64, 8), 3, 300, 2),
    ],
)
def test_raster_blocks_are_the_rule(case):
    """Blocks by their runs against all pairs, which no size that is measured could afford."""
    pairs = dense_mask(case, "cpu")
    assert pairs.sum() == ideal_pairs(case)
    visited, whole = raster_blocks(case)
    padded = torch.zeros(*(count * BLOCK for count in visited.shape), dtype=torch.bool)
    padded[: pairs.shape[0], : pairs.shape[1]] = pairs
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    assert torch.equal(visited, blocks.any(-1).any(-1))
    assert not (whole & ~visited).any()
    last = whole.shape[0] - 1 if pairs.shape[0] % BLOCK else whole.shape[0]  # rows without a query are nobody's
    assert not (whole[:last] & ~blocks.all(-1).all(-1)[:last]).any()


@pytest.mark.parametrize("case", [Case((40, 48), 8, 40, 4), Case((40, 48), 30, 0), Case((13, 21), 50, 7)])
def test_visited_pairs_are_those_that_are_computed(case):
    q, k, v = torch.randn(3, 1, 2, case.length, 8).unbind()
    pooled = torch.randn(2, 1, 2, case.pooled, 8).unbind()
    calls = clear.op_calls(case, [q, k, v], pooled, [FULL, TILES])
    for name, call in calls.items():
        assert common.count_flops(call) == 4 * 2 * 8 * visited_pairs(name, case)
    assert visited_pairs(SORTED, case) >= ideal_pairs(case)


def test_ops_steps_and_report(tmp_path):
    output = tmp_path / "clear-cpu-float32-torch0.json"
    op = f"op --grids 32 48 --dense-until 32 --radii 4 --heads 2 --head-dim 8 --text 9 --repeats 1 --output {output}"
    clear.main([*op.split(), "--variants", "dense mask", "tiles"])
    rows = json.loads(output.read_text())["op"]["rows"]
    assert [(row["side"], row["variant"]) for row in rows] == [
        *((32, name) for name in ("full SDPA", "dense mask", "tiles")),
        *((48, name) for name in ("full SDPA", "tiles")),
    ]
    assert all(row["seconds"] > 0 and row["visited_pairs"] >= row["ideal_pairs"] for row in rows)

    step = f"step --small --sizes 1024 --text 16 --double 1 --single 1 --repeats 1 --output {output}"
    clear.main([*step.split(), "--variants", "plain", "radius 8", "radius 8, pooled by 4"])
    plain, local, pooled = json.loads(output.read_text())["step"]["rows"]
    assert plain["flops"] > pooled["flops"] > local["flops"]
    args = clear.parse(step.split())
    transformer = clear.build(args, "cpu")
    call = clear.forward(transformer, 64, 16)
    assert common.count_flops(call) == plain["flops"]
    with da.using(transformer, da.Clear(radius=8)):
        assert common.count_flops(call) == local["flops"]

    report.write_page(clear.NAME, tmp_path)
    page = (tmp_path / "clear.md").read_text()
    assert "## One attention call" in page and "| 1024 | radius 8 " in page and str(tmp_path) not in page


def test_what_is_measured_depends_on_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card X1")
    here, there = clear.parse(["op"]), clear.parse(["op", "--device", "cuda"])
    assert (here.heads, here.head_dim, here.dtype, here.output.name[:18]) == (4, 64, "float32", "clear-cpu-float32-")
    assert (there.heads, there.head_dim, there.dtype, there.grids[-1]) == (24, 128, "bfloat16", 512)
    assert there.output.name.startswith("clear-card-x1-bfloat16-")
    assert clear.parse(["step", "--device", "cuda", "--dtype", "float16"]).dtype == "float16"


def test_no_times_without_parity(tmp_path, monkeypatch):
    output = tmp_path / "op.json"
    monkeypatch.setattr(da.ops, "local_attention", lambda q, k, v, **kwargs: v)
    with pytest.raises(SystemExit, match="not the rule: tiles"):
        clear.main(f"op --grids 32 --text 9 --variants tiles --output {output}".split())
    assert not output.exists()


def test_quality_by_cascade_and_directly(tmp_path):
    tiny.flux().save_pretrained(tmp_path / "model")
    output = tmp_path / "quality.json"
    options = f"quality --model {tmp_path / 'model'} --output {output} --captions 3 --steps 3 --batch 2 --sizes 1 2"
    names = ["full attention", "rule alone, radius 4"]
    both = [*names, *(f"{name}, cascade" for name in names)]

    def run(*variants):
        clear.main([*options.split(), "--variants", *variants])
        return json.loads(output.read_text())["quality"]["rows"]

    first = run(*names, both[-1])
    assert [(row["pixels"], row["variant"]) for row in first] == [
        *((128, name) for name in names),
        *((256, name) for name in (*names, both[-1])),
    ]
    rows = run(*both)
    assert [(row["pixels"], row["variant"]) for row in rows[2:]] == [(256, name) for name in both]
    assert rows[:4] == first[:4] and rows[-1] == first[-1]


def test_quality_names_the_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="shapes-flux"):
        clear.main(["quality", "--output", str(tmp_path / "quality.json")])
