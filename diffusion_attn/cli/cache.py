"""Encode training pictures and captions once, so that distillation needs no encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_attn.cli.distill import add_section, given
from diffusion_attn.cli.files import prepare_folder
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import DTYPES, check_numbers, pick_device
from diffusion_attn.distill.cache import make_cache
from diffusion_attn.distill.config import DataConfig
from diffusion_attn.distill.teacher import load_teacher


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn distill cache``."""
    parser.usage = "diffusion-attn distill cache --data FOLDER --output FOLDER [--model ID_OR_FOLDER] [options]"
    add = parser.add_argument
    add("--output", type=str, required=True, metavar="DIR", help="folder of the cache")
    add("--model", type=str, default="shapes-sd", metavar="ID_OR_FOLDER", help="the teacher whose encoders are used")
    add("--count", type=int, help="pictures, from the first; by default all; drawn scenes need a number")
    add("--dtype", choices=list(DTYPES), default="float16", help="of what is kept")
    add("--device", type=str, help="for example cpu, cuda, cuda:1, mps; by default the best there is")
    add("--batch", type=int, default=8, help="pictures encoded together")
    add("--seed", type=int, default=0, help="of drawn scenes")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")
    add_section(parser, "data", DataConfig, without=("caption_dropout", "workers"))


def run(args: Any) -> int:
    """Encode what the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, the pictures, the model or the folder stands against it.
    """
    check_numbers(args, {"count": 1, "batch": 1, "seed": 0})
    config = DataConfig(**given(args, "data", DataConfig))
    device = pick_device(args.device)
    output = Path(args.output).expanduser()
    prepare_folder(output)
    with silence(args.quiet):
        pipe = load_teacher(args.model).to(device)
        index = make_cache(pipe, config, output, args.count, DTYPES[args.dtype], args.batch, args.seed, args.quiet)
    if not args.quiet:
        for name, reason in index.broken:
            print(f"{name} cannot be read and is left out: {reason}")
        print(output)
    return 0
