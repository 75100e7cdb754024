"""The pages of docs/results, from the JSON files beside them alone.

    python -m benchmarks.report             # every page that there are numbers for
    python -m benchmarks.report clear bench # some of them

Run from the repository root.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import agent, clear, common, distill, editing, hidiffusion, high_resolution, linfusion, vimaedit
from diffusion_attn.bench.table import bench_table, notes

BENCHMARKS = {
    module.NAME: module
    for module in (agent, clear, distill, editing, hidiffusion, high_resolution, linfusion, vimaedit)
}
"""The modules with a page: each has its ``INTRODUCTION`` and ``SECTIONS``."""

BENCH = "bench"
"""The page of what ``diffusion-attn bench`` has measured: one section for each file."""

_BENCH_INTRODUCTION = """\
# Methods side by side

Written by `python -m benchmarks.report` from the JSON files beside this page, which `diffusion-attn bench` made; edit
neither by hand. How to read it: [bench](../bench.md).
"""
_SETTINGS = ("model", "batch", "dtype", "repeats")


def write_page(name: str, folder: Path = common.RESULTS) -> None:
    """Write ``FOLDER/NAME.md`` from the result files beside it.

    Raises:
        SystemExit: there is none, or one is damaged.
    """
    files = sorted(folder.glob(f"{name}-*.json"))
    if not files:
        raise SystemExit(f"there is nothing to report: no {name}-*.json in {folder.name}; run a benchmark first.")
    parts = _bench(files) if name == BENCH else _sections(BENCHMARKS[name], files)
    page = folder / f"{name}.md"
    try:
        text = "\n".join(parts)
    except Exception as error:  # tables fail in as many ways as their numbers can be wrong
        raise SystemExit(f"{name}: one of {len(files)} result files is damaged ({error!r}); make it again.") from error
    page.write_text(text)
    print(f"{page.name}: {len(files)} result files")


def _sections(benchmark: Any, files: list[Path]) -> Iterator[str]:
    yield benchmark.INTRODUCTION
    for key, section in benchmark.SECTIONS.items():
        kept = [part for file in files if (part := common.read_results(file).get(key))]
        if kept:
            yield f"## {section.title}\n\n{section.description}\n"
        for part in kept:
            yield _with_origin(section.table(part), part)


def _bench(files: list[Path]) -> Iterator[str]:
    yield _BENCH_INTRODUCTION
    for file in files:
        result = common.read_results(file)
        yield f"## {result['settings']['model']}\n\n" + "\n".join(f"- {note}" for note in notes(result)) + "\n"
        plot = file.with_suffix(".png")
        picture = f"\n\n![Time per step and peak memory over sizes, relative to plain]({plot.name})"
        yield _with_origin(bench_table(result) + (picture if plot.exists() else ""), result)


def _with_origin(table: str, part: dict[str, Any]) -> str:
    """A table with the commands that made it, and with what."""
    facts = "\n".join(f"- {title}: {text}" for title, text in _describe(part).items())
    commands = "\n".join(f"$ {command}" for command in part["commands"])
    return f"{table}\n\n```console\n{commands}\n```\n\n{facts}\n"


def _describe(part: dict[str, Any]) -> dict[str, str]:
    """What a table was made with: its settings and the machine, each on one line."""
    settings = part.get("settings") or {name: part[name] for name in _SETTINGS if name in part}
    facts = {"settings": settings, "machine": part["machine"]}
    return {
        title: ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items() if name != "prompts")
        for title, values in facts.items()
        if values
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join([*BENCHMARKS, BENCH])}; default: all")
    parser.add_argument("--folder", type=Path, default=common.RESULTS, help="where the JSON files are and pages go")
    args = parser.parse_args(argv)
    if unknown := set(args.pages) - {*BENCHMARKS, BENCH}:
        parser.error(f"there is no page {', '.join(sorted(unknown))}; there are: {', '.join([*BENCHMARKS, BENCH])}.")
    for name in args.pages or [name for name in (*BENCHMARKS, BENCH) if any(args.folder.glob(f"{name}-*.json"))]:
        write_page(name, args.folder)


if __name__ == "__main__":
    main()
