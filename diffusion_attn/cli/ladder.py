"""The ladder to large pictures on the command line: its options, and the pipeline that they come to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_attn.cli.errors import CommandError

PRESETS = ("auto", "linfusion", "clear", "demofusion")


def add_ladder_arguments(parser: Any, default: str | None = None) -> None:
    """Add the options of the stages above the native size; without ``default`` a picture is drawn at once."""
    add = parser.add_argument
    drawn = f"by default {default}" if default else "by default the picture is drawn at once"
    add("--ladder", choices=PRESETS, default=default, help=f"how a picture grows from the native size; {drawn}")
    add("--strength", type=float, help="share of the steps of larger stages; by default as the ladder says")
    add("--refine", choices=("demofusion",), help="draw larger stages of SDXL by DemoFusion's loop")
    add("--memory", choices=("low",), help="low: row by row, in chunks, and the autoencoder in tiles; the same picture")
    add("--vae-tile", type=int, metavar="N", help="pixels of a tile of the autoencoder")
    add("--resume", action="store_true", help="go on after the stages that are finished in the output folder")


def check_ladder(args: Any) -> None:
    """Refuse options that have no ladder, or that cannot be.

    Raises:
        CommandError: names one.
    """
    if args.vae_tile is not None and args.vae_tile < 1:
        raise CommandError(f"--vae-tile {args.vae_tile}: expected pixels, 1 or more.")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise CommandError(f"--strength {args.strength}: expected a share of the steps, above 0 and up to 1.")
    for name in ("strength", "refine", "memory", "vae_tile", "resume"):
        if args[name] and args.ladder is None:
            hint = " (for a picture drawn at once: --method low_memory)" if name == "memory" else ""
            raise CommandError(f"--{name.replace('_', '-')} belongs to a ladder; add --ladder auto{hint}.")


def make_pipeline(pipe: Any, methods: Any, base_methods: Any, quiet: bool, below: int = 0) -> Any:
    """The `HighResolutionPipeline` of a stock pipeline, its bars ``below`` so many others.

    Raises:
        DiffusionAttnError: the model has no image-to-image sibling, or a method does not serve it.
    """
    from diffusion_attn.pipelines import HighResolutionPipeline

    made = HighResolutionPipeline.from_pipe(pipe, methods, base_methods)
    made.set_progress_bar_config(disable=quiet, leave=False, position=below)
    for stage in (made.text2image, made.image2image):
        stage.set_progress_bar_config(disable=quiet, leave=False, position=below + 1)
    return made


def call_options(args: Any, folder: Path, base_scale: float = 1.0) -> dict[str, Any]:
    """The arguments of a run that the options come to; its stages are kept in ``folder``."""
    from diffusion_attn.pipelines import Ladder

    ladder = Ladder.PRESETS["demofusion" if args.refine and args.ladder == "auto" else args.ladder]
    if args.strength is not None:
        ladder = replace(ladder, strength=args.strength, fall=0.0, least=0.0)
    return {
        "ladder": replace(ladder, base_scale=base_scale),
        "refine": args.refine,
        "memory": args.memory,
        "vae_tile": args.vae_tile,
        "output_dir": folder,
        "resume": args.resume,
    }


def records_of(result: Any) -> list[dict[str, Any]]:
    """The stages of a run, as they are written beside a picture, whose folder has their files."""
    return [
        {
            "size": [done.stage.width, done.stage.height],
            "strength": done.stage.strength,
            "methods": done.methods,
            "seconds": done.seconds,
            "peak_memory_bytes": done.peak_memory_bytes,
            "files": ["/".join(path.parts[-2:]) for path in done.files],
        }
        for done in result.stages
    ]
