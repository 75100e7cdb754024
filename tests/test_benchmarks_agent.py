"""The benchmark of agent attention: operations as they were counted in the official code, resuming, the report."""

import json

import pytest
import tomesd
import torch

import diffusion_attn as da
from benchmarks import agent, report
from tests import tiny
from tests.tiny import noise


def test_operations_are_the_official_ones(tmp_path, monkeypatch):
    output = tmp_path / "agent-cpu-float32-torch0.json"
    monkeypatch.setattr(agent, "OFFICIAL", {512: agent.OFFICIAL[512]})
    agent.main(["flops", "--output", str(output)])
    row = json.loads(output.read_text())["flops"]["rows"][0]
    for name, official in row["official"].items():
        assert row["counted"][name] == pytest.approx(official, abs=0.051, rel=0.02), name
    output.unlink()
    monkeypatch.setattr(agent, "OFFICIAL", {512: {**agent.OFFICIAL[512], "agents": 7.7}})
    with pytest.raises(SystemExit, match="nothing is kept"):
        agent.main(["flops", "--output", str(output)])
    assert not output.exists()


def test_a_step_is_timed_once_for_each_case_and_reported(tmp_path, capsys):
    output = tmp_path / "agent-cpu-float32-torch0.json"
    run = f"step --small --repeats 1 --batch 1 --output {output} --cases"
    agent.main([*run.split(), "sd:64"])
    first = json.loads(output.read_text())["step"]
    agent.main([*run.split(), "sd:64", "sd:32"])
    both = json.loads(output.read_text())["step"]
    assert [row for row in both["rows"] if row["pixels"] == 64] == first["rows"]
    assert {row["pixels"] for row in both["rows"]} == {32, 64}
    rows = {row["variant"]: row for row in first["rows"]}
    assert rows["AgentAttention, early"]["flops"] < rows["TokenMerging 0.4"]["flops"] < rows["plain"]["flops"]
    assert rows["plain"]["matching"] is None
    assert 0 < rows["TokenMerging 0.4"]["matching"] < rows["TokenMerging 0.4"]["seconds"]
    report.write_page(agent.NAME, tmp_path)
    page = (tmp_path / "agent.md").read_text()
    assert "One UNet step" in page and "32 px" in page


def test_a_layer_is_timed_in_its_parts(tmp_path):
    output = tmp_path / "agent-cpu-float32-torch0.json"
    agent.main(f"layer --sides 16 --repeats 1 --batch 1 --heads 2 --head-dim 8 --output {output}".split())
    seconds = json.loads(output.read_text())["layer"]["rows"][0]["seconds"]
    assert min(seconds.values()) > 0 and {"full attention", "matching, early"} <= seconds.keys()


def test_token_merging_is_tomesd_draw_for_draw():
    unet = tiny.unet()
    x, text = noise(2, 4, 32, 32), noise(2, 5, 12)
    with torch.no_grad():
        torch.manual_seed(11)
        tomesd.apply_patch(unet, ratio=0.5, merge_crossattn=True, merge_mlp=True)
        theirs = [unet(x, t, text).sample for t in (901, 801)]
        tomesd.remove_patch(unet)
        method = da.TokenMerging(
            rng="reference", seed=11, merge_cross_attention=True, merge_feed_forward=True, max_downsample=1
        )
        da.enable(unet, method, timesteps=torch.arange(901, 0, -100))
        ours = [unet(x, t, text).sample for t in (901, 801)]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
