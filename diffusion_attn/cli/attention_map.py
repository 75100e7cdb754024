"""Draw a picture and show what each word of its prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from diffusion_attn.cli import files, models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import add_model_arguments, check_numbers, parse_size, pick_device, pick_dtype
from diffusion_attn.core.calls import call_arguments

if TYPE_CHECKING:
    from diffusion_attn.editing.maps import AttentionMaps


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn attention-map``."""
    add = parser.add_argument
    add("prompt", type=str, help="what to draw")
    add("--words", nargs="+", type=str, metavar="WORD", help="of the prompt; by default all")
    add("--output", type=str, default="outputs", metavar="DIR", help="folder of the pictures")
    add_model_arguments(parser)
    add("--size", type=str, metavar="N|WxH", help="pixels; by default the native size")
    add("--steps", type=int, help="denoising steps; by default what the model recommends")
    add("--guidance", type=float, help="guidance scale, 1 is none; by default what the model recommends")
    add("--seed", type=int, default=0, help="of the noise")
    add("--finest", type=int, default=1, help="leave out maps less than this many times smaller than the latent")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Draw and record what the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, the model or the folder stands against it.
    """
    request = read_request(args)
    device = pick_device(args.device)
    models.check_model(args.model)
    output = Path(args.output).expanduser()
    files.prepare_folder(output)
    with silence(args.quiet):
        pipe = models.load_model(args.model, pick_dtype(args.dtype, device), device)
        pipe.set_progress_bar_config(disable=args.quiet)
        settings = prepare(pipe, request)
        image, maps = draw(pipe, request, settings)
    name = f"{files.slug(args.prompt)}-seed{args.seed}"
    grid = output / f"{name}-maps.png"
    files.save_png(output / f"{name}.png", image, settings)
    for word in request.words:
        heatmap = maps.heatmap(word, size=(max(image.height, 256), max(image.width, 256)))
        files.save_png(output / f"{name}-{files.slug(word)}.png", heatmap, {**settings, "word": word})
    files.save_png(grid, maps.grid(request.words, over=image), settings)
    if not args.quiet:
        print(grid)
    return 0


@dataclass(frozen=True)
class Request:
    """The parsed arguments, valid; ``size`` is ``(width, height)`` in pixels, ``None``: the model's own."""

    args: Any
    words: list[str]
    size: models.Size | None


def read_request(args: Any) -> Request:
    """The parsed arguments as a `Request`.

    Raises:
        CommandError: an argument is not what it should be.
    """
    if not args.prompt.strip():
        raise CommandError(f"the prompt is {args.prompt!r}; give one with words to look at.")
    words = args.words or list(dict.fromkeys(args.prompt.split()))
    for word in words:
        if word not in args.prompt.split(" "):
            raise CommandError(
                f"--words {word!r} is not a word of the prompt {args.prompt!r}; give words as they stand."
            )
    check_numbers(args, {"steps": 1, "guidance": 0, "seed": 0, "finest": 1})
    return Request(args, words, None if args.size is None else parse_size(args.size))


def prepare(pipe: Any, request: Request) -> dict[str, Any]:
    """What is written beside the pictures of a request with its model, ``pipe``.

    Raises:
        CommandError: the size does not suit the model.
    """
    args = request.args
    size = request.size or models.native_size(pipe)
    models.check_size(pipe, size)
    return {
        "prompt": args.prompt,
        **models.run_settings(pipe, args, size),
        "seed": args.seed,
        "finest": args.finest,
    }


def draw(
    pipe: Any, request: Request, settings: dict[str, Any], levels: bool = False, **call: Any
) -> tuple[Image.Image, AttentionMaps]:
    """The picture, and the maps of its words.

    Args:
        settings: from `prepare`.
        levels: keep those of single levels too.
        call: more arguments of the pipeline.
    """
    from diffusion_attn.editing.capture import record  # loads diffusers

    width, height = settings["size"]
    with record(pipe, request.words, finest=settings["finest"], levels=levels) as maps:
        [image] = pipe(
            **call_arguments(pipe, [settings["prompt"]], settings["guidance"]),
            width=width,
            height=height,
            num_inference_steps=settings["steps"],
            generator=torch.Generator().manual_seed(settings["seed"]),
            **call,
        ).images
    return image, maps
