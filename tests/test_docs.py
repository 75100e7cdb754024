"""The pages: their Python runs, their commands run, the book builds, and tables are what their scripts write.

Nothing is downloaded: names on the Hub are found in a cache of it that holds small models of the same layouts. Pictures
are drawn in a few steps of at most 96 pixels. Everything else is executed as it is printed.
"""

from __future__ import annotations

import ast
import copy
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import typing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusion_attn as da
from diffusion_attn import bench
from diffusion_attn.cli import distill
from diffusion_attn.cli.main import COMMANDS, main, parse
from diffusion_attn.distill import DistillConfig, Distiller
from diffusion_attn.pipelines import DPLPipeline, HighResolutionPipeline
from diffusion_attn.shapes.models import CLIP, FOLDER, IP_ADAPTER
from tests import compatibility, test_matrix, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # below results/ are pages that programs write
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
STEPS, LADDER_STEPS, SIDE = 2, 5, 96


def blocks(page, *languages):
    """``(line, text)`` of each fenced block of a page; the line is that of the block's first."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found[2] in languages:
            yield text.count("\n", 0, found.start(3)) + 1, textwrap.dedent(found[3])


def commands(page):
    """The commands of a page's console blocks, each as its words."""
    for line, text in blocks(page, "console"):
        for found in re.finditer(r"^\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE):
            yield line + text.count("\n", 0, found.start()), shlex.split(found[1].replace("\\\n", ""), comments=True)


def with_blocks(collect):
    pages = [page for page in PAGES if any(collect(page))]
    return pytest.mark.parametrize("page", pages, ids=[page.stem for page in pages])


# ---- the Hub, in small

put = partial(shutil.copytree, dirs_exist_ok=True)


def clear_weights(folder):
    for radius, factor in ((8, 1), (8, 4), (16, 1)):
        tiny.clear_weights(radius, factor).save_pretrained(folder)


def ip_adapter(folder):
    put(CLIP, folder / "models" / "image_encoder")
    shutil.copy(CLIP / IP_ADAPTER, folder / "models" / "ip-adapter_sd15.safetensors")


HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": lambda folder: put(FOLDER / "shapes-sd", folder),
    "stabilityai/stable-diffusion-xl-base-1.0": lambda folder: tiny.sdxl().save_pretrained(folder),
    "black-forest-labs/FLUX.1-dev": lambda folder: tiny.flux().save_pretrained(folder),
    "Yuanshi/LinFusion-1-5": lambda folder: put(FOLDER / "shapes-linfusion", folder),
    "Yuanshi/LinFusion-XL": lambda folder: da.LinFusion.for_model(tiny.unet(tiny.SDXL)).save_pretrained(folder),
    "Huage001/CLEAR": clear_weights,
    "h94/IP-Adapter": ip_adapter,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": lambda folder: put(CLIP, folder),
}
"""What is in the folder of each name."""


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A folder like the Hub's own cache of downloads."""
    root, commit = tmp_path_factory.mktemp("hub"), "0" * 40
    for name, make in HUB.items():
        entry = root / f"models--{name.replace('/', '--')}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text(commit)
        (entry / "snapshots" / commit).mkdir(parents=True)
        make(entry / "snapshots" / commit)
    return root


@pytest.fixture
def hub(cached, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cached))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ---- blocks of Python


def shorter(function):
    """``function``, or one that draws in few steps at most `SIDE` pixels, trains for a step, or measures once."""
    if function is Distiller:
        return lambda config: Distiller(
            replace(
                config,
                run=replace(config.run, steps=1, validation_steps=STEPS),
                optim=replace(config.optim, batch_size=1, micro_batch=1),
            ),
            quiet=True,
        )
    if function is bench.run_bench:
        few = {"steps": STEPS, "repeats": 1, "quality": 1}
        return lambda pipe, methods, sizes, **kwargs: function(pipe, methods, sizes[:1], **{**kwargs, **few})
    if isinstance(function, HighResolutionPipeline):
        few = {"num_inference_steps": LADDER_STEPS}
    elif isinstance(function, DiffusionPipeline):
        few = {"num_inference_steps": STEPS}
    elif getattr(function, "__func__", None) is DPLPipeline.invert:
        few = {"num_inference_steps": STEPS, "num_word_steps": 1, "num_null_steps": 1}
    else:
        return function

    def call(*args, **kwargs):
        kwargs |= {side: min(kwargs[side], SIDE) for side in ("height", "width") if side in kwargs}
        return function(*args, **{**few, **kwargs})

    return call


class Shorter(ast.NodeTransformer):
    """Wraps what is called: ``f(x)`` becomes ``shorter(f)(x)``."""

    def visit_Call(self, node):
        self.generic_visit(node)
        node.func = ast.Call(ast.Name("shorter", ast.Load()), [node.func], [])
        return node


def read_block(page, line, code):
    tree = ast.parse("\n" * (line - 1) + code, page.name)  # so that tracebacks name the page's own lines
    return compile(ast.fix_missing_locations(Shorter().visit(tree)), page.name, "exec")


@pytest.fixture(scope="module")
def models():
    """The embedded pipelines, loaded once, without bars."""
    return {"pipe": tiny.quiet(da.shapes.load_pipeline()), "flux": tiny.quiet(da.shapes.load_pipeline("shapes-flux"))}


def own(pipe):
    """A pipeline with a denoiser of its own."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    return tiny.quiet(type(pipe).from_pipe(pipe, **{part: copy.deepcopy(tiny.denoiser(pipe))}))


@with_blocks(lambda page: blocks(page, "python", "pycon"))
def test_python_runs_as_it_is_printed(page, models, hub, tmp_path, monkeypatch):
    """A page's blocks run one after the other, as they are read; what a block enables, it takes to its end only."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look their annotations up
    photo = da.shapes.render(da.shapes.sample_scene(0), 64)
    names = vars(module)
    names.update({name: own(pipe) for name, pipe in models.items()}, da=da, photo=photo, shorter=shorter)
    names["generator"] = torch.Generator().manual_seed(0)
    for line, code in blocks(page, "python", "pycon"):
        if code.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, names, page.name, page.name, line - 1)
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
        else:
            exec(read_block(page, line, code), names)
        for name in models:
            da.disable(names[name])


# ---- commands

DRAWN = ("generate", "upscale", "attention-map", "edit")
"""Commands that are run. The others take long, so that their arguments are parsed only, and their recipes read."""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files that pages speak of."""
    monkeypatch.chdir(tmp_path)
    da.shapes.render(da.shapes.sample_scene(0), 64).save("photo.png")
    Path("prompts.txt").write_text("a red star on a white background\n")
    for name in ("student", "my-linfusion"):
        shutil.copytree(FOLDER / "shapes-linfusion", name)
    return tmp_path


def quick(words):
    """The words of a command that draws, with few steps, one picture for each prompt, and at most `SIDE` pixels."""
    words = list(words)
    if "--size" in words:
        at = words.index("--size") + 1
        words[at] = "x".join(str(min(int(side), SIDE)) for side in words[at].split("x"))
    if "--num-images" in words:
        words[words.index("--num-images") + 1] = "1"
    steps = LADDER_STEPS if words[0] == "upscale" or "--ladder" in words else 1 if "dpl" in words else STEPS
    return [*words, "--steps", str(steps), "--quiet"]


@with_blocks(commands)
def test_commands_run(page, hub, desk, capsys):
    for line, words in commands(page):
        where = f"{page.name}:{line}: {shlex.join(words)}"
        if words[0] == "python":
            assert words[1] == "-m" or (ROOT / words[1]).is_file(), where
        if words[:2] == ["accelerate", "launch"]:
            words = ["diffusion-attn", "distill", *words[words.index("diffusion_attn.distill") + 1 :]]
        if words[0] != "diffusion-attn":
            continue
        _, args = parse(words[1:])
        if args.subcommand in DRAWN:
            assert main(quick(words[1:])) == 0, (where, capsys.readouterr().err)
        if args.subcommand == "distill":
            sections = typing.get_type_hints(DistillConfig)
            given = {name: distill.given(args.distill, name, kind) for name, kind in sections.items()}
            DistillConfig.load(args.distill.recipe, given)


def test_every_command_has_an_example():
    shown = {parse(words[1:])[1].subcommand for _, words in commands(ROOT / "docs" / "cli.md")}
    assert shown == COMMANDS.keys()


# ---- tables and numbers


def test_the_table_of_what_goes_together_is_the_matrix():
    """A method without a row fails test_matrix; one that is new there, this."""
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.page()


def test_the_readme_links_to_what_is_there():
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and all((ROOT / link).exists() for link in links), links


LINK = re.compile(r"\[([^\]]*)\]\(results/(\w+)\.md[^)]*\)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_numbers_that_are_linked_to_results_are_there():
    """As they stand, or rounded."""
    found = 0
    for page in PAGES:
        for text, name in LINK.findall(page.read_text(encoding="utf-8")):
            there = [float(x) for x in NUMBER.findall((ROOT / "docs" / "results" / f"{name}.md").read_text())]
            for number in NUMBER.findall(text):
                digits = len(number.partition(".")[2])
                assert any(round(x, digits) == float(number) for x in there), (page.name, text)
                found += 1
    assert found > 20


# ---- the method that a page makes


def test_the_method_of_the_page_passes_the_matrix(monkeypatch):
    _, code = next(blocks(ROOT / "docs" / "adding_a_method.md", "python"))
    module = ModuleType("steady")
    monkeypatch.setitem(sys.modules, "steady", module)
    exec(code, vars(module))
    monkeypatch.setitem(test_matrix.ROWS, "steady", (test_matrix.SHORT, lambda model: module.SteadyAttention()))
    test_matrix.test_with_lora("steady", test_matrix.lora_on_attention)
    test_matrix.test_a_copy_of_an_enabled_model_works_on_its_own("steady")
    test_matrix.test_disable_leaves_no_trace("steady")


# ---- the book


def test_the_book_builds_without_a_warning_and_fetches_nothing(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    pages = {path.relative_to(tmp_path): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for path, page in pages.items():
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\"> ]*)", page)
        assert not fetched, (path, fetched)
    anchors = {name.rpartition(".")[2] for page in pages.values() for name in re.findall(r'id="([\w.]+)"', page)}
    parts = (da, da.ops, da.processors, da.pipelines, da.editing, da.editing.inversion, da.distill, da.shapes, bench)
    for part in parts:
        functions = {name for name in part.__all__ if callable(getattr(part, name))}
        assert functions <= anchors, (part.__name__, functions - anchors)
