"""Measure time per step, peak memory, FLOPs and quality of methods beside the plain model, size by size."""

from __future__ import annotations

import hashlib
import io
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from diffusion_attn.cli import files, models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.method_options import (
    add_method_options,
    build_methods,
    check_names,
    given_options,
    typed,
    with_weights,
)
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import add_model_arguments, check_numbers, parse_size, pick_device, pick_dtype
from diffusion_attn.core.method import Method
from diffusion_attn.core.reading import read_json
from diffusion_attn.methods import METHODS
from diffusion_attn.metrics.machine import device_slug

_ALL = "all"
_GIVEN = ("dtype", "device", "steps", "guidance", "repeats", "quality", "seed")
"""Options that the command which is kept beside the numbers repeats, where they are given."""
_DEFAULTS = {"repeats": 3, "quality": 4, "seed": 0}


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn bench``."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--methods", nargs="+", default=[_ALL], metavar="NAME", help=f"{', '.join(METHODS)}, or {_ALL} that serve")
    add_method_options(parser, "--methods")
    add("--sizes", nargs="+", metavar="N|WxH", help="pixels, 128 or 192x128; by default the native size and its double")
    add("--prompts", nargs="+", metavar="PROMPT", help="by default captions of shapes, for embedded models unseen ones")
    add("--steps", type=int, help="denoising steps of a run; by default what the model recommends")
    add("--guidance", type=float, help="guidance scale, 1 is none; by default what the model recommends")
    add("--repeats", type=int, default=_DEFAULTS["repeats"], help="rounds that are timed")
    add("--quality", type=int, default=_DEFAULTS["quality"], metavar="N", help="pictures of each method and size")
    add("--seed", type=int, default=_DEFAULTS["seed"], help="picture i is drawn from seed + i by all")
    add("--output", type=str, default="outputs/bench", metavar="DIR", help="folder of the JSON file and the plot")
    add("--restart", action="store_true", help="drop the rows that an earlier run has left there")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Measure what the parsed ``args`` ask for, or what an earlier run of them left, and return the exit code.

    Raises:
        DiffusionAttnError: an argument, the model, a method or an earlier result stands against it.
    """
    request = read_request(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    models.check_model(args.model)
    folder = Path(args.output).expanduser()
    files.prepare_folder(folder)
    path = folder / file_name(args.model, device, dtype)
    before = None if args.restart else _earlier(path, args.model)
    with silence():
        pipe = models.load_model(args.model, dtype, device)
        models.show_everything(pipe)
        pipe.set_progress_bar_config(disable=True)
        with tqdm(desc="bench", unit="run", disable=args.quiet) as bar:
            result = measure(pipe, request, path, before, _shown(bar))
        plotted = save_plot(result, path.with_suffix(".png"))
    if not args.quiet:
        from diffusion_attn.bench.table import bench_table, notes

        print("\n".join([bench_table(result), "", *notes(result), *map(str, [path, *plotted])]))
        if not plotted:
            print("no plot: matplotlib is not installed; pip install diffusion-attn[viz].")
    return 0


@dataclass(frozen=True)
class Request:
    """The parsed arguments, valid.

    Attributes:
        args: themselves.
        named: whether methods are asked for by name, so that all of them have to serve.
        methods: by name, or functions that make them of the pipeline.
        options: what is given of them, their weights included, by name.
        sizes: ``(width, height)`` in pixels.
    """

    args: Any
    named: bool
    methods: dict[str, Method | Callable[[Any], Method]]
    options: dict[str, dict[str, Any]]
    sizes: list[models.Size]


def read_request(args: Any) -> Request:
    """The parsed arguments as a `Request`.

    Raises:
        CommandError: an argument is not what it should be.
    """
    named = args.methods != [_ALL]
    names = args.methods if named else list(METHODS)
    check_names(names, "--methods")
    sizes = [parse_size(text, "--sizes") for text in args.sizes or ()]
    check_numbers(args, {"steps": 1, "guidance": 0, "repeats": 1, "quality": 0, "seed": 0})
    methods = dict(zip(names, build_methods(names, args, "--methods"), strict=True))
    options = given_options(args)
    if args.weights is not None:
        (name,) = with_weights(names)
        options[name] = {**options.get(name, {}), "weights": _name_weights(args.weights)}
    return Request(args, named, methods, options, sizes)


def file_name(model: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of a result: what changes its numbers, so that other ones do not overwrite it."""
    releases = [f"{package}{version(package).split('+')[0]}" for package in ("torch", "diffusers")]
    words = ["bench", files.slug(_name(model)), device_slug(device), str(dtype).removeprefix("torch.")]
    return f"{'-'.join([*words, *releases])}.json"


def _name(model: str) -> str:
    """A model or weights as commands in results name them: a folder or file without the way there."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _name_weights(weights: str) -> str:
    """Weights as results tell them apart: local ones by their content as well, since many folders have one name."""
    path = Path(weights).expanduser()
    if not path.exists():
        return weights
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"{_name(weights)} ({digest.hexdigest()[:12]})"


def _earlier(path: Path, model: str) -> dict[str, Any] | None:
    """What an earlier run has left in a file; ``None`` if there is none."""
    if not path.exists():
        return None
    from diffusion_attn.bench.table import bench_table, notes

    remedy = "give another --output, or --restart to begin anew"
    try:
        result = read_json(path)
        other = result["settings"]["model"]
        sound = isinstance(result["machine"], dict) and all(isinstance(each, str) for each in result["commands"])
        for row in result["rows"]:
            sound &= isinstance(row["method"], str) and [type(side) for side in row["size"]] == [int, int]
        bench_table(result)  # which fails at anything but numbers
        notes(result)
    except Exception:
        sound = False
    if not sound:
        raise CommandError(f"{str(path)!r} is no result of a bench, or damaged; {remedy}.")
    if other != _name(model):
        raise CommandError(f"{str(path)!r} holds rows of another model, {other!r}; {remedy}.")
    return result


def measure(
    pipe: Any,
    request: Request,
    path: Path,
    before: dict[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    keep: Callable[[dict[str, Any]], Any] = lambda result: None,
) -> dict[str, Any]:
    """Run the bench; every finished row is in the file ``path`` at once.

    Args:
        pipe: a text-to-image pipeline.
        before: an earlier result that is gone on with.
        progress, keep: as `run_bench` takes them; ``keep`` is called when the file is written.

    Raises:
        CommandError: a size or a method does not suit the model, or ``before`` was made with other settings.
    """
    from diffusion_attn.bench import OtherSettingsError, applicable_methods, run_bench
    from diffusion_attn.bench.run import PROMPT

    args, sizes = request.args, request.sizes
    if not sizes:
        width, height = models.native_size(pipe)
        sizes = [(width, height), (2 * width, 2 * height)]
    for size in sizes:
        models.check_size(pipe, size, "--sizes")
    earlier = before["settings"].get("options", {}) if before else {}
    measured = {row["method"] for row in before["rows"]} if before else set()
    for name in request.methods:
        if name in measured and earlier.get(name, {}) != request.options.get(name, {}):
            raise CommandError(
                f"{str(path)!r} holds rows of {name!r} with other options; give the same options to go on, another "
                "--output, or --restart to drop those rows."
            )
    methods, others = applicable_methods(pipe, request.methods)
    if request.named and others:
        name, reason = next(iter(others.items()))
        raise CommandError(f"--methods {name!r} does not serve --model {args.model!r}: {reason}")
    command = _command(args, sizes)

    def told(result: dict[str, Any]) -> dict[str, Any]:
        commands = [*before["commands"], command] if before else [command]
        return {
            **result,
            "commands": list(dict.fromkeys(commands)),
            "settings": {"model": _name(args.model), **result["settings"], "options": {**earlier, **request.options}},
            "skipped": {**others, **result["skipped"]},
        }

    def kept(result: dict[str, Any]) -> None:
        files.save_json(path, told(result))
        keep(told(result))

    try:
        return told(
            run_bench(
                pipe,
                methods,
                sizes,
                prompt=args.prompts or _captions(args) or PROMPT,
                steps=args.steps or models.default_steps(pipe, args.model),
                guidance=models.guidance_of(pipe, args.model, args.guidance),
                repeats=args.repeats,
                quality=args.quality,
                seed=args.seed,
                progress=progress,
                before=before,
                keep=kept,
            )
        )
    except OtherSettingsError as error:
        raise CommandError(
            f"{str(path)!r} holds rows made with another {', '.join(error.names)}; give the same settings to go "
            "on, another --output, or --restart to drop those rows."
        ) from error


def _captions(args: Any) -> list[str]:
    """Captions that an embedded model has not seen; none for other models."""
    from diffusion_attn.shapes import available, caption, sample_scenes

    if args.model not in available():
        return []
    return [caption(scene) for scene in sample_scenes(max(args.quality, 1), args.seed, held_out=True)]


def _shown(bar: tqdm) -> Callable[[int, int, str], None]:
    def show(done: int, total: int, what: str) -> None:
        bar.total = total
        bar.set_description(what, refresh=False)
        bar.update(done - bar.n)

    return show


def _command(args: Any, sizes: list[models.Size]) -> str:
    """The command that asks for the same, without where its files go."""
    words = ["diffusion-attn", "bench", "--model", _name(args.model), "--methods", *args.methods]
    for name, options in given_options(args).items():
        words += [word for option, value in options.items() for word in (f"--{name}.{option}", typed(value))]
    words += ["--weights", _name(args.weights)] if args.weights else []
    words += ["--sizes", *(f"{w}" if w == h else f"{w}x{h}" for w, h in sizes)]
    words += ["--prompts", *args.prompts] if args.prompts else []
    for name in _GIVEN:
        value = getattr(args, name)
        words += [f"--{name}", str(value)] if value not in (None, _DEFAULTS.get(name)) else []
    return shlex.join(words)


def save_plot(result: dict[str, Any], path: Path) -> list[Path]:
    """Write the plot of a result, where matplotlib is installed; returns its path."""
    if find_spec("matplotlib") is None:
        return []
    from diffusion_attn.bench.plot import plot

    picture = io.BytesIO()
    plot(result).savefig(picture, dpi=120)
    files.save_png(path, Image.open(picture), {"commands": result["commands"]})
    return [path]
