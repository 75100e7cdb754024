"""Files that somebody else may have written, read within bounds: text, JSON and YAML of limited size and depth."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

LARGEST_JSON = 2**26
"""Bytes of a JSON file unless a caller allows more."""

LARGEST_YAML = 2**18
"""Bytes of a YAML file, whose reader is slow."""

LARGEST_CAPTION = 2**20
"""Bytes of a caption, or of a line of captions."""

_LONGEST = 1000
"""Letters of what YAML may take for a number: of longer ones Python makes no text again."""

DEEPEST = 64
"""Levels of lists and objects within each other."""


def read_text(path: str | os.PathLike[str], largest: int) -> str:
    """The content of a UTF-8 file of ``largest`` bytes at most.

    Raises:
        ValueError: it is no UTF-8, or too large.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest} bytes, which is the most that is read")
    return content.decode("utf-8")


def read_lines(file: TextIO) -> Iterator[str]:
    """The lines of an open file, of `LARGEST_CAPTION` letters at most each.

    Raises:
        ValueError: one is longer, or no text.
    """
    for line in iter(lambda: file.readline(LARGEST_CAPTION), ""):
        if len(line) == LARGEST_CAPTION:
            raise ValueError(f"a line has {LARGEST_CAPTION} letters or more, too many for a caption")
        yield line


def read_json(path: str | os.PathLike[str], largest: int = LARGEST_JSON) -> Any:
    """The content of a JSON file of ``largest`` bytes at most.

    Raises:
        ValueError: it is no JSON, too large, or nested too deeply.
        OSError: it cannot be read.
    """
    return parse_json(read_text(path, largest))


def parse_json(text: str, unique: bool = False) -> Any:
    """What JSON says, of `DEEPEST` levels at most.

    Args:
        text: the JSON.
        unique: refuse objects that have a name twice, which readers may understand differently.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has halves of characters, which no file can be written with.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles if unique else None)
    except RecursionError as error:
        raise _too_deep() from error
    level = [content]
    for _ in range(DEEPEST):
        level = [x for each in level if isinstance(each, (dict, list)) for x in _inside(each)]
        if not level:
            if "\\ud" in text.lower():
                json.dumps(content, ensure_ascii=False).encode()
            return content
    raise _too_deep()


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file of `LARGEST_YAML` bytes and `DEEPEST` levels at most: plain data without aliases.

    Raises:
        ValueError: it is no YAML, too large, nested too deeply, or has aliases, of which a few lines stand for any
            amount of data.
        OSError: it cannot be read.
    """
    import yaml

    text, depth = read_text(path, LARGEST_YAML), 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _too_deep()
            if isinstance(event, yaml.ScalarEvent):
                event.value.encode()  # halves of characters are no text
                if event.implicit[0] and len(event.value) > _LONGEST:
                    line = event.start_mark.line + 1
                    raise ValueError(f"line {line} has a word of {len(event.value)} letters; quote it")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {event.start_mark.line + 1} has an alias, *{event.anchor}; write it out")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (AttributeError, TypeError, OverflowError) as error:  # made of dates, of keys and of numbers that are none
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it has {name!r} more than once")
        content[name] = value
    return content


def _inside(each: dict[str, Any] | list[Any]) -> Any:
    return each.values() if isinstance(each, dict) else each


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} levels deep")
