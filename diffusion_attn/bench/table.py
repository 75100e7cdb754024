"""Tables that read well in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that also reads well in a terminal; the first ``left`` columns are aligned to the left."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    marks = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        """One row, padded."""
        sides = ["<"] * left + [">"] * (len(cells) - left)
        return "| " + " | ".join(map("{:{}{}}".format, cells, sides, widths)) + " |"

    return "\n".join([line(head), line(marks), *map(line, rows)])


def bench_table(result: Mapping[str, Any]) -> str:
    """The rows of `run_bench`, one line for each size and method."""
    lines = []
    for row in result["rows"]:
        numbers = [
            f"{row['seconds_per_step'] * 1e3:.1f}",
            f"{row['relative_time']:.2f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
            _or_dash(row["relative_peak"], "{:.2f}"),
            _or_dash(row["flops_per_step"] and row["flops_per_step"] / 1e9, "{:.2f}"),
        ]
        if result["settings"]["quality"]:
            numbers += [_or_dash(row["exact"], "{:.0%}"), _or_dash(row["psnr"], "{:.1f}")]
        lines.append(["x".join(map(str, row["size"])), row["method"], *numbers])
    head = ["size", "method", "ms per step", "to plain", "peak MiB", "to plain", "GFLOP per step"]
    head += ["exact", "PSNR, dB"] if result["settings"]["quality"] else []
    return table(head, lines, left=2)


def notes(result: Mapping[str, Any]) -> list[str]:
    """What has to be said of a table, in lines: which clock was read, options that are not default, what has no row."""
    clocks = {
        "thread": "Seconds count while the one thread that computes ran, whatever else the machine did.",
        "wall": "Seconds are of the wall clock.",
    }
    given = [
        f"{name}: {', '.join(f'{option} {value}' for option, value in options.items())}"
        for name, options in result["settings"].get("options", {}).items()
    ]
    return [
        clocks[result["settings"]["clock"]],
        *given,
        *(f"{name}: {text}" for name, text in result["skipped"].items()),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
