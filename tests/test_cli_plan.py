"""``diffusion-attn plan``: what it tells of models and methods, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_attn.cli.main import main
from diffusion_attn.cli.plan import parse_memory
from diffusion_attn.methods import METHODS
from tests import tiny

ROOT = Path(__file__).parents[1]
UNETS = [name for name in METHODS if name not in ("clear", "low_memory")]


def run(*args, **kwargs):
    """The command as a process of its own; returns what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "diffusion_attn", "plan", *args]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=200, **kwargs).stdout


@pytest.fixture
def plan(tmp_path):
    """Run the command in this process; returns what it wrote."""

    def planned(*args):
        path = tmp_path / "made" / "plan.json"
        assert main(["plan", *args, "--json", str(path)]) == 0
        return json.loads(path.read_text())

    return planned


def by_name(rows):
    return {row["name"]: row for row in rows}


def test_a_huge_picture_of_a_model_that_is_not_here(tmp_path):
    args = ("--model", "sdxl", "--size", "16384x8192", "--method", "linfusion", "--memory", "24GB")
    out = run(*args, "--json", str(tmp_path / "plan.json"))
    assert "2,567.5 million parameters" in out
    assert "512 x 1024 = 524288, 256 x 512 = 131072; text: 77" in out
    assert "fit: low_memory, linfusion + low_memory; decode in tiles" in out
    told = json.loads((tmp_path / "plan.json").read_text())
    rows, decoding = by_name(told["methods"]), told["decoding"]
    assert list(rows) == ["plain", "low_memory", "linfusion", "linfusion + low_memory"]
    assert [row["fits"] for row in rows.values()] == [False, True, False, True]
    assert [row["fits"] for row in decoding] == [False, True]
    assert rows["linfusion"]["flops"] < rows["plain"]["flops"] / 10
    assert rows["linfusion"]["weight_bytes"] - rows["plain"]["weight_bytes"] == pytest.approx(0.87e9, rel=0.02)
    assert "float32" in decoding[0]["name"]  # as SDXL's pipeline decodes


def test_every_method_that_serves_is_planned(plan):
    told = plan("--model", "shapes-sd")
    expected = [f"{first}{also}" for first in UNETS for also in ("", " + low_memory")]
    assert list(by_name(told["methods"])) == ["plain", "low_memory", *expected]
    assert told["size"] == [64, 64] and told["batch"] == 2 and told["dtype"] == "float16" and not told["refused"]
    assert told["token_grids"][0] == [16, 16]
    told = plan("--model", "shapes-flux")
    assert list(by_name(told["methods"])) == ["plain", "low_memory", "clear", "clear + low_memory"]
    assert told["batch"] == 1 and told["dtype"] == "bfloat16"


def test_attention_in_full_precision_is_planned(plan):
    told = plan("--model", "sd21", "--method", "agent")
    assert list(by_name(told["methods"])) == ["plain", "low_memory", "agent", "agent + low_memory"]


def test_options_of_methods_count(plan):
    call = ("--model", "shapes-flux", "--size", "256", "--method", "clear")
    near, far, own = (
        by_name(plan(*call, *options)["methods"])["clear"]
        for options in (("--clear.radius", "2"), ("--clear.radius", "9"), ("--weights", "none"))
    )
    assert near["attention_flops"] < far["attention_flops"]
    assert own["weight_bytes"] < near["weight_bytes"]


def test_methods_that_do_not_serve_are_told_with_the_reason(plan, capsys):
    told = plan("--model", "shapes-sd", "--size", "128", "--method", "clear", "hidiffusion", "--memory", "1GiB")
    assert list(by_name(told["methods"])) == ["plain", "low_memory", "hidiffusion", "hidiffusion + low_memory"]
    assert list(told["refused"]) == ["clear", "clear + hidiffusion"]
    out = capsys.readouterr().out
    assert "clear does not serve: Clear serves the transformers" in out
    assert out.endswith("the VAE decodes at once.\n")


def test_methods_of_one_layer_are_not_planned_together(plan):
    told = plan("--model", "shapes-sd", "--method", "linfusion", "token_merging")
    assert "both replace the attention" in told["refused"]["linfusion + token_merging"]
    both = ("--method", "linfusion", "hidiffusion", "low_memory", "--hidiffusion.window_attention", "false")
    assert "linfusion + hidiffusion + low_memory" in by_name(plan("--model", "shapes-sd", *both)["methods"])


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("1MB", "Nothing fits 0.00 GiB: the least is low_memory"),
        ("16MB", "fit: low_memory; "),
        ("1TB", None),
    ],
)
def test_the_last_sentence_says_what_fits(memory, said, capsys):
    code = main(["plan", "--model", "shapes-sd", "--size", "256", "--method", "low_memory", "--memory", memory])
    streams = capsys.readouterr()
    if said is None:
        assert code == 2 and "--memory '1TB'" in streams.err
    else:
        assert code == 0 and said in streams.out.splitlines()[-1]


@pytest.mark.parametrize("make", [tiny.sdxl, tiny.sd3])
def test_a_folder_is_planned_from_its_configs(make, tmp_path, plan):
    make().save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    args = ("--size", "192x128", "--dtype", "float32", "--batch", "1", "--method", "low_memory")
    told = plan("--model", str(tmp_path / "model"), *args)
    assert told["dtype"] == "float32" and told["batch"] == 1 and told["methods"][0]["flops"] > 0


def test_memory():
    assert parse_memory("24GB") == 24 * 10**9 and parse_memory("1.5 gib") == 3 * 2**29
    assert parse_memory("8000MB") == 8 * 10**9 and parse_memory("512MiB") == 2**29
    if not torch.cuda.is_available():
        assert parse_memory(None) is None


BAD_ARGUMENTS = {
    "unknown method": (["--method", "magic"], ["'magic'", "linfusion"]),
    "memory of words": (["--memory", "plenty"], ["--memory 'plenty'", "24GB"]),
    "no memory": (["--memory", "0GB"], ["--memory '0GB'"]),
    "memory without a unit": (["--memory", "24"], ["--memory '24'", "24GB"]),
    "size of words": (["--size", "large"], ["--size 'large'"]),
    "size that cannot be": (["--model", "sdxl", "--size", "1020"], ["--size 1020x1020", "multiples of 8", "1024x1024"]),
    "tokens of two cells": (["--model", "flux", "--size", "1032"], ["multiples of 16", "1024x1024"]),
    "larger than positions": (["--model", "sd3", "--size", "4096"], ["--size 4096x4096", "pos_embed_max_size"]),
    "unknown model": (["--model", "sdxxl"], ["--model 'sdxxl'", "sdxl", "shapes-sd", "owner/name"]),
    "weights": (["--weights", "a/b", "--method", "linfusion"], ["--weights 'a/b'", "none"]),
    "no batch": (["--batch", "0"], ["--batch 0"]),
    "unknown dtype": (["--dtype", "int8"], ["int8", "bfloat16"]),
    "option out of range": (["--method", "clear", "--model", "flux", "--clear.radius", "0"], ["radius=0", "clear"]),
    "no folder for the file": (["--json", "/dev/null/plan.json"], ["--json '/dev/null'"]),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_what_cannot_be_is_refused_in_a_sentence(name, capsys):
    args, words = BAD_ARGUMENTS[name]
    assert main(["plan", *args]) == 2
    streams = capsys.readouterr()
    assert not streams.out and all(word in streams.err for word in words), streams.err
    assert len(streams.err.splitlines()) == 1
