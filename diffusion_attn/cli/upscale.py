"""Enlarge pictures and draw them anew at their new size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_attn.cli import files, ladder, models, oracle
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.method_options import add_methods, build_methods, check_names
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import (
    LARGEST_SIDE,
    add_model_arguments,
    check_numbers,
    parse_size,
    pick_device,
    pick_dtype,
)
from diffusion_attn.core.method import Method


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn upscale``."""
    parser.usage = "diffusion-attn upscale IMAGE [IMAGE ...] [--scale X | --size WxH] [--prompt TEXT] [options]"
    add = parser.add_argument
    add("image", type=str, nargs="+", metavar="IMAGE", help="picture files")
    add("--prompt", type=str, default="", metavar="TEXT", help="what the pictures show; helps much")
    add("--scale", type=float, metavar="X", help="the result's sides by the picture's; by default 2")
    add("--size", type=str, metavar="N|WxH", help="pixels of the result, instead of --scale")
    add_model_arguments(parser)
    add_methods(parser)
    ladder.add_ladder_arguments(parser, "auto")
    add("--steps", type=int, help="steps of the schedule; by default what the model recommends")
    add("--guidance", type=float, help="guidance scale, 1 is none; by default what the model recommends")
    add("--seed", type=int, default=0)
    add("--output", type=str, default="outputs", metavar="DIR", help="folder of the pictures")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Enlarge what the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, a picture, the model or a method stands against it.
    """
    request = read_request(args)
    device = pick_device(args.device)
    models.check_model(args.model)
    files.prepare_folder(Path(args.output).expanduser())
    with silence(args.quiet):
        pipe = models.load_model(args.model, pick_dtype(args.dtype, device), device)
        for path, _, _ in enlarge(pipe, request):
            if not args.quiet:
                print(path)
    return 0


@dataclass(frozen=True)
class Request:
    """The parsed arguments, valid, with their pictures opened; ``sizes`` are ``(width, height)`` in pixels."""

    args: Any
    methods: Sequence[Method | Callable[[Any], Method]]
    pictures: Sequence[Image.Image]
    sizes: Sequence[models.Size]


def read_request(args: Any) -> Request:
    """The parsed arguments as a `Request`.

    Raises:
        CommandError: an argument is not what it should be, or a picture cannot be opened.
    """
    check_names(args.method)
    if args.scale is not None and args.size is not None:
        raise CommandError(f"--scale {args.scale} and --size {args.size!r} exclude each other; give one of them.")
    check_numbers(args, {"steps": 1, "seed": 0, "guidance": 0, "scale": 0})
    ladder.check_ladder(args)
    scale = 2.0 if args.scale is None else args.scale
    size = None if args.size is None else parse_size(args.size)
    methods = build_methods(args.method, args)
    pictures = [files.open_picture(path) for path in args.image]
    return Request(args, methods, pictures, [size or _scaled(picture.size, scale) for picture in pictures])


def enlarge(pipe: Any, request: Request, **call: Any) -> Iterator[tuple[Path, dict[str, Any], Image.Image]]:
    """Enlarge and save picture by picture; gives each one's file, what is written beside it, and the picture.

    Args:
        pipe: a text-to-image pipeline.
        call: more arguments of the ladder's call.
    """
    import torch

    args, output = request.args, Path(request.args.output).expanduser()
    methods = [method if isinstance(method, Method) else method(pipe) for method in request.methods]
    hires = ladder.make_pipeline(pipe, methods, (), args.quiet)
    for index, (path, picture, size) in enumerate(zip(args.image, request.pictures, request.sizes, strict=True)):
        width, height = size
        settings = {
            "image": path,
            "prompt": args.prompt,
            **models.run_settings(pipe, args, size),
            "seed": args.seed,
            "ladder": args.ladder,
            "strength": args.strength,
            "refine": args.refine,
            "methods": [method.name for method in methods],
        }
        stem = f"{index:04d}-{files.slug(Path(path).stem)}-{width}x{height}"
        result = hires.upscale(
            picture,
            args.prompt,
            height=height,
            width=width,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            generator=torch.Generator().manual_seed(args.seed),
            **ladder.call_options(args, output / f"{stem}-stages"),
            **call,
        )
        record = {**settings, "file": f"{stem}.png", "stages": ladder.records_of(result)}
        record["oracle"] = oracle.consult(result.images[0], args.prompt)
        files.save_json(output / f"{stem}.json", record)
        files.save_png(output / f"{stem}.png", result.images[0], settings)
        yield output / f"{stem}.png", record, result.images[0]


def _scaled(size: models.Size, scale: float) -> models.Size:
    """A picture's size ``scale`` times as large a side, no larger than ``--size`` can say.

    Raises:
        CommandError: it is no size.
    """
    width, height = (round(side * scale) for side in size)
    if not (min(width, height) >= 1 and max(width, height) <= LARGEST_SIDE):
        raise CommandError(
            f"--scale {scale:g} makes {width}x{height} pixels of {size[0]}x{size[1]}; "
            f"give one that makes sides of 1 to {LARGEST_SIDE}."
        )
    return width, height
