"""The benchmark of large pictures, on as little as it can be run with."""

import json

import pytest

from benchmarks import high_resolution, report


def test_every_table_is_filled_and_reported(tmp_path):
    output = tmp_path / "high_resolution-cpu.json"
    to = ["--output", str(output)]
    ways = [high_resolution.ENLARGED, "plain, at once", "LinFusion ladder", "hires fix: two passes"]
    few = ["--captions", "1", "--steps", "5", "--sizes", "2"]
    high_resolution.main(["shapes-sd", *few, *to, "--ways", *ways[:2]])
    before = json.loads(output.read_text())["shapes-sd"]["rows"]
    high_resolution.main(["shapes-sd", *few, *to, "--ways", *ways])
    rows = json.loads(output.read_text())["shapes-sd"]["rows"]
    assert {row["way"] for row in rows} == set(ways) and [row for row in rows if row["way"] in ways[:2]] == before
    assert {row["way"]: row["stages"] for row in rows} == {
        high_resolution.ENLARGED: ["64x64"],
        "plain, at once": ["128x128"],
        "LinFusion ladder": ["64x64", "128x128"],
        "hires fix: two passes": ["64x64", "128x128"],
    }
    with pytest.raises(SystemExit, match="steps"):
        high_resolution.main(["shapes-sd", "--steps", "4", *to])

    high_resolution.main(["scale", "--sides", "16", "32", "--limit", "1e-9", *to])
    rows = json.loads(output.read_text())["scale"]["rows"]
    assert [row["side"] for row in rows] == [16] * 3  # all further ones would take too long
    high_resolution.main(["scale", "--sides", "16", "32", "--limit", "1e-9", "--restart", *to])
    assert output.with_suffix(".png").is_file()

    high_resolution.main(["seams", "--sizes", "128", "96", "--tiles", "64", "128", "--captions", "2", *to])
    plain, shared, *_ = json.loads(output.read_text())["seams"]["rows"]
    assert shared["worst"] > plain["worst"]
    report.write_page(high_resolution.NAME, tmp_path)
    page = (tmp_path / "high_resolution.md").read_text()
    assert "| LinFusion ladder" in page and "the whole picture's" in page
