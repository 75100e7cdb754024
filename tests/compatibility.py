"""docs/compatibility.md, read off the matrix of tests: ``python -m tests.compatibility`` writes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

import diffusion_attn as da
from diffusion_attn.methods import METHODS
from tests import test_matrix, tiny

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
LAYOUTS = ("SD", "SDXL", "FLUX", "SD3")
MODELS = dict(zip((tiny.sd, tiny.sdxl, tiny.flux, tiny.sd3), LAYOUTS, strict=True))
MODELS |= {test_matrix.SHORT: "SD", test_matrix.SHORT_XL: "SDXL", test_matrix.COMPACT: "SDXL"}
UNSAID = ("name", "make", "run")
"""Arguments of tests that are columns and cells of the table, or follow from others."""
SPELT = {"lora on ": "", "AutoPipelineFor": "", "torch.": ""}
SPELT |= {"lora": "LoRA", "ip adapter": "IP-Adapter", "controlnet": "ControlNet", "t2i adapters": "T2I-Adapters"}
SPELT |= {"freeu": "FreeU", "Image2Image": "image to image", "Inpainting": "inpainting"}
RAUNET = da.HiDiffusion(window_attention=False)

PAGE_TEXT = """---
hide: [toc]  # the tables are wide
---

# What goes together

Written by `python -m tests.compatibility` from the tests themselves; edit it there.

## Beside everything else

Each row is a test of `tests/test_matrix.py`, each cell the models that it runs on with this method, small and with
random weights: the layouts of Stable Diffusion 1.5 (SD), SDXL, FLUX.1 and Stable Diffusion 3.5 (SD3). What can come
before or after `enable` is tested in both orders, which give the same picture; after `disable` it is the plain model's.
An empty cell is not tested, or has nothing to serve there.

{conditions}

## Beside each other

Two methods in one call of `enable`: whether they go together, on Stable Diffusion 1.5's layout or else on FLUX's.
Where they do not, the error says what to leave out.

{pairs}
"""


def page() -> str:
    """The page as it should be."""
    conditions = [
        [condition, *(", ".join(model for model in LAYOUTS if model in served[name]) for name in METHODS)]
        for condition, served in _conditions()
    ]
    methods = [*METHODS, "RAU-Net alone"]
    pairs = _table(["", *methods], list(_pairs(methods)))
    return PAGE_TEXT.format(conditions=_table(["condition", *METHODS], conditions), pairs=pairs)


def _conditions() -> Iterator[tuple[str, dict[str, set[str]]]]:
    """``(condition, {method: models})`` of each test of the matrix; forms of it that serve the same are one."""
    for name, test in vars(test_matrix).items():
        if name.startswith("test_") and hasattr(test, "pytestmark"):
            forms: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
            for case in _cases(test):
                row = case["name"]
                make = case.get("make", test_matrix.ROWS[row][0])
                form = ", ".join(words for key, words in case.items() if key not in UNSAID)
                forms[form][test_matrix.method_for(row).name].add(MODELS[make])
            groups: dict[str, list[str]] = defaultdict(list)
            for form, served in forms.items():
                groups[repr(sorted((method, sorted(models)) for method, models in served.items()))].append(form)
            for same in groups.values():
                yield _words(name.removeprefix("test_")) + f": {'; '.join(same)}" * any(same), forms[same[0]]


def _cases(test: Callable) -> Iterator[dict[str, Any]]:
    """The arguments of each case of a parametrised test; in words, but for `UNSAID`."""
    axes = []
    for mark in test.pytestmark:  # type: ignore[attr-defined]
        names, values, ids = mark.args[0], mark.args[1], mark.kwargs.get("ids")
        if isinstance(names, str):
            names, values = (names,), [(value,) for value in values]
        axes.append([])
        for index, value in enumerate(values):
            case = dict(zip(names, value, strict=True))
            shown = {key: ids[index] if ids else _words(x) for key, x in case.items() if key not in UNSAID}
            axes[-1].append({**case, **shown})
    for cases in product(*axes):
        yield {key: value for case in cases for key, value in case.items()}


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    text = str(value if isinstance(value, str | torch.dtype) else value.__name__).replace("_", " ")
    for written, spelt in SPELT.items():
        text = text.replace(written, spelt)
    return text


def _pairs(methods: list[str]) -> Iterator[list[str]]:
    """For each of ``methods``, whether it can be enabled with the others; nothing where no model has both."""
    makes = {"": test_matrix.SHORT, "-flux": tiny.flux}
    models = {suffix: tiny.denoiser(make()) for suffix, make in makes.items()}
    rows = {"": {"RAU-Net alone": RAUNET}, "-flux": {}}
    for suffix, make in makes.items():
        found = {name: name + suffix if name + suffix in test_matrix.ROWS else name for name in METHODS}
        rows[suffix] |= {
            name: test_matrix.method_for(row) for name, row in found.items() if test_matrix.ROWS[row][0] is make
        }
    for first in methods:
        answers = []
        for second in methods:
            both = [suffix for suffix, on in rows.items() if {first, second} <= on.keys()]
            pair = [rows[both[0]][name] for name in (first, second)] if both else []
            answers.append(_together(models[both[0]], *pair) if pair and pair[0].name != pair[1].name else "")
        yield [first, *answers]


def _together(model: Any, *methods: Any) -> str:
    try:
        with da.using(model, *methods, timesteps=torch.arange(901, 0, -100)):
            return "yes"
    except da.MethodConflictError:
        return "no"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
