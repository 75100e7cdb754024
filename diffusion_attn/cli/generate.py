"""Draw pictures from prompts, with attention methods enabled or side by side with the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from tqdm import tqdm

from diffusion_attn.cli import comparison, files, ladder, models, oracle
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import Request, add_request_arguments, read_request
from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.enable import using
from diffusion_attn.core.method import Method
from diffusion_attn.metrics.cost import measure
from diffusion_attn.version import __version__


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn generate``."""
    # The generated usage would name every option of every method.
    parser.usage = "diffusion-attn generate PROMPT [PROMPT ...] [--method NAME ...] [--compare] [options]"
    add_request_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Draw what the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, the model or a method stands against it.
    """
    request = read_request(args)
    with silence(args.quiet):
        job = _prepare(request, args.quiet)
        if request.compare:
            _compare(job)
        else:
            _draw_all(job)
    return 0


@dataclass(frozen=True)
class _Job:
    """A request with its model: ``size`` in pixels, ``settings`` as they are written beside each picture."""

    request: Request
    pipe: Any
    methods: tuple[Method, ...]
    base_methods: tuple[Method, ...]
    size: models.Size
    settings: dict[str, Any]
    quiet: bool

    def pictures(self) -> Iterator[tuple[int, str, int]]:
        """``(index, prompt, seed)`` of each picture, in the order of drawing."""
        wanted = self.request.pictures
        bar = tqdm(wanted, desc="pictures", unit="picture", disable=self.quiet or len(wanted) == 1)
        for index, (prompt, seed) in enumerate(bar):
            yield index, prompt, seed

    def say(self, text: str) -> None:
        """Print between the progress bars."""
        if not self.quiet:
            tqdm.write(text)

    @property
    def variants(self) -> dict[str, tuple[Method, ...]]:
        """What is drawn of each picture: the plain model when comparing, and the model with the methods."""
        methods = self.methods
        named = {"+".join(method.name for method in methods) or "plain": methods}
        return {"plain": (), **named} if self.request.compare else named


def _prepare(request: Request, quiet: bool) -> _Job:
    pipe = models.load_model(request.model, request.dtype, request.device)
    size = request.size or models.native_size(pipe)
    if request.ladder is None:  # which draws any size
        models.check_size(pipe, size)
    below = int(len(request.pictures) > 1)  # the bar that counts pictures
    pipe.set_progress_bar_config(disable=quiet, leave=False, position=below)
    settings = {
        **models.run_settings(pipe, request, size),
        "dtype": str(request.dtype).removeprefix("torch."),
        "device": str(request.device),
        "versions": _versions(),
    }
    methods, base_methods = (
        tuple(method if isinstance(method, Method) else method(pipe) for method in asked)
        for asked in (request.methods, request.base_methods)
    )
    for chosen in (methods, base_methods):
        if chosen:
            with using(pipe, *chosen):
                pass  # a method that does not serve this model says so before anything is drawn
    if request.ladder is not None:
        settings |= {name: request.ladder[name] for name in ("ladder", "strength", "refine")}
        settings |= {"base_methods": _options(base_methods)}
    return _Job(request, pipe, methods, base_methods, size, settings, quiet)


def _draw_all(job: _Job) -> None:
    [methods] = job.variants.values()
    for index, prompt, seed in job.pictures():
        _, record = _draw(job, methods, index, prompt, seed)
        job.say(str(job.request.output / record["file"]))


def _compare(job: _Job) -> None:
    """Draw each picture in all variants, and show them side by side."""
    _warm_up(job)
    result = comparison.Comparison(tuple(job.variants))
    for index, prompt, seed in job.pictures():
        result.add([_draw(job, methods, index, prompt, seed) for methods in job.variants.values()])
    request = job.request
    name = f"comparison-{list(job.variants)[-1]}"
    settings = {
        "prompts": list(request.prompts),
        "seed": request.seed,
        "num_images": request.num_images,
        "methods": _options(job.methods),
        **job.settings,
    }
    files.save_json(request.output / f"{name}.json", {**settings, **result.as_dict()})
    files.save_png(request.output / f"{name}.png", result.grid(), settings)
    job.say(f"{result.table()}\n{request.output / name}.png")


def _draw(job: _Job, methods: tuple[Method, ...], index: int, prompt: str, seed: int) -> tuple[Image.Image, dict]:
    """Draw and save one picture; returns it and what is written beside it."""
    options = _options(methods)
    settings = {"prompt": prompt, "seed": seed, "methods": options, **job.settings}
    stem = files.picture_name(index, prompt, seed, "+".join(options))
    stages: dict[str, Any] = {}
    with measure(job.request.device) as cost:
        if job.request.ladder is None:
            image = _call(job, methods, prompt, seed, job.settings["steps"])
        else:
            result = _climb(job, methods, prompt, seed, job.request.output / f"{stem}-stages")
            image, stages = result.images[0], {"stages": ladder.records_of(result)}
    record = {
        "file": f"{stem}.png",
        **settings,
        "seconds": round(cost.seconds, 4),
        "peak_memory_bytes": cost.peak_bytes,
        "oracle": oracle.consult(image, prompt),
        **stages,
    }
    # The picture comes last, so that one that is there is complete.
    files.save_json(job.request.output / f"{stem}.json", record)
    files.save_png(job.request.output / f"{stem}.png", image, settings)
    return image, record


def _call(job: _Job, methods: tuple[Method, ...], prompt: str, seed: int, steps: int) -> Image.Image:
    width, height = job.size
    call = {
        **call_arguments(job.pipe, [prompt], job.settings["guidance"]),
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
    }
    if not methods:
        return job.pipe(**call).images[0]
    with using(job.pipe, *methods):
        return job.pipe(**call).images[0]


def _climb(job: _Job, methods: tuple[Method, ...], prompt: str, seed: int, folder: Path) -> Any:
    """A picture by way of its stages, which are kept in ``folder``."""
    width, height = job.size
    below = int(len(job.request.pictures) > 1)
    made = ladder.make_pipeline(job.pipe, methods, job.base_methods, job.quiet, below)
    return made(
        prompt,
        height=height,
        width=width,
        num_inference_steps=job.settings["steps"],
        guidance_scale=job.settings["guidance"],
        generator=torch.Generator().manual_seed(seed),
        **ladder.call_options(job.request.ladder, folder, job.request.base_scale),
    )


def _warm_up(job: _Job) -> None:
    """A step of each that nobody measures: what a first run pays for, such as compiling kernels, would count."""
    if job.request.ladder is not None:  # minutes long, so that it does not count
        return
    for methods in job.variants.values():
        _call(job, methods, job.request.prompts[0], job.request.seed, 1)


def _options(methods: tuple[Method, ...]) -> dict[str, dict[str, Any]]:
    """The options of methods, without what their own text leaves out: weights."""
    return {
        method.name: {f.name: getattr(method, f.name) for f in fields(cast(Any, method)) if f.repr}
        for method in methods
    }


def _versions() -> dict[str, str]:
    import diffusers

    return {"diffusion-attn": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
