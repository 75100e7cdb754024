"""Pages of results: what a benchmark keeps of a run, and the Markdown that is made of it."""

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


def write_page(name: str, introduction: str, sections: Mapping[str, Section], folder: Path) -> None:
    """Write ``FOLDER/NAME.md`` from the result files beside it alone.

    Raises:
        SystemExit: there is none.
    """
    files = sorted(folder.glob(f"{name}-*.json"))
    if not files:
        raise SystemExit(f"there is nothing to report: no {name}-*.json in {folder.name}; run a benchmark first.")
    parts = [introduction]
    for key, section in sections.items():
        kept = [part for file in files if (part := common.read_results(file).get(key))]
        if kept:
            parts.append(f"## {section.title}\n\n{section.description}\n")
        for part in kept:
            facts = "\n".join(f"- {title}: {text}" for title, text in describe(part).items())
            commands = "\n".join(f"$ {command}" for command in part["commands"])
            parts.append(f"{section.table(part)}\n\n```console\n{commands}\n```\n\n{facts}\n")
    page = folder / f"{name}.md"
    page.write_text("\n".join(parts))
    print(f"{page.name}: {len(files)} result files")


_SETTINGS = ("model", "batch", "dtype", "repeats")


def describe(part: dict[str, Any]) -> dict[str, str]:
    """What a table was made with: its settings and the machine, each on one line."""
    settings = part.get("settings") or {name: part[name] for name in _SETTINGS if name in part}
    facts = {"settings": settings, "machine": part["machine"]}
    return {
        title: ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        for title, values in facts.items()
        if values
    }


def shared_arguments() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Parent parsers: of what runs on a device, and of what keeps its numbers."""
    on_device = argparse.ArgumentParser(add_help=False)
    on_device.add_argument("--device", default="cpu")
    on_device.add_argument("--dtype", choices=common.DTYPES, default="float32")
    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--output", type=Path, help="JSON file; by default in docs/results, named by device and dtype")
    return on_device, kept


def add_report(commands: Any) -> None:
    """Add the subcommand that writes the page."""
    add = commands.add_parser("report", help="the page from the committed numbers").add_argument
    add("--folder", type=Path, default=common.RESULTS, help="where the JSON files are and the page goes")


def finish(args: argparse.Namespace, benchmark: str, argv: list[str]) -> argparse.Namespace:
    """The parsed arguments with what every benchmark needs to know of itself."""
    args.benchmark, args.argv = benchmark, argv
    if getattr(args, "output", "") is None:
        chosen = {name: getattr(args, name) for name in ("device", "dtype") if name in args}
        args.output = common.default_output(benchmark, **chosen)
    return args


def run(
    args: argparse.Namespace,
    introduction: str,
    sections: Mapping[str, Section],
    commands: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]],
) -> None:
    """Run one subcommand: print its table and keep its section, or write the page."""
    if args.name == "report":
        return write_page(args.benchmark, introduction, sections, args.folder)
    section = commands[args.name](args)
    common.write_section(args.output, args.name, section)
    print(sections[args.name].table(section))
