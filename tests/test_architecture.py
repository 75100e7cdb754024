"""Imports go one way, and the base install is enough."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusion_attn"
MAY_IMPORT = {
    "core": {"core"},
    "ops": {"ops", "core.errors"},
    "metrics": {"metrics", "core.errors", "core.loading", "core.pictures", "core.reading", "version"},
    "processors": {"processors", "ops", "core"},
    "methods": {"methods", "processors", "ops", "core"},
    "planning": {"planning", "core", "shapes.models"},
    "shapes": {"shapes", "core", "metrics.pie_bench"},
    "editing": {"editing", "processors", "core", "metrics.cost", "version"},
    "pipelines": {"pipelines", "editing", "methods", "ops", "core", "metrics"},
    "bench": {"bench", "methods", "core", "metrics", "planning", "shapes"},
    "ui": {"ui", "cli", "bench", "editing", "pipelines", "methods", "shapes", "core", "version"},
    "distill": {"distill", "methods", "core", "shapes", "metrics"},
}
FOLDERS = {name: ROOT / name for name in ("distill", "pipelines")}  # the others are inside the package
ENTRY_POINT = "__main__.py"  # imported by nothing, so it may import the command line
BASE = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "jsonargparse"}
BROUGHT = {"numpy", "PIL", "psutil", "tqdm", "yaml", "huggingface_hub"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part):
    files = [path for path in FOLDERS.get(part, PACKAGE / part).rglob("*.py") if path.name != ENTRY_POINT]
    assert files
    for path in files:
        for name in imports_of(path):
            if name.startswith("diffusion_attn."):
                inside = name.removeprefix("diffusion_attn.")
                allowed = any(inside == other or inside.startswith(f"{other}.") for other in MAY_IMPORT[part])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert listed == found | {f"diffusion_attn.{name}" for name in FOLDERS}


def test_ops_know_nothing_of_diffusers():
    for path in (PACKAGE / "ops").rglob("*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("diffusers", "transformers")]


def test_only_base_requirements_are_imported():
    for path in (path for folder in (PACKAGE, *FOLDERS.values()) for path in folder.rglob("*.py")):
        for name in imports_of(path):
            root = name.split(".")[0]
            allowed = {*BASE, *BROUGHT, "diffusion_attn", *sys.stdlib_module_names}
            assert root in allowed | EXTRAS.get(path.parent.name, set()), f"{path}: {name}"


EXTRAS = {
    "kernels": {"triton"},
    "distill": {"prodigyopt", "datasets"},
    "bench": {"matplotlib"},
    "metrics": {"torchmetrics"},
    "pie_bench": {"torchmetrics"},
    "ui": {"gradio"},
    "tabs": {"gradio"},
}  # imported where they are installed
OPTIONAL = (
    "triton",
    "prodigyopt",
    "tensorboard",
    "peft",
    "xformers",
    "torchmetrics",
    "matplotlib",
    "gradio",
    "datasets",
    "scipy",
    "cv2",
    "torchvision",
)


def test_the_base_install_is_enough(tmp_path):
    """Import, enable and generate, with every optional package made unimportable."""
    script = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None there: neither importable nor found by find_spec
import diffusion_attn as da
assert "diffusers" not in sys.modules and "transformers" not in sys.modules
sys.path.insert(0, {str(ROOT)!r})
from tests import tiny
pipe = tiny.sd()
da.enable(pipe, da.HiDiffusion())
tiny.run(pipe, steps=2)
pipe.save_pretrained({str(tmp_path / "model")!r})
from diffusion_attn.cli.main import main
code = main(["generate", "a red star on a blue background", "--model", {str(tmp_path / "model")!r}, "--steps", "2",
             "--method", "hidiffusion", "--size", "128", "--output", {str(tmp_path / "out")!r}, "--quiet"])
assert code == 0, code
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)
    assert list((tmp_path / "out").glob("*.png"))
