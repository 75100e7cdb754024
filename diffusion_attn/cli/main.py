"""The command ``diffusion-attn``: its subcommands, and how errors end it."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from jsonargparse import ArgumentParser

from diffusion_attn.cli import (
    attention_map,
    bench,
    cache,
    distill,
    edit,
    evaluate,
    evaluate_pie_bench,
    generate,
    info,
    make_data,
    plan,
    ui,
    upscale,
)
from diffusion_attn.cli.errors import CommandError, sentence
from diffusion_attn.version import __version__

PROGRAM = "diffusion-attn"
COMMANDS = {
    "generate": generate,
    "upscale": upscale,
    "attention-map": attention_map,
    "edit": edit,
    "distill": distill,
    "distill-make-data": make_data,
    "distill-cache": cache,
    "evaluate": evaluate,
    "evaluate-pie-bench": evaluate_pie_bench,
    "ui": ui,
    "bench": bench,
    "plan": plan,
    "info": info,
}
"""The subcommands: modules with ``add_arguments(parser)`` and ``run(args) -> exit code``."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's own) and return the exit code.

    0: done; 2: an error, told in one sentence on stderr; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except SystemExit as end:  # --help, --version
        return int(end.code or 0)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; finished files are kept.", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {sentence(error)}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    parser, args = parse(argv)
    if args.subcommand is None:
        parser.print_help()
        return 2
    return COMMANDS[args.subcommand].run(args[args.subcommand])


def parse(argv: list[str]) -> tuple[ArgumentParser, Any]:
    """The parser, and what it reads in ``argv``: ``subcommand``, and under its name the subcommand's arguments."""
    for argument in argv:
        if not argument.isascii() and argument != argument.encode(errors="replace").decode():
            raise CommandError(f"the argument {argument!r} is not UTF-8 text; give it as such.")
    parser = _parser(PROGRAM, "Attention methods for diffusers pipelines.", version=__version__)
    commands = parser.add_subcommands(required=False, title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        description = (command.__doc__ or "").strip()
        subparser = _parser(f"{PROGRAM} {name}", description)
        command.add_arguments(subparser)
        commands.add_subcommand(name, subparser, help=description.rstrip("."))
    if "-".join(argv[:2]) in COMMANDS:  # two words as one: where the second one stands, there may be a recipe
        argv = ["-".join(argv[:2]), *argv[2:]]
    return parser, parser.parse_args(argv)


def _parser(prog: str, description: str, **kwargs: Any) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False, **kwargs)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
