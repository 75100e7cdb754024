"""Draw training pictures with the teacher itself, into a folder for distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_attn.cli import models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.files import prepare_folder
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import (
    add_model_arguments,
    check_numbers,
    parse_size,
    pick_device,
    pick_dtype,
    read_prompts,
)
from diffusion_attn.distill.make_data import make_data


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn distill make-data``."""
    add = parser.add_argument
    add("--prompts", type=str, required=True, metavar="FILE", help="text file of prompts, one a line, used in turn")
    add("--count", type=int, required=True, help="pictures in the end, those already in the folder included")
    add("--output", type=str, required=True, metavar="DIR", help="folder of the pictures and captions")
    add_model_arguments(parser)
    add("--size", type=str, metavar="N|WxH", help="pixels; by default the native size")
    add("--steps", type=int, help="denoising steps; by default what the model recommends")
    add("--guidance", type=float, help="guidance scale, 1 is none; by default what the model recommends")
    add("--seed", type=int, default=0, help="picture i is drawn from seed + i")
    add("--batch", type=int, default=8, help="pictures drawn together")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Draw what the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, the model or the folder stands against it.
    """
    prompts = read_prompts(args.prompts)
    if not prompts:
        raise CommandError(f"--prompts {args.prompts!r} holds no prompt; give one a line.")
    check_numbers(args, {"count": 1, "steps": 1, "guidance": 0, "seed": 0, "batch": 1})
    size = None if args.size is None else parse_size(args.size)
    device = pick_device(args.device)
    models.check_model(args.model)
    output = Path(args.output).expanduser()
    prepare_folder(output)
    with silence(args.quiet):
        pipe = models.load_model(args.model, pick_dtype(args.dtype, device), device)
        size = size or models.native_size(pipe)
        models.check_size(pipe, size)
        pipe.set_progress_bar_config(disable=True)
        models.show_everything(pipe)
        make_data(
            pipe,
            prompts,
            args.count,
            output,
            size,
            args.steps or models.default_steps(pipe, args.model),
            models.guidance_of(pipe, args.model, args.guidance),
            args.seed,
            args.batch,
            args.quiet,
        )
    if not args.quiet:
        print(output)
    return 0
