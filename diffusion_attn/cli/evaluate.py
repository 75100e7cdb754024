"""Measure a student against its teacher: what their pictures show, how like they are, what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from diffusion_attn.cli import files, models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.method_options import with_weights
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import (
    add_model_arguments,
    check_numbers,
    parse_size,
    pick_device,
    pick_dtype,
    read_prompts,
)
from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.enable import resolve, using
from diffusion_attn.methods import METHODS
from diffusion_attn.metrics.cost import measure
from diffusion_attn.shapes import CaptionError, score
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.scenes import sample_scenes

_SHOWN = 8  # pictures of the grid
_CAPTIONS = 200  # of an embedded model without --prompts
_TEACHERS = {"linfusion": "shapes-sd", "clear": "shapes-flux"}  # without --teacher


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn evaluate``."""
    parser.usage = "diffusion-attn evaluate --student WEIGHTS [--teacher ID_OR_FOLDER] [--prompts FILE] [options]"
    add = parser.add_argument
    add("--student", type=str, metavar="ID_OR_FOLDER", help="weights of the method; by default the published ones")
    add_model_arguments(parser, "--teacher")
    parser.set_defaults(teacher=None)  # it depends on the method
    add("--method", choices=with_weights(METHODS), default="linfusion", help="whose weights the student's are")
    add("--prompts", type=str, metavar="FILE", help="text file, one a line; by default held-out captions of shapes")
    add("--count", type=int, help=f"prompts, from the first; by default all, or {_CAPTIONS} captions of shapes")
    add("--size", type=str, metavar="N|WxH", help="pixels; by default the native size")
    add("--steps", type=int, help="denoising steps; by default what the model recommends")
    add("--guidance", type=float, help="guidance scale, 1 is none; by default what the model recommends")
    add("--seed", type=int, default=0, help="picture i is drawn from seed + i by both")
    add("--batch", type=int, default=10, help="pictures drawn together")
    add("--clip", type=str, metavar="ID_OR_FOLDER", help="CLIP model for a CLIP score")
    add("--fid", type=str, metavar="ID_OR_FOLDER", help="vision model for a Fréchet distance to the teacher's pictures")
    add("--output", type=str, default="outputs/evaluation", metavar="DIR", help="folder of numbers and pictures")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Measure what the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, a model or the weights stand against it.
    """
    if find_spec("torchmetrics") is None:
        raise CommandError("evaluate needs torchmetrics, which is not installed; pip install diffusion-attn[metrics].")
    check_numbers(args, {"count": 1, "steps": 1, "guidance": 0, "seed": 0, "batch": 1})
    teacher = args.teacher or _TEACHERS[args.method]
    prompts = _prompts(args, teacher)
    if args.fid is not None and len(prompts) < 2:
        raise CommandError(f"--fid {args.fid!r} compares sets of pictures; give two prompts or more.")
    size = None if args.size is None else parse_size(args.size)
    device = pick_device(args.device)
    models.check_model(teacher, "--teacher")
    if args.student is not None:
        models.check_weights(args.student, "--student")
    output = Path(args.output).expanduser()
    files.prepare_folder(output)
    with silence(args.quiet):
        student = _student(args)
        scorers = _scorers(args, device)
        pipe = models.load_model(teacher, pick_dtype(args.dtype, device), device, "--teacher")
        models.show_everything(pipe)
        pipe.set_progress_bar_config(disable=True)
        size = size or models.native_size(pipe)
        models.check_size(pipe, size)
        student = student or _method(args).for_pipeline(pipe)
        guidance = models.guidance_of(pipe, teacher, args.guidance)
        call = {
            "width": size[0],
            "height": size[1],
            "num_inference_steps": args.steps or models.default_steps(pipe, teacher),
        }
        drawn = _draw(pipe, student, prompts, guidance, call, args)
        result = {
            "teacher": teacher,
            "student": args.student or "published",
            "method": args.method,
            "prompts": len(prompts),
            "seed": args.seed,
            "batch": args.batch,
            "dtype": str(resolve(pipe)[1].dtype).removeprefix("torch."),
            "device": str(device),
            "guidance_scale": guidance,
            **call,
            **_compare(drawn, prompts, scorers),
        }
        files.save_json(output / "evaluation.json", result)
        files.save_png(output / "evaluation.png", _grid(drawn), {})
    if not args.quiet:
        print(f"{as_table(result)}\n{output}")
    return 0


def _prompts(args: Any, teacher: str) -> list[str]:
    prompts = read_prompts(args.prompts)
    if args.prompts is None:
        from diffusion_attn.shapes.models import available

        if teacher not in available():
            raise CommandError("--prompts is needed: captions of shapes are for embedded models; give a text file.")
        return [caption(scene) for scene in sample_scenes(args.count or _CAPTIONS, args.seed, held_out=True)]
    if not prompts:
        raise CommandError(f"--prompts {args.prompts!r} holds no prompt; give one a line.")
    return prompts[: args.count]


def _method(args: Any) -> Any:
    return METHODS[args.method]


def _student(args: Any) -> Any:
    """The method with the weights of ``--student``; ``None`` without it: the published ones depend on the teacher."""
    if args.student is None:
        return None
    try:
        return _method(args).from_pretrained(args.student)
    except ValueError as error:  # CLEAR's radius: an argument in Python, here only the file's name tells it
        raise CommandError(
            f"--student {args.student!r} is neither a folder here nor a file of a published name, such as "
            "clear_local_16.safetensors, which tells the radius; give one of these, of the Hub the downloaded file."
        ) from error


def _scorers(args: Any, device: torch.device) -> dict[str, Any]:
    from diffusion_attn.metrics.networks import ClipScorer, FrechetScorer

    scorers: dict[str, Any] = {}
    if args.clip is not None:
        scorers["clip"] = ClipScorer(args.clip, device)
    if args.fid is not None:
        scorers["frechet"] = FrechetScorer(args.fid, device)
    return scorers


@dataclass
class _Drawn:
    """What one of the two drew, with the seconds of each of its steps, and of a picture in each batch."""

    images: list[Image.Image] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    picture_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def _draw(
    pipe: Any, student: Any, prompts: Sequence[str], guidance: float | None, call: dict[str, Any], args: Any
) -> dict[str, _Drawn]:
    """The prompts by teacher and student in turns, from the same seeds, so that both see the same machine."""
    denoiser: Any = resolve(pipe)[1]
    drawn = {name: _Drawn() for name in ("teacher", "student")}

    def draw(name: str, start: int, **changes: Any) -> list[Image.Image]:
        part = list(prompts[start : start + args.batch])
        noise = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(part))]
        with using(pipe, student) if name == "student" else nullcontext():
            return pipe(**call_arguments(pipe, part, guidance), generator=noise, **{**call, **changes}).images

    for name in drawn:
        draw(name, 0, num_inference_steps=1)  # what a first run pays for, such as compiling kernels, would count
    with tqdm(total=len(prompts), desc="prompts", unit="prompt", disable=args.quiet) as bar:
        for start in range(0, len(prompts), args.batch):
            for name, one in drawn.items():
                with measure(denoiser.device) as cost, _steps_timed(denoiser) as steps:
                    images = draw(name, start)
                one.images += images
                if len(images) == min(args.batch, len(prompts)):  # the last batch may be smaller
                    one.step_seconds += steps
                    one.picture_seconds.append(cost.seconds / len(images))
                one.peak_bytes = max(one.peak_bytes, cost.peak_bytes)
            bar.update(len(images))
    return drawn


@contextmanager
def _steps_timed(denoiser: Any) -> Iterator[list[float]]:
    """The seconds of each forward pass inside, with everything that is enabled."""
    seconds: list[float] = []
    began = 0.0

    def now() -> float:
        if denoiser.device.type == "cuda":
            torch.cuda.synchronize(denoiser.device)
        return time.perf_counter()

    def before(module: Any, args: Any) -> None:
        nonlocal began
        began = now()

    def after(module: Any, args: Any, output: Any) -> None:
        seconds.append(now() - began)

    handles = [denoiser.register_forward_pre_hook(before), denoiser.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _compare(drawn: dict[str, _Drawn], prompts: Sequence[str], scorers: dict[str, Any]) -> dict[str, Any]:
    from diffusion_attn.metrics.images import psnr, ssim

    teacher, student = drawn["teacher"].images, drawn["student"].images
    numbers: dict[str, dict[str, Any]] = {
        name: {
            "seconds_per_step": median(one.step_seconds),
            "seconds_per_picture": median(one.picture_seconds),
            "peak_memory_bytes": one.peak_bytes,
        }
        for name, one in drawn.items()
    }
    for name, one in drawn.items():
        try:
            numbers[name]["oracle"] = score(one.images, prompts).as_dict()
        except CaptionError:
            break  # prompts about something else than shapes
    if "clip" in scorers:
        for name, one in drawn.items():
            numbers[name]["clip_score"] = fmean(scorers["clip"](one.images, prompts))
    likeness: dict[str, Any] = {
        # Of equal pictures it is infinite, which is neither JSON nor of use in a mean.
        "psnr": fmean(min(value, 100.0) for value in psnr(student, teacher)),
        "ssim": fmean(ssim(student, teacher)),
    }
    if "frechet" in scorers:
        distance = scorers["frechet"](student, teacher)
        likeness["frechet_distance"] = distance if math.isfinite(distance) else None
    return {"numbers": numbers, "likeness": likeness}


def as_table(result: dict[str, Any]) -> str:
    """The numbers of an evaluation as lines of text."""
    teacher, student, likeness = result["numbers"]["teacher"], result["numbers"]["student"], result["likeness"]
    rows: list[tuple[str, ...]] = [("", "teacher", "student")]
    if "oracle" in student:
        rows += [("exact", *(f"{one['oracle']['exact']:.1%}" for one in (teacher, student)))]
        rows += [
            (name.replace("_", " "), *(str(one["oracle"][name]) for one in (teacher, student)))
            for name in ("asked", "read", "missing", "extra", "wrong_color", "wrong_shape")
        ]
    if "clip_score" in student:
        rows += [("CLIP score", *(f"{one['clip_score']:.2f}" for one in (teacher, student)))]
    rows += [
        (f"ms per step of {result['batch']}", *(f"{one['seconds_per_step'] * 1e3:.1f}" for one in (teacher, student)))
    ]
    rows += [("seconds per picture", *(f"{one['seconds_per_picture']:.2f}" for one in (teacher, student)))]
    rows += [("peak MB", *(f"{one['peak_memory_bytes'] / 1e6:.0f}" for one in (teacher, student)))]
    rows += [("PSNR, dB", "", f"{likeness['psnr']:.2f}"), ("SSIM", "", f"{likeness['ssim']:.3f}")]
    if "frechet_distance" in likeness:
        distance = likeness["frechet_distance"]
        rows += [("Fréchet distance", "", "none" if distance is None else f"{distance:.2f}")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name.ljust(widths[0])}  {one.rjust(widths[1])}  {other.rjust(widths[2])}" for name, one, other in rows
    )


def _grid(drawn: dict[str, _Drawn]) -> Image.Image:
    """The first pictures, the teacher's above the student's."""
    from diffusers.utils import make_image_grid

    rows = [one.images[:_SHOWN] for one in drawn.values()]
    return make_image_grid([image for row in rows for image in row], len(rows), len(rows[0]))
