"""Draw a picture and show what each word of its prompt attends to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion_attn.cli import files, models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import add_model_arguments, check_numbers, parse_size, pick_device, pick_dtype
from diffusion_attn.core.calls import call_arguments


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
    if not args.prompt.strip():
        raise CommandError(f"the prompt is {args.prompt!r}; give one with words to look at.")
    words = args.words or list(dict.fromkeys(args.prompt.split()))
    for word in words:
        if word not in args.prompt.split(" "):
            raise CommandError(
                f"--words {word!r} is not a word of the prompt {args.prompt!r}; give words as they stand."
            )
    check_numbers(args, {"steps": 1, "guidance": 0, "seed": 0, "finest": 1})
    size = None if args.size is None else parse_size(args.size)
    device = pick_device(args.device)
    models.check_model(args.model)
    output = Path(args.output).expanduser()
    files.prepare_folder(output)
    with silence(args.quiet):
        from diffusion_attn.editing.capture import record  # loads diffusers, which has things to say

        pipe = models.load_model(args.model, pick_dtype(args.dtype, device), device)
        width, height = size or models.native_size(pipe)
        models.check_size(pipe, (width, height))
        pipe.set_progress_bar_config(disable=args.quiet)
        settings = {
            "prompt": args.prompt,
            **models.run_settings(pipe, args, (width, height)),
            "seed": args.seed,
            "finest": args.finest,
        }
        with record(pipe, words, finest=args.finest) as maps:
            [image] = pipe(
                **call_arguments(pipe, [args.prompt], settings["guidance"]),
                width=width,
                height=height,
                num_inference_steps=settings["steps"],
                generator=torch.Generator().manual_seed(args.seed),
            ).images
    name = f"{files.slug(args.prompt)}-seed{args.seed}"
    grid = output / f"{name}-maps.png"
    files.save_png(output / f"{name}.png", image, settings)
    for word in words:
        heatmap = maps.heatmap(word, size=(max(height, 256), max(width, 256)))
        files.save_png(output / f"{name}-{files.slug(word)}.png", heatmap, {**settings, "word": word})
    files.save_png(grid, maps.grid(words, over=image), settings)
    if not args.quiet:
        print(grid)
    return 0
