"""The outcome of a comparison: every picture in every variant, as a grid, as JSON and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diffusion_attn.cli.oracle import in_words
from diffusion_attn.cli.pictures import Cell, Row, fit_cell, labelled_grid

_MB = 1e6


@dataclass
class Comparison:
    """Pictures drawn in each of the ``variants``, collected one row at a time.

    Attributes:
        variants: the names of the columns, ``"plain"`` and the methods'.
        records: what is known of each picture, by variant, in the order of drawing.
    """

    variants: tuple[str, ...]
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _rows: list[Row] = field(default_factory=list)

    def add(self, pictures: list[tuple[Image.Image, dict[str, Any]]]) -> None:
        """Add one picture in all variants, each with its record."""
        for name, (_, record) in zip(self.variants, pictures, strict=True):
            self.records.setdefault(name, []).append(record)
        first = pictures[0][1]
        cells = tuple(Cell(fit_cell(image), _label(record)) for image, record in pictures)
        self._rows.append(Row(f"{first['prompt']} (seed {first['seed']})", cells))

    def grid(self) -> Image.Image:
        """The pictures side by side, with what each cost and what the oracle read in it."""
        return labelled_grid(self.variants, self._rows)

    def as_dict(self) -> dict[str, Any]:
        """Summary and records of each variant, ready for JSON."""
        return {
            "variants": {
                name: {"summary": summary(records), "pictures": records} for name, records in self.records.items()
            }
        }

    def table(self) -> str:
        """The summaries as lines of text."""
        rows = [["", "seconds", "peak MB", "exact", "shapes", "asked"]]
        for name, records in self.records.items():
            numbers = summary(records)
            row = [name, f"{numbers['seconds']:.2f}", f"{numbers['peak_memory_bytes'] / _MB:.0f}"]
            if judged := numbers["judged"]:
                row += [f"{numbers['exact']} of {judged}", str(numbers["shapes"]), str(numbers["asked"])]
            rows.append(row)
        return _align([row[: len(rows[1])] for row in rows])


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean ``seconds``, largest ``peak_memory_bytes``, and over the ``judged`` pictures the number of ``exact`` ones
    and of ``shapes`` read and ``asked`` for.
    """
    judgements = [record["oracle"]["judgement"] for record in records if record["oracle"]]
    return {
        "pictures": len(records),
        "seconds": round(sum(record["seconds"] for record in records) / len(records), 4),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "judged": len(judgements),
        "exact": sum(judgement["exact"] for judgement in judgements),
        "shapes": sum(judgement["read"] for judgement in judgements),
        "asked": sum(judgement["asked"] for judgement in judgements),
    }


def _label(record: dict[str, Any]) -> tuple[str, ...]:
    cost = f"{record['seconds']:.2f} s, {record['peak_memory_bytes'] / _MB:.0f} MB"
    return (cost, in_words(record["oracle"]["judgement"])) if record["oracle"] else (cost,)


def _align(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])] for name, *numbers in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
