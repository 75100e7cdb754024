"""Recipes: read, overridden, checked before anything is loaded; and the command."""

import json

import pytest
import yaml

import diffusion_attn as da
from diffusion_attn.cli.main import main
from diffusion_attn.distill import ConfigError, DistillConfig, trainer
from diffusion_attn.distill.config import RECIPES


@pytest.fixture
def load(tmp_path):
    def load(text, **overrides):
        (tmp_path / "recipe.yaml").write_text(text)
        return DistillConfig.load(tmp_path / "recipe.yaml", overrides)

    return load


def test_recipe_defaults_and_overrides(load, tmp_path):
    config = load("optim: {lr: 1e-3, betas: [0.8, 0.9]}", optim={"lr": 0.5}, run={"steps": 3})
    assert (config.optim.lr, config.optim.betas, config.run.steps) == (0.5, (0.8, 0.9), 3)
    assert config.loss == DistillConfig().loss
    config.save(tmp_path / "saved.yaml")
    assert DistillConfig.load(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_found_by_name_and_explain_their_numbers(path):
    config = DistillConfig.load(path.stem)
    assert config == DistillConfig.load(f"recipes/{path.name}") == DistillConfig.load(path)
    assert set(yaml.safe_load(path.read_text())) == {"model", "method", "data", "loss", "optim", "run"}
    assert path.read_text().startswith("# ")


BAD = {
    "not yaml": ("optim: [", "expected"),
    "not a mapping": ("- 1", r"says \[1\].*model, method"),
    "a section of the wrong kind": ("optim: 3", "optim|mapping"),
    "unknown section": ("optimizer: {lr: 1}", "optimizer"),
    "unknown name": ("optim: {rate: 1}", "rate"),
    "wrong type": ("optim: {lr: fast}", r"optim.lr.*float.*fast"),
    "not a choice": ("data: {fit: stretch}", r"data.fit.*squash.*stretch"),
    "rate": ("optim: {lr: 0}", r"optim.lr=0.*above 0"),
    "batch": ("optim: {batch_size: 7, micro_batch: 2}", r"optim.batch_size=7.*optim.micro_batch=2"),
    "method": ("method: {name: hidiffusion}", r"'hidiffusion'.*linfusion"),
    "expression": ("loss: {layers: '('}", r"loss.layers='\('.*regular expression"),
    "no loss": ("loss: {target: 0, prediction: 0, attention: 0}", "one weight above 0"),
    "shift": ("loss: {shift: 0}", "loss.shift=0.*above 0"),
    "endless shift": ("loss: {shift: .inf}", "loss.shift=inf"),
    "scale": ("loss: {guided: 1, guidance_scale: 1}", "loss.guidance_scale=1.0.*above 1"),
    "guided and dropped": (
        "{loss: {guided: 1}, data: {caption_dropout: 0.1}}",
        "data.caption_dropout=0.1.*loss.guided",
    ),
    "decay": ("optim: {ema_decay: 1}", "optim.ema_decay=1"),
    "share": ("data: {max_broken: 2}", "data.max_broken=2"),
    "seed": ("run: {seed: -1}", "run.seed=-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_told(case, load):
    text, expected = BAD[case]
    with pytest.raises(ConfigError, match=expected) as caught:
        load(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nothing"], ["'nothing'", "shapes-linfusion"]),
        (["shapes-linfusion", "--optim.lr", "fast"], ["'fast'", "float"]),
        (["shapes-linfusion", "--optim.lr", "-1"], ["optim.lr=-1.0", "above 0"]),
        (["shapes-linfusion", "--optim.rate", "1"], ["--optim.rate"]),
        (["linfusion-sd21"], ["data.path", "--data FOLDER"]),
        (["linfusion-sd21", "--data", "none"], ["'none'", "expected a folder"]),
        (["shapes-linfusion", "--output", f"{__file__}/x"], ["run.output", "another folder"]),
        (["shapes-linfusion", "--run.mixed_precision", "fp16"], ["GPU", "'bf16'"]),
        (["shapes-linfusion", "--optim.batch_size", "5"], ["optim.batch_size=5", "micro_batch=32"]),
    ],
)
def test_the_command_tells_in_one_sentence_before_a_model_is_loaded(argv, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "load_teacher", lambda *_: pytest.fail("a model was loaded"))
    assert main(["distill", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("diffusion-attn: error: ") and err.count("\n") == 1
    assert all(words in err for words in expected), err
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_a_recipe(recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    argv = ["distill", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"), "--run.steps", "3"]
    assert main([*argv, "--optim.betas", "[0.5, 0.6]", "--data.size", "32"]) == 0
    out, err = capsys.readouterr()
    assert str(tmp_path / "out") in out and "3/3" in err and "attention=" in err
    assert da.LinFusion.from_pretrained(tmp_path / "out").layers
    assert DistillConfig.load(tmp_path / "out" / "distill.yaml").optim.betas == (0.5, 0.6)
    assert main([*argv[:-1], "4", "--quiet", "--resume", "--optim.betas", "[0.5, 0.6]"]) == 0
    assert len(json.loads((tmp_path / "out" / "history.json").read_text())) == 4
    assert main(argv) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"name": "no/such-model"}}, r"model.name='no/such-model' could not be loaded"),
        ({"data": {"size": 40}}, r"data.size=40: expected a multiple of 32"),
        ({"loss": {"layers": "up_blocks.9"}}, r"loss.layers='up_blocks.9'.*down_blocks"),
        ({"run": {"trackers": ["notepad"]}}, r"run.trackers=\['notepad'\]"),
        ({"method": {"weights": "none"}}, r"'none'"),
    ],
)
def test_what_only_the_model_can_tell(distil, changes, expected, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(da.DiffusionAttnError, match=expected):
        distil(**changes)
