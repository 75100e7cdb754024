"""Edits of drawn pictures, read by an oracle: does the edit come out, does the rest stay, where do words look?

python -m benchmarks.editing quality            # every way to invert a picture, on the same edits
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import common
from benchmarks.oracle import SHAPES_SD, digest
from benchmarks.pages import Section, finish, keep, resume, run, shared_arguments
from diffusion_attn.editing.inversion import Inversion, ddim_invert, direct_inversion, dynamic_prompts, null_text
from diffusion_attn.pipelines import DPLPipeline
from diffusion_attn.shapes.edits import KINDS_OF_EDIT, SceneEdit, scene_edits
from diffusion_attn.shapes.judging import judge
from diffusion_attn.shapes.models import load_pipeline
from diffusion_attn.shapes.oracle import read

NAME = "editing"
NULL = {"num_null_steps": 10, "null_start": "previous", "null_tolerance": 1e-5}
DPL = {
    "num_word_steps": 5,
    "balancing": (1.0, 10.0, 0.3),
    "temperature": 10.0,
    "disjoint": (0.05, 10.0, 0.5),
    "leakage": (0.05, 20.0, 0.3),
}
WINDOWS = {"swap": (0.4, 0.2), "recolour": (0.4, 0.2), "insert": (0.2, 0.0), "reweight": (1.0, 0.2)}
"""``cross_replace_steps`` and ``self_replace_steps`` of each kind of edit, the same for all methods."""


def _null_text(pipe: DPLPipeline, inversion: Inversion, edit: SceneEdit, guidance: float, **fewer: int) -> Inversion:
    return null_text(pipe, inversion, guidance_scale=guidance, **{**NULL, **fewer})


def _dpl(pipe: DPLPipeline, inversion: Inversion, edit: SceneEdit, guidance: float, **fewer: int) -> Inversion:
    grid = inversion.size
    background = torch.tensor(~np.logical_or.reduce(edit.masks(grid[0])))
    options = {**NULL, **DPL, **fewer, "map_size": grid, "guidance_scale": guidance, "background": background}
    return dynamic_prompts(pipe, inversion, edit.words, **options)


METHODS: dict[str, Callable[[DPLPipeline, Inversion, SceneEdit, float], Inversion]] = {
    "plain DDIM": lambda pipe, inversion, edit, guidance: inversion,
    "direct": lambda pipe, inversion, edit, guidance: direct_inversion(pipe, inversion),
    "null-text": _null_text,
    "null-text, 3 updates": partial(_null_text, num_null_steps=3),
    "DPL": _dpl,
    "DPL, 1 and 3 updates": partial(_dpl, num_word_steps=1, num_null_steps=3),
}
"""How a picture is inverted before Prompt-to-Prompt edits it."""

LOOKS = ("plain DDIM", "DPL", "DPL, 1 and 3 updates")
"""Of which it is measured where the words look; in the other ways they look where they do in the first."""


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Fill the table edit by edit; what an earlier run with the same settings finished is kept.

    Raises:
        SystemExit: there are rows, and they were made with other settings.
    """
    stock = load_pipeline(SHAPES_SD.name, dtype=getattr(torch, args.dtype)).to(args.device)
    stock.set_progress_bar_config(disable=True)
    settings = {
        "model": SHAPES_SD.name,
        "weights": digest(stock, SHAPES_SD),
        **{name: getattr(args, name) for name in ("edits", "seed", "steps", "guidance", "dtype")},
    }
    section = resume(args, settings)
    done = {(row["method"], row["edit"]) for row in section["rows"]}
    pipe = DPLPipeline.from_pipe(stock)
    edits = list(enumerate(scene_edits(args.edits, args.seed)))
    for index, edit in tqdm(edits, desc="edits"):
        missing = [name for name in args.methods if (name, index) not in done]
        if missing:
            rows = [{"edit": index, **row} for row in _rows(pipe, edit, missing, args)]
            section = keep(args, rows, lambda row: (list(METHODS).index(row["method"]), row["edit"]))
    return section


def _rows(pipe: DPLPipeline, edit: SceneEdit, methods: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One edit by each of ``methods``."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    picture = edit.image(side)
    source, target = edit.prompts
    latents = pipe.encode_image(picture)
    plain = ddim_invert(pipe, latents, source, num_inference_steps=args.steps)
    cross, own = WINDOWS[edit.kind]
    rows = []
    for name in methods:
        inversion = METHODS[name](pipe, plain, edit, args.guidance)
        output = pipe(
            target_prompt=target,
            inversion=inversion,
            guidance_scale=args.guidance,
            cross_replace_steps=cross,
            self_replace_steps=own,
            word_weights=edit.weights,
        )
        [edited], [reconstruction] = output.images, output.source
        kept = ~edit.editable(side)
        cost = inversion.cost.values()
        row = {
            "method": name,
            "kind": edit.kind,
            "objects": len(edit.source.shapes),
            "success": succeeded(edit, picture, edited),
            "background_mse": mse(picture, edited, kept),
            "reconstruction_mse": mse(picture, reconstruction),
            "unet_calls": sum(stage["unet_calls"] for stage in cost),
            "seconds": sum(stage["seconds"] for stage in cost),
        }
        if name in LOOKS:
            row |= looks(pipe, inversion, edit)
        rows.append(row)
    return rows


def succeeded(edit: SceneEdit, before: Image.Image, after: Image.Image) -> bool:
    """Whether the oracle reads the target; re-weighting a size has to move the radius its way by a hundredth."""
    if edit.kind != "reweight":
        return judge(after, edit.prompts[1]).exact
    shape = edit.source.shapes[edit.object]
    radii = [[found.radius for found in read(image).shapes if found.color == shape.color] for image in (before, after)]
    if not all(len(found) == 1 for found in radii):
        return False
    ratio = radii[1][0] / radii[0][0]
    return ratio >= 1.01 if shape.size == "large" else ratio <= 0.99


def looks(pipe: Any, inversion: Inversion, edit: SceneEdit) -> dict[str, float]:
    """Where the nouns look: overlap with their objects, and the share of attention on objects and on other objects."""
    maps = inversion.attention_maps(pipe)
    masks = torch.tensor(edit.masks(maps.maps.shape[1]))
    numbers = []
    for index, word in enumerate(edit.words):
        own, other = masks[index], masks[torch.arange(len(masks)) != index].any(0)
        map_ = maps.word(word)
        strong = map_ > map_.max() / 2
        overlap = (strong & own).sum() / (strong | own).sum()
        numbers.append([float(overlap), float(map_[own].sum() / map_.sum()), float(map_[other].sum() / map_.sum())])
    overlap, inside, leakage = np.mean(numbers, 0)
    return {"overlap": overlap, "inside": inside, "leakage": leakage}


def mse(a: Image.Image, b: Image.Image, where: np.ndarray | None = None) -> float:
    """The mean squared difference of two pictures, 0 to 1, everywhere or ``where``."""
    difference = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) / 255
    return float((difference if where is None else difference[where]).__pow__(2).mean())


def psnr(rows: list[dict[str, Any]], name: str) -> str:
    """The mean over the rows, in decibels."""
    return f"{np.mean([-10 * math.log10(max(row[name], 1e-10)) for row in rows]):.1f}"


def quality_table(section: dict[str, Any]) -> str:
    """One line for each method, then where the words look."""
    lines = []
    for method in METHODS:
        rows = [row for row in section["rows"] if row["method"] == method]
        if not rows:
            continue
        shares = []
        for kind in KINDS_OF_EDIT:
            won = [row["success"] for row in rows if row["kind"] == kind]
            shares.append(f"{sum(won)} of {len(won)}")
        rest = 1e3 * np.mean([row["background_mse"] for row in rows])
        calls, seconds = (np.mean([row[name] for row in rows]) for name in ("unet_calls", "seconds"))
        fidelity = [psnr(rows, "background_mse"), f"{rest:.2f}", psnr(rows, "reconstruction_mse")]
        lines.append([method, *shares, *fidelity, f"{calls:.0f}", f"{seconds:.1f}"])
    head = ["inversion", *KINDS_OF_EDIT, "rest PSNR, dB", "rest MSE, 1e-3", "reconstruction PSNR, dB", "UNet calls"]
    return common.table([*head, "seconds"], lines, left=1) + "\n\n" + _looks_table(section)


def _looks_table(section: dict[str, Any]) -> str:
    lines = []
    for objects in (1, 2):
        for method in LOOKS:
            rows = [row for row in section["rows"] if row["method"] == method and row["objects"] == objects]
            if rows:
                means = [np.mean([row[name] for row in rows]) for name in ("overlap", "inside", "leakage")]
                lines.append([method, str(objects), f"{means[0]:.3f}", *(f"{100 * mean:.1f} %" for mean in means[1:])])
    head = ["words of", "objects", "overlap with the object", "attention on the object", "on the other object"]
    return common.table(head, lines, left=1)


INTRODUCTION = """# Editing drawn pictures

Written by `python -m benchmarks.report` from the numbers beside it.
"""
SECTIONS = {
    "quality": Section(
        "Edits that an oracle reads",
        "The same edits by Prompt-to-Prompt after four ways to invert the picture, with the same windows and guidance. "
        "*swap*, *recolour*: another shape or colour; *insert*: a second object, named in the prompt; these count when "
        "the oracle reads exactly the target. *reweight*: the word of an object's size times 8, which counts when its "
        "radius moves that way by a hundredth. *Rest*: everything further than three pixels from the object that is "
        "edited; for insertions the object that was there. UNet calls and seconds are of the inversion. DPL is given "
        "the drawn background; its maps are of the finest level. Overlap is that of the pixels above half of a map's "
        "maximum with the object's mask, of all the nouns of a picture. This is a model of coloured shapes: evidence "
        "about a mechanism, not about photographs.",
        quality_table,
    )
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editing", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    add = commands.add_parser("quality", parents=[*shared_arguments()], help="the oracle's table").add_argument
    add("--edits", type=int, default=120)
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=3.0)
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--restart", action="store_true", help="drop the rows that are there")
    return finish(parser.parse_args(argv), NAME, argv)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand, print its table and keep its section."""
    args = parse(sys.argv[1:] if argv is None else argv)
    run(args, SECTIONS, {"quality": quality})


if __name__ == "__main__":
    main()
