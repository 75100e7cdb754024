"""The methods of the registry on the command line: ``--method NAME`` and a flag for each option of each method."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from diffusion_attn.cli.errors import CommandError
from diffusion_attn.core.method import Method
from diffusion_attn.methods import METHODS

NO_WEIGHTS = "none"
"""What ``--weights`` says for a method without weights of its own."""


def add_methods(parser: Any) -> None:
    """Add ``--method`` and what `add_method_options` adds."""
    parser.add_argument(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"methods to enable: {', '.join(METHODS)}; none: the plain model",
    )
    add_method_options(parser)


def add_method_options(parser: Any, option: str = "--method") -> None:
    """Add ``--weights`` and, in a group for each method, ``--NAME.OPTION`` for each field of its dataclass.

    Options stay out of the parsed arguments unless they are given, so that a method's own defaults hold.

    Args:
        option: what methods are named by.
    """
    parser.add_argument(
        "--weights",
        type=str,
        metavar="ID_OR_FOLDER",
        help=f"weights of {' or '.join(with_weights(METHODS))}: a local folder, a Hub id, or {NO_WEIGHTS!r} for the "
        "model's own, which serve clear; by default the published ones that belong to the model",
    )
    for name, method in METHODS.items():
        docs = {name: text for base in reversed(method.__mro__) for name, text in read_docstring(base)[1].items()}
        group = parser.add_argument_group(f"options of {option} {name}", describe(method))
        hints = typing.get_type_hints(method)
        for field in dataclasses.fields(method):
            kind = command_line_type(hints[field.name])
            if kind is None or not field.metadata.get("option", True):
                continue
            text = f"{docs.get(field.name, '')} Default: {_show(field.default)}".strip()
            group.add_argument(f"--{name}.{field.name}", type=kind, default=argparse.SUPPRESS, help=text)


def check_names(names: list[str], option: str = "--method") -> None:
    """Make sure that ``names``, given as ``option``, are methods, each once.

    Raises:
        CommandError: they are not.
    """
    for name in names:
        if name not in METHODS:
            hint = f"; prompts come before {option}" if " " in name else ""
            raise CommandError(f"{option} {name!r} is not a method; there are: {', '.join(METHODS)}{hint}.")
        if names.count(name) > 1:
            raise CommandError(f"{option} {name!r} is given {names.count(name)} times; give it once.")


def given_options(args: Any) -> dict[str, dict[str, Any]]:
    """The options of methods that are in ``args``, the parsed arguments, by the methods' names."""
    return {name: vars(args[name]) for name in METHODS if name in args}


def typed(value: Any) -> str:
    """The value of an option as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def build_methods(names: list[str], args: Any, option: str = "--method") -> list[Method | Callable[[Any], Method]]:
    """The methods of ``names``, given as ``option``, with the options in ``args``, the parsed arguments.

    A method with weights and no ``--weights`` is left to be made from the pipeline, once that is loaded.

    Raises:
        CommandError: options or weights belong to a method that is not asked for, or the method refuses its options.
        DiffusionAttnError: the weights cannot be loaded.
    """
    given = given_options(args)
    for name, options in given.items():
        if name not in names:
            raise CommandError(
                f"--{name}.{next(iter(options))} belongs to a method that is not enabled; add {option} {name}, or "
                "leave the option out."
            )
    if args.weights is not None and len(with_weights(names)) != 1:
        raise CommandError(
            f"--weights {args.weights!r} belongs to one method that has weights; give exactly one of "
            f"{option} {', '.join(with_weights(METHODS))}, or leave it out."
        )
    try:
        return [_build(METHODS[name], given.get(name, {}), args.weights) for name in names]
    except (TypeError, ValueError) as error:
        raise CommandError(f"options of {option} {' '.join(names)}: {error}") from error


def _build(method: Any, options: dict[str, Any], weights: str | None) -> Method | Callable[[Any], Method]:
    if not with_weights([method.name]):
        return method(**options)
    if weights == NO_WEIGHTS:
        return method(**options)
    if weights is None:
        return functools.partial(method.for_pipeline, **options)
    return method.from_pretrained(weights, **options)


def with_weights(names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose methods have weights to load."""
    return [name for name in names if hasattr(METHODS[name], "from_pretrained")]


def describe(method: type) -> str:
    """What a method is, in the first paragraph of its file."""
    return read_docstring(sys.modules[method.__module__])[0]


def command_line_type(hint: Any) -> Any:
    """The part of a type that can be written on a command line, ``None`` if there is none.

    Callables cannot. In a union ``str`` comes last: it takes everything, and jsonargparse takes the first that fits.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [
        kind
        for kind in (typing.get_args(hint) if union else (hint,))
        if Callable not in (kind, typing.get_origin(kind))
    ]
    if not set(kinds) - {type(None)}:
        return None
    return functools.reduce(operator.or_, sorted(kinds, key=lambda kind: kind is str))


def read_docstring(documented: Any) -> tuple[str, dict[str, str]]:
    """The first paragraph of a Google-style docstring, and what its ``Args`` say of each argument."""
    text = inspect.getdoc(documented) or ""
    summary = text.split("\n\n")[0]
    docs: dict[str, str] = {}
    names: list[str] = []
    _, _, body = text.partition("Args:\n")
    for line in body.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            docs.update(dict.fromkeys(names, _plain(entry[2])))
        elif line.strip():
            docs.update({name: f"{docs[name]} {_plain(line)}" for name in names})
    return " ".join(_plain(summary).split()), docs


def _plain(text: str) -> str:
    return text.strip().replace("`", "")


def _show(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "none, it must be given."
    return f"{default if isinstance(default, str) else json.dumps(default)}."
