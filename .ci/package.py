"""What a user gets: source archive and wheel, installed where nothing else is, and run there.

The environments are empty but for the wheel and links to what it requires, which the running interpreter has already:
no extra, and nothing of the repository, can be seen from inside. The tests that are run there are the archive's.

    python .ci/package.py                # the versions that are installed
    python .ci/package.py --oldest       # the oldest that pyproject.toml admits, too
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zipfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = (
    "accelerate==1.2.0",
    "diffusers==0.42.0",
    "jsonargparse==4.49.0",
    "safetensors==0.8.0",
    "transformers==5.6.0",
    "huggingface_hub==1.32.0",  # those transformers take none of 2
    "tokenizers==0.22.0",
    "httpx==0.28.1",  # which that hub asks for
    "httpcore==1.0.9",
    "h11==0.16.0",
)
"""torch's oldest is left out: its wheel brings gigabytes for GPUs."""
TESTS = (
    "tests/test_enable.py",
    "tests/test_hidiffusion_golden.py",
    "tests/test_linfusion_golden.py",
    "tests/test_clear_golden.py",
    "tests/test_agent_golden.py",
    "tests/editing/test_pipelines_golden.py",
)
"""A golden file of each method, of which ``flex`` takes a compiler half a minute, and enabling and disabling."""

ENABLE = """
from importlib.util import find_spec
import diffusion_attn as da
assert da.__file__.startswith({work!r}), da.__file__
for extra in ("torchmetrics", "matplotlib", "datasets", "peft", "tensorboard", "pytest"):
    assert find_spec(extra) is None, extra
pipe = da.shapes.load_pipeline("shapes-sd")
pipe.set_progress_bar_config(disable=True)
da.enable(pipe, da.HiDiffusion())
pipe("a red star on a blue background", height=256, width=256, num_inference_steps=2)
da.disable(pipe)
"""
TYPED = """
import diffusion_attn as da
method = da.HiDiffusion(window_attention=False)
with da.using(object(), method, da.TokenMerging()) as report:
    reveal_type(report.layers)
reveal_type(da.enable(object(), method))
reveal_type(da.enabled(object()))
reveal_type(da.LinFusion.from_pretrained("folder"))
da.HiDiffusion(window_attention="no")
da.enable(object(), "hidiffusion")
"""


def main() -> None:
    """Build, compare, install, run; the first thing that is wrong ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oldest", action="store_true", help="run a part of the tests with the oldest versions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel, source = build(work)
        newest = Environment(work / "newest", wheel)
        use(newest, work)
        check_types(newest, work)
        if args.oldest:
            suite = work / "suite"  # beside the archive's other folders they would test these, not the wheel
            shutil.copytree(source / "tests", suite / "tests")
            oldest = Environment(work / "oldest", wheel, ("pytest", "hypothesis"), OLDEST)
            oldest.run("-m", "pytest", *TESTS, "-q", "-k", "not flex", "-p", "no:cacheprovider", cwd=suite)


def build(work: Path) -> tuple[Path, Path]:
    """The wheel, and the unpacked source archive that it was built from."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work, ROOT, capture_output=True)
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        work / "straight",
        ROOT,
        capture_output=True,
    )
    (wheel,), (straight,), (archive,) = work.glob("*.whl"), work.glob("straight/*.whl"), work.glob("*.tar.gz")
    names, others = (set(zipfile.ZipFile(path).namelist()) for path in (wheel, straight))
    assert names == others, f"the wheel of the archive and that of the tree differ: {sorted(names ^ others)}"
    assert "diffusion_attn/py.typed" in names
    with tarfile.open(archive) as tar:
        tar.extractall(work / "source", filter="data")
    (source,) = (work / "source").iterdir()
    listed = run("git", "-c", "safe.directory=*", "ls-files", cwd=ROOT, capture_output=True).stdout.split("\n")
    missing = [name for name in filter(None, listed) if not (source / name).exists()]
    assert not missing, f"the source archive lacks {missing}"
    return wheel, source


class Environment:
    """An environment with a wheel, what it requires, ``also``, and ``versions`` in the place of the installed ones."""

    def __init__(self, folder: Path, wheel: Path, also: tuple[str, ...] = (), versions: tuple[str, ...] = ()) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin/python"
        (packages,) = folder.glob("lib/*/site-packages")
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--quiet", "--disable-pip-version-check")
        run(*pip, "install", "--no-deps", wheel, *versions)
        wanted, seen = ["diffusion-attn", *also], set()
        while wanted:
            name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
            found = next(iter(distributions(name=name, path=[str(packages), *sys.path])), None)
            if name in seen or found is None:  # of another platform or Python
                continue
            seen.add(name)
            wanted += [re.match(r"[\w.-]+", each)[0] for each in found.requires or () if "extra ==" not in each]
            for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
                if not (packages / top).exists():
                    (packages / top).symlink_to(found.locate_file(top))

    def run(self, *command: object, cwd: Path, **options: object) -> "subprocess.CompletedProcess[str]":
        """Run Python in it."""
        return run(self.python, *command, cwd=cwd, **options)


def use(environment: Environment, work: Path) -> None:
    """Generate, edit and enable, from a folder that has nothing to do with the repository."""
    place = work / "elsewhere"
    place.mkdir()
    environment.run("-c", ENABLE.format(work=str(work)), cwd=place)
    command = environment.python.parent / "diffusion-attn"
    options = ("--steps", 3, "--quiet", "--output", "out")
    before, after = "a red star on a blue background", "a green star on a blue background"
    run(command, "generate", before, "--method", "hidiffusion", "--size", 128, *options, cwd=place)
    (picture,) = place.glob("out/*.png")
    run(command, "edit", picture, "--source", before, "--target", after, *options, cwd=place)
    assert len(list(place.glob("out/*.png"))) > 1


def check_types(environment: Environment, work: Path) -> None:
    """What a type checker tells a user of the installed package."""
    script = work / "elsewhere/typed.py"
    script.write_text(textwrap.dedent(TYPED))
    (work / "mypy.ini").write_text("[mypy]\nignore_missing_imports = true\n[mypy-torch.*]\nfollow_imports = skip\n")
    mypy = (sys.executable, "-m", "mypy", "--config-file", work / "mypy.ini", "--python-executable", environment.python)
    told = run(*mypy, script, cwd=script.parent, capture_output=True, check=False).stdout
    for words in (
        'type is "dict[str, list[str]]"',
        'type is "diffusion_attn.core.enable.EnableReport"',
        'type is "list[diffusion_attn.core.method.Method]"',
        'type is "diffusion_attn.methods.linfusion.method.LinFusion"',
        '"window_attention" to "HiDiffusion" has incompatible type "str"; expected "bool"',
        'Argument 2 to "enable" has incompatible type "str"; expected "Method"',
    ):
        assert words in told.replace("builtins.", ""), f"expected {words!r} in\n{told}"


def run(*command: object, check: bool = True, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run a command without anything of the surrounding environment that could lend it packages."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    words = [str(word) for word in command]
    done = subprocess.run(words, text=True, env=environment, **options)  # type: ignore[call-overload]
    if check and done.returncode:
        sys.exit(f"package: {' '.join(words)} failed ({done.returncode})\n{done.stdout or ''}{done.stderr or ''}")
    return done


if __name__ == "__main__":
    main()
