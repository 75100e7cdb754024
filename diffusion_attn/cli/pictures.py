"""The picture of a comparison: columns of pictures with words above and below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SHORTEST, _LONGEST = 256, 512  # pixels of a cell's longer side: legible labels below, a grid that opens anywhere
_MARGIN = 16
_FONT_SIZE = 16
_LINE = 22
_MOST_LINES = 3
_BACKGROUND, _TEXT, _FAINT = "white", "#202020", "#606060"


@dataclass(frozen=True)
class Cell:
    """A picture, fitted by `fit_cell`, and the lines of text under it."""

    image: Image.Image
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A heading and one cell for each column."""

    heading: str
    cells: tuple[Cell, ...]


def fit_cell(image: Image.Image) -> Image.Image:
    """A picture as it goes into the grid: small ones enlarged by whole factors, pixel by pixel, large ones reduced."""
    longer = max(image.size)
    if longer > _LONGEST:
        width, height = (max(1, round(side * _LONGEST / longer)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = math.ceil(_SHORTEST / longer)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def labelled_grid(columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """All ``rows`` below each other, under the names of the ``columns``."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    cell_width = max(cell.image.width for row in rows for cell in row.cells)
    cell_height = max(cell.image.height for row in rows for cell in row.cells)
    width = _MARGIN + len(columns) * (cell_width + _MARGIN)
    headings = [wrap(row.heading, font, width - 2 * _MARGIN) for row in rows]
    labels = [
        [[part for line in cell.lines for part in wrap(line, font, cell_width)] for cell in row.cells] for row in rows
    ]
    titles = [wrap(name, font, cell_width) for name in columns]

    def lines_below(row: list[list[str]]) -> int:
        return max(map(len, row)) * _LINE

    heights = [
        len(heading) * _LINE + cell_height + lines_below(row) + _MARGIN
        for heading, row in zip(headings, labels, strict=True)
    ]
    top = lines_below(titles) + 2 * _MARGIN
    grid = Image.new("RGB", (width, top + sum(heights)), _BACKGROUND)
    draw = ImageDraw.Draw(grid)

    def write(lines: list[str], x: int, y: int, color: str) -> int:
        for line in lines:
            draw.text((x, y), line, fill=color, font=font)
            y += _LINE
        return y

    places = [_MARGIN + index * (cell_width + _MARGIN) for index in range(len(columns))]
    for x, title in zip(places, titles, strict=True):
        write(title, x, _MARGIN, _TEXT)
    for row, heading, texts, height in zip(rows, headings, labels, heights, strict=True):
        y = write(heading, _MARGIN, top, _FAINT)
        for x, cell, lines in zip(places, row.cells, texts, strict=True):
            grid.paste(cell.image.convert("RGB"), (x, y))
            write(lines, x, y + cell_height + 2, _TEXT)
        top += height
    return grid


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break ``text`` into lines of ``width`` pixels, three at most; what is left over becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    kept = lines[:_MOST_LINES]
    if len(lines) > _MOST_LINES:
        kept[-1] += "..."
    return [_cut(line, font, width) for line in kept]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.removesuffix("...") + "..."
