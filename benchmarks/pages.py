"""What a benchmark keeps of a run, and how a page tells it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from diffusion_attn.metrics.machine import changed


@dataclass(frozen=True)
class Section:
    """A part of a page: its title, what its numbers mean, and how its table is made of what was kept."""

    title: str
    description: str
    table: Callable[[dict[str, Any]], str]


def origin(args: argparse.Namespace) -> dict[str, Any]:
    """Where a section comes from: the command lines (more than one where it was resumed) and the machine."""
    return {
        "commands": [common.command_line(f"benchmarks.{args.benchmark}", args.argv)],
        "machine": common.machine(getattr(args, "device", "cpu")),
    }


def resume(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """A subcommand's section with what earlier runs kept in it, or a new one; it is in the file then.

    Raises:
        SystemExit: there are rows, and they were made with other settings.
    """
    here = origin(args)
    before = {} if args.restart else common.read_results(args.output).get(args.name, {})
    if before:
        others = changed({**here, "settings": settings}, before)
        if others:
            raise SystemExit(
                f"{args.output.name} holds rows made with another {', '.join(others)}; give the same settings to go "
                "on, another --output, or --restart to drop those rows."
            )
    section = {**here, "settings": settings, "rows": [], **before}
    common.write_section(args.output, args.name, section)
    return section


def keep(
    args: argparse.Namespace, rows: list[dict[str, Any]], order: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Add rows to a section that was resumed, in ``order``; other runs may have added theirs in the meantime."""
    section = common.read_results(args.output)[args.name]
    section["rows"] = sorted([*section["rows"], *rows], key=order)
    section["commands"] = list(dict.fromkeys([*section["commands"], *origin(args)["commands"]]))
    common.write_section(args.output, args.name, section)
    return section


def shared_arguments() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Parent parsers: of what runs on a device, and of what keeps its numbers."""
    on_device = argparse.ArgumentParser(add_help=False)
    on_device.add_argument("--device", default="cpu")
    on_device.add_argument("--dtype", choices=common.DTYPES, default="float32")
    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--output", type=Path, help="JSON file; by default in docs/results, named by device and dtype")
    return on_device, kept


def finish(args: argparse.Namespace, benchmark: str, argv: list[str]) -> argparse.Namespace:
    """The parsed arguments with what every benchmark needs to know of itself."""
    args.benchmark, args.argv = benchmark, argv
    if getattr(args, "output", "") is None:
        chosen = {name: getattr(args, name) for name in ("device", "dtype") if name in args}
        args.output = common.default_output(benchmark, **chosen)
    return args


def run(
    args: argparse.Namespace,
    sections: Mapping[str, Section],
    commands: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]],
) -> None:
    """Run one subcommand, print its table and keep its section."""
    section = commands[args.name](args)
    common.write_section(args.output, args.name, section)
    print(sections[args.name].table(section))
