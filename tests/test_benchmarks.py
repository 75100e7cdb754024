"""The benchmarks: FLOP counts against the official code's, resuming, the report."""

import json

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import diffusion_attn as da
from benchmarks import common, distill, hidiffusion, linfusion, report
from benchmarks.common import LAYOUTS, TIMESTEPS
from diffusion_attn.distill import DistillConfig, Distiller
from diffusion_attn.shapes.tokenizer import build_tokenizer


@pytest.mark.parametrize(("layout", "pixels"), hidiffusion.OFFICIAL)
def test_flops_are_those_of_the_card(layout, pixels):
    row = hidiffusion.flops_row(LAYOUTS[layout], pixels, hidiffusion.OFFICIAL[layout, pixels])
    assert row["deviation"] == pytest.approx(dict.fromkeys(row["official"], 0.0), abs=hidiffusion.TOLERANCE)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_is_counted(device):
    common.check_counter(device)


@pytest.mark.parametrize(("layout", "pixels"), [("sd", 2048), ("sdxl", 2048)])
def test_the_schedule_is_what_runs(layout, pixels):
    layout = LAYOUTS[layout]
    unet = layout.build(small=True)
    steps = hidiffusion.schedule(layout, pixels)
    changes = [step for step in range(1, 50) if steps[step] != steps[step - 1]]
    assert len(changes) == 2
    forced = {}
    for name in set(steps):
        with hidiffusion.hidiffusion(layout, name)(unet):
            forced[name] = common.count_flops(layout.call(unet, pixels))
    assert len(set(forced.values())) == 3
    with da.using(unet, da.HiDiffusion(), timesteps=TIMESTEPS):
        for step in (0, 49, *changes, *(step - 1 for step in changes)):
            assert common.count_flops(layout.call(unet, pixels, step)) == forced[steps[step]]


def test_deep_shrink_works_early_and_leaves_no_trace():
    layout = LAYOUTS["sd"]
    unet = layout.build("cpu", small=True)
    early, late = layout.call(unet, 128), layout.call(unet, 128, step=17)
    with torch.no_grad():
        plain = early(), late()
        with common.deep_shrink(unet):
            shrunk = early(), late()
            with pytest.raises(ValueError, match="multiples of 16"):
                layout.call(unet, 64)()
        assert not torch.equal(shrunk[0], plain[0])
        assert torch.equal(shrunk[1], plain[1])
        assert torch.equal(early(), plain[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.fixture
def model(tmp_path):
    """A pipeline of shapes-sd's parts, tiny and untrained: 32 px, four times fewer latent cells a side."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            sample_size=32,
            block_out_channels=(4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=2,
            mid_block_add_attention=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8, 8, 8),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=1,
            norm_num_groups=2,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_quality_resumes(model, tmp_path, capsys):
    output = tmp_path / "quality.json"

    def run(*arguments):
        options = f"quality --model {model} --output {output} --captions 2 --steps 2 --batch 2"
        hidiffusion.main([*options.split(), *arguments])
        return json.loads(output.read_text())["quality"]

    first = run("--sizes", "1", "2", "--variants", "plain", "both")
    assert [(row["pixels"], row["variant"]) for row in first["rows"]] == [(32, "plain"), (64, "plain"), (64, "both")]
    assert all(row["images"] == 2 for row in first["rows"])
    assert str(tmp_path) not in output.read_text()

    # As if the run had been stopped in its last row: that one is drawn again, the others are kept to the last digit.
    common.write_section(output, "quality", {**first, "rows": first["rows"][:2]})
    names = [name for name in hidiffusion.QUALITY if "LinFusion" not in name]  # whose weights are another model's
    second = run("--sizes", "1", "2", "4", "--variants", *names)
    assert second["rows"][:2] == first["rows"][:2]
    again = next(row for row in second["rows"] if (row["size"], row["variant"]) == (2, "both"))
    assert {**again, "seconds": 0} == {**first["rows"][2], "seconds": 0}
    assert ["windows" in command for command in second["commands"]] == [False, True]
    assert [(row["size"], row["variant"]) for row in second["rows"]] == [
        (1, "plain"),
        *((2, name) for name in names[:-1]),
        *((4, name) for name in names),
    ]
    assert "deep shrink by 4" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="another guidance"):
        run("--guidance", "5", "--variants", "plain")
    assert run("--guidance", "5", "--restart", "--sizes", "1", "--variants", "plain")["rows"][0]["size"] == 1


def test_speed_and_report(tmp_path, capsys):
    output = tmp_path / "hidiffusion-cpu-float32-torch0.json"
    hidiffusion.main(f"speed --small --sizes 128 --repeats 1 --every-regime --output {output}".split())
    rows = json.loads(output.read_text())["speed"]["rows"]
    assert {"plain", "window", "D", "D + window", "D+P + window"} <= {row["variant"] for row in rows}
    assert all(row["seconds"] > 0 and row["speedup"] > 0 for row in rows)

    counted = {"vanilla": 2.0, "window": 1.0, "mean": 1.0, "ratio": 2.0}
    row = {"model": "SD 1.5", "pixels": 1024, "counted": counted, "official": counted, "deviation": {}}
    flops = {"commands": ["python -m benchmarks.hidiffusion flops"], "machine": {"cores": 2}, "rows": [row]}
    common.write_section(output, "flops", flops)
    report.write_page(hidiffusion.NAME, tmp_path)
    page = (tmp_path / "hidiffusion.md").read_text()
    assert "| SD 1.5, 1024 px | counted   |   2.000 |       1.000 | - |" in page
    assert "$ python -m benchmarks.hidiffusion flops" in page
    assert "- machine: cores 2" in page
    assert "| 128 | D + window" in page
    assert "oracle" not in page
    assert str(tmp_path) not in page


def test_no_speed_without_parity(tmp_path, monkeypatch):
    output = tmp_path / "speed.json"
    monkeypatch.setattr(da.ops, "window_attention", lambda q, k, v, **kwargs: v)
    with pytest.raises(SystemExit, match="single window is full attention"):
        hidiffusion.main(f"speed --small --sizes 128 --repeats 1 --output {output}".split())
    assert not output.exists()


def test_report_without_results(tmp_path):
    with pytest.raises(SystemExit, match="nothing to report"):
        report.write_page(hidiffusion.NAME, tmp_path)


def test_linfusion_ops_steps_and_report(tmp_path, capsys):
    output = tmp_path / "linfusion-cpu-float32-torch0.json"
    linfusion.main(f"op --tokens 64 256 --softmax-until 64 --heads 2 --repeats 1 --output {output}".split())
    rows = json.loads(output.read_text())["op"]["rows"]
    assert [(row["tokens"], row["op"]) for row in rows] == [
        *((64, name) for name in linfusion.OPS),
        *((256, name) for name in list(linfusion.OPS)[1:]),
    ]
    floor = {row["tokens"]: row["floor_bytes"] for row in rows}
    assert floor == {tokens: 4 * 4 * tokens * 2 * 64 for tokens in (64, 256)}
    linfusion.main(f"step --small --layout sdxl --sizes 128 128x256 --repeats 1 --output {output}".split())
    steps = json.loads(output.read_text())["step"]["rows"]
    assert [(row["width"], row["height"], row["variant"]) for row in steps[2:]] == [
        (128, 256, "plain"),
        (128, 256, "LinFusion"),
    ]
    assert all(row["seconds"] > 0 and row["flops"] > 0 for row in steps)
    report.write_page(linfusion.NAME, tmp_path)
    page = (tmp_path / "linfusion.md").read_text()
    assert "| 128 x 256 |" in page and "## The op" in page and str(tmp_path) not in page


def test_operations_are_those_that_are_counted():
    args = linfusion.parse(["op", "--heads", "2", "--head-dim", "8"])
    q, k, v = (torch.empty(1, 2, 2048, 8, device="meta") for _ in range(3))
    counted = {name: common.count_flops(lambda name=name: linfusion.OPS[name](q, k, v)) for name in linfusion.OPS}
    assert counted == {name: linfusion.operations(name, 2048, args) for name in linfusion.OPS}


def test_no_linfusion_times_without_parity(tmp_path, monkeypatch):
    output = tmp_path / "op.json"
    monkeypatch.setattr(da.ops, "linear_attention", lambda q, k, v: v)
    with pytest.raises(SystemExit, match="not the published formula"):
        linfusion.main(f"op --tokens 64 --repeats 1 --output {output}".split())
    assert not output.exists()


def test_the_parts_of_a_step_and_a_curve_of_runs(model, tmp_path, capsys):
    output = tmp_path / "distill-cpu-float32-torch0.json"
    distill.main(f"step --model {model} --batch 2 --repeats 1 --output {output}".split())
    rows = {row["part"]: row for row in json.loads(output.read_text())["step"]["rows"]}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows[distill.CACHED]["flops"] == 0 < rows[distill.FORWARD]["flops"]
    # A backward pass costs about twice its forward pass, and a checkpointed one the forward pass again.
    assert 1.8 < rows[distill.BOTH]["flops"] / rows[distill.FORWARD]["flops"] < 3.2
    assert rows[distill.BOTH]["flops"] < rows[distill.CHECKPOINTED]["flops"]

    for name, attention in {"with": 0.5, "without": 0.0}.items():
        recipe = {
            "model": {"name": str(model)},
            "data": {"source": "shapes"},
            "loss": {"attention": attention},
            "optim": {"batch_size": 1, "micro_batch": 1},
            "run": {"output": str(tmp_path / name), "steps": 3, "log_every": 1},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        Distiller(DistillConfig.load(tmp_path / "recipe.yaml"), quiet=True).train()
    distill.main(["curve", "--runs", str(tmp_path / "with"), str(tmp_path / "without"), "--output", str(output)])
    runs = json.loads(output.read_text())["curve"]["runs"]
    assert [point["step"] for point in runs["with"]["points"]] == [1, 2, 3]
    assert "attention" in runs["with"]["points"][0] and "attention" not in runs["without"]["points"][0]
    report.write_page(distill.NAME, tmp_path)
    page = (tmp_path / "distill.md").read_text()
    assert "| teacher, forward" in page and "| without" in page and str(tmp_path) not in page
    with pytest.raises(SystemExit, match=r"holds no history\.json"):
        distill.main(["curve", "--runs", str(tmp_path), "--output", str(output)])
