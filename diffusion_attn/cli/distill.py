"""Distil the weights of a method from a teacher, as a recipe says."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState

from diffusion_attn.cli.method_options import read_docstring
from diffusion_attn.cli.quiet import silence
from diffusion_attn.distill import DistillConfig, Distiller

SHORT = {"data.path": "--data", "run.output": "--output"}
"""Settings that go by a shorter name."""


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn distill``: the recipe, and an option for each of its settings."""
    parser.usage = "diffusion-attn distill RECIPE [--data FOLDER] [--output FOLDER] [--resume] [--SECTION.NAME VALUE]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe of the package")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--quiet", action="store_true", help="show nothing but the error, if there is one")
    for section, kind in typing.get_type_hints(DistillConfig).items():
        add_section(parser, section, kind, without=("resume",))


def run(args: Any) -> int:
    """Distil as the parsed ``args`` say and return the exit code.

    Raises:
        DiffusionAttnError: the recipe, the data or the model stands against it.
    """
    sections = typing.get_type_hints(DistillConfig)
    overrides = {section: given(args, section, kind) for section, kind in sections.items()}
    if args.resume:
        overrides["run"]["resume"] = True
    with silence(args.quiet):
        distiller = Distiller(DistillConfig.load(args.recipe, overrides), args.quiet)
        distiller.train()
    if not args.quiet and PartialState().is_main_process:
        print(distiller.output)
    return 0


def add_section(parser: Any, section: str, kind: Any, without: Sequence[str] = ()) -> None:
    """Add an option for each field of ``kind``, a dataclass, but those of ``without``."""
    summary, docs = read_docstring(kind)
    group = parser.add_argument_group(section, summary)
    hints = typing.get_type_hints(kind)
    for option in dataclasses.fields(kind):
        if option.name not in without:
            key = f"{section}.{option.name}"
            # One flat name each: as nested names, --data would swallow --data.size.
            group.add_argument(
                SHORT.get(key, f"--{key}"),
                dest=_flat(section, option.name),
                type=hints[option.name],
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=docs[option.name],
            )


def given(args: Any, section: str, kind: Any) -> dict[str, Any]:
    """The fields of ``kind`` for which ``args`` have a value from the command line."""
    values = {option.name: vars(args).get(_flat(section, option.name), _ABSENT) for option in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not _ABSENT}


_ABSENT = object()


def _flat(section: str, name: str) -> str:
    return f"{section}__{name}"
