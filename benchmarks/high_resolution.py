"""Large pictures in numbers: what an oracle reads after each way up, how cost grows, and what tiles change.

    python -m benchmarks.high_resolution shapes-sd --sizes 2 4 --captions 24   # the oracle's table; resumes
    python -m benchmarks.high_resolution shapes-flux --sizes 2 --captions 12
    python -m benchmarks.high_resolution scale      # one UNet pass to 2048 latent cells a side, and its plot; resumes
    python -m benchmarks.high_resolution seams      # the autoencoder in tiles against the whole picture

Run from the repository root. They print a table and keep it as a section of the JSON file ``--output``;
``python -m benchmarks.report`` makes the page of it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import diffusion_attn as da
from benchmarks import common
from benchmarks.oracle import SHAPES_SD, Subject, digest
from benchmarks.pages import Section, finish, keep, origin, resume, run, shared_arguments
from diffusion_attn.metrics.cost import measure
from diffusion_attn.pipelines import HighResolutionPipeline, Ladder, Stage
from diffusion_attn.pipelines.autoencoder import decode, encode, tiled
from diffusion_attn.pipelines.pictures import to_pixels
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.judging import score
from diffusion_attn.shapes.models import load_pipeline
from diffusion_attn.shapes.renderer import render
from diffusion_attn.shapes.scenes import sample_scenes

NAME = "high_resolution"
HIRES_STRENGTH = 0.5
"""Of the second pass of "hires fix": the middle of what is recommended for it."""

WEAK = 0.2
"""Small models draw small shapes: at the published strengths they make many of one."""

Way = Callable[[Any, int, int], tuple[HighResolutionPipeline, Any]]
"""A way up for ``(pipe, native pixels, wanted pixels)``: the pipeline and its ladder."""


def _at_once(*methods: Any) -> Way:
    def way(pipe: Any, native: int, pixels: int) -> tuple[HighResolutionPipeline, Any]:
        return HighResolutionPipeline.from_pipe(pipe, base_methods=methods), [Stage(pixels, pixels)]

    return way


def _two_passes(strength: float = HIRES_STRENGTH) -> Way:
    def way(pipe: Any, native: int, pixels: int) -> tuple[HighResolutionPipeline, Any]:
        return HighResolutionPipeline.from_pipe(pipe), [Stage(native, native), Stage(pixels, pixels, strength)]

    return way


def _ladder(ladder: Ladder, methods: Callable[[Any], list[Any]] = lambda pipe: [], *base: Any) -> Way:
    def way(pipe: Any, native: int, pixels: int) -> tuple[HighResolutionPipeline, Any]:
        return HighResolutionPipeline.from_pipe(pipe, methods(pipe), base), ladder

    return way


def _linfusion(pipe: Any) -> list[Any]:
    return [da.LinFusion.for_pipeline(pipe)]


def _clear(pipe: Any) -> list[Any]:
    return [da.Clear.for_pipeline(pipe)]


ENLARGED = "native size, enlarged"
SD_WAYS: dict[str, Way | None] = {
    ENLARGED: None,
    "plain, at once": _at_once(),
    "HiDiffusion, at once": _at_once(da.HiDiffusion(window_attention=False)),
    "hires fix: two passes": _two_passes(),
    "plain ladder": _ladder(Ladder()),
    "LinFusion ladder": _ladder(Ladder(), _linfusion),
    "HiDiffusion at 2x, then LinFusion": _ladder(
        Ladder(base_scale=2), _linfusion, da.HiDiffusion(window_attention=False)
    ),
    "hires fix, strength 0.2": _two_passes(WEAK),
    "plain ladder, strength 0.2": _ladder(Ladder(strength=WEAK, fall=0.0)),
    "LinFusion ladder, strength 0.2": _ladder(Ladder(strength=WEAK, fall=0.0), _linfusion),
}
FLUX_WAYS: dict[str, Way | None] = {
    ENLARGED: None,
    "plain, at once": _at_once(),
    "hires fix: two passes": _two_passes(),
    "plain ladder": _ladder(Ladder()),
    "CLEAR cascade": _ladder(Ladder(strength=0.7, fall=0.0, factor=4), _clear),
    "CLEAR ladder": _ladder(Ladder(), _clear),
    "CLEAR ladder, strength 0.2": _ladder(Ladder(strength=WEAK, fall=0.0), _clear),
}


def _quality(args: argparse.Namespace, ways: dict[str, Way | None], subject: Subject, ddim: bool) -> dict[str, Any]:
    """Fill the table of one embedded model row by row."""
    pipe = load_pipeline(subject.name, dtype=getattr(torch, args.dtype)).to(args.device)
    if ddim:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    settings = {
        "model": subject.name,
        "weights": digest(pipe, subject),
        **{name: getattr(args, name) for name in ("seed", "steps", "guidance", "dtype")},
    }
    section = resume(args, settings)
    for size in args.sizes:
        for name in args.ways or ways:
            if any((row["size"], row["way"]) == (size, name) for row in section["rows"]):
                continue
            if name.startswith("HiDiffusion at 2x") and size < 4:
                continue
            row = _row(args, pipe, subject, size, name, ways[name])
            section = keep(args, [row], lambda row: (row["size"], list(ways).index(row["way"])))
    return section


def _row(
    args: argparse.Namespace, pipe: Any, subject: Subject, size: int, name: str, way: Way | None
) -> dict[str, Any]:
    native = subject.native_pixels(pipe)
    pixels = native * (1 if way is None else size)
    hires, ladder = (way or _at_once())(pipe, native, pixels)
    hires.set_progress_bar_config(disable=True)
    prompts = [caption(scene) for scene in sample_scenes(args.captions, args.seed, held_out=True)]
    images, seconds = [], []
    for index, prompt in enumerate(common.tqdm(prompts, desc=f"{size}x {name}")):
        began = time.perf_counter()
        result = hires(
            prompt,
            height=pixels,
            width=pixels,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            ladder=ladder,
            generator=torch.Generator().manual_seed(args.seed + index),
        )
        seconds.append(time.perf_counter() - began)
        images.append(result.images[0].resize((size * native, size * native)))
    return {
        "size": size,
        "pixels": size * native,
        "way": name,
        "stages": [stage.stage.name for stage in result.stages],
        "seconds": median(seconds),
        **score(images, prompts).as_dict(),
    }


def quality_table(section: dict[str, Any]) -> str:
    """What the oracle read, one line for each size and way."""
    names = ("asked", "read", "extra", "missing", "wrong_color", "wrong_shape")
    lines = [
        [
            f"{row['size']}x ({row['pixels']} px)",
            row["way"],
            str(row["images"]),
            f"{row['exact']:.0%}",
            *(str(row[name]) for name in names),
            f"{row['readable']:.0%}",
            f"{row['seconds']:.1f}",
        ]
        for row in section["rows"]
    ]
    head = ["size", "way", "pictures", "exact", "objects asked", "objects read", "extra", "missing", "wrong colour"]
    return common.table([*head, "wrong shape", "readable", "median seconds"], lines, left=2)


# ---- how cost grows

WIDTHS = (32, 64, 96, 96)
WARMED_UP = 60
"""Seconds of a pass from which on what a first one pays for does not count."""
SCALED = {
    "SDPA": lambda unet: [],
    "LinFusion": lambda unet: [da.LinFusion.for_model(unet)],
    "LinFusion, LowMemory": lambda unet: [da.LinFusion.for_model(unet), da.LowMemory(park_skips="disk")],
}


def scale(args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a pass of SD 1.5's layout, reduced in width, as the latent grows."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=WIDTHS, attention_head_dim=4, cross_attention_dim=64, norm_num_groups=16
    ).eval()
    unet.to(args.device, getattr(torch, args.dtype))
    settings = {"widths": list(WIDTHS), "repeats": args.repeats, "dtype": args.dtype}
    section = resume(args, settings)
    for name, methods in SCALED.items():
        for side in args.sides:
            rows = [row for row in section["rows"] if row["variant"] == name]
            if any(row["side"] == side for row in rows):
                continue
            growth = 2 if name != "SDPA" else 4
            expected = rows[-1]["seconds"] * (side / rows[-1]["side"]) ** growth if rows else 0
            if expected > args.limit:
                print(f"{name} at {side}: it would take longer than {args.limit} s")
                continue
            warm_up = int(expected < WARMED_UP)
            chosen = methods(unet)
            with da.using(unet, *chosen) if chosen else nullcontext():
                costs = [_pass(unet, side, args.device) for _ in range(args.repeats + warm_up)][warm_up:]
            row = {
                "variant": name,
                "side": side,
                "seconds": median(cost.seconds for cost in costs),
                "peak_bytes": max(cost.peak_bytes for cost in costs),
            }
            section = keep(args, [row], lambda row: (list(SCALED).index(row["variant"]), row["side"]))
    plot = args.output.with_suffix(".png")
    _plot(section, plot)
    return {**section, "plot": plot.name}


def _pass(unet: Any, side: int, device: str) -> Any:
    like = next(unet.parameters())
    x = torch.randn(1, 4, side, side, device=like.device, dtype=like.dtype)
    text = torch.randn(1, 77, 64, device=like.device, dtype=like.dtype)
    with torch.no_grad(), measure(device) as cost:
        unet(x, 501, text)
    return cost


def _exponents(rows: list[dict[str, Any]], of: str) -> list[float | None]:
    """Growth from row to row as a power of the number of latent cells."""
    powers: list[float | None] = [None]
    for below, above in pairwise(rows):
        powers.append(math.log(above[of] / below[of]) / math.log((above["side"] / below["side"]) ** 2))
    return powers


def scale_table(section: dict[str, Any]) -> str:
    """Seconds and memory, one line for each variant and size."""
    lines = []
    for name in SCALED:
        rows = [row for row in section["rows"] if row["variant"] == name]
        powers = zip(rows, _exponents(rows, "seconds"), _exponents(rows, "peak_bytes"), strict=True)
        for row, time_power, memory_power in powers:
            side = row["side"]
            lines.append(
                [
                    name,
                    f"{side} x {side}",
                    f"{8 * side} px",
                    f"{row['seconds']:.2f}",
                    "-" if time_power is None else f"{time_power:.2f}",
                    f"{row['peak_bytes'] / 2**20:.0f}",
                    "-" if memory_power is None else f"{memory_power:.2f}",
                ]
            )
    head = ["variant", "latent", "picture", "seconds", "exponent", "peak MiB", "exponent "]
    picture = f"\n\n![Time and memory over latent cells]({section['plot']})" if "plot" in section else ""
    return common.table(head, lines) + picture


def _plot(section: dict[str, Any], path: Any) -> None:
    """Seconds and memory over latent cells, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, of, unit, label in zip(axes, ("seconds", "peak_bytes"), (1, 2**30), ("seconds", "GiB"), strict=True):
        for name in SCALED:
            rows = [row for row in section["rows"] if row["variant"] == name]
            axis.loglog([row["side"] ** 2 for row in rows], [row[of] / unit for row in rows], marker="o", label=name)
        axis.set_xlabel("latent cells")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle("One pass of SD 1.5's layout, reduced in width")
    figure.savefig(path, dpi=120)


# ---- tiles


def seams(args: argparse.Namespace) -> dict[str, Any]:
    """The autoencoder in tiles, by diffusers alone and with the whole picture's norms, against the whole."""
    rows = []
    scenes = list(sample_scenes(args.captions, 0, held_out=True))
    pipe = load_pipeline("shapes-sd", dtype=getattr(torch, args.dtype)).to(args.device)
    for size in args.sizes:
        pictures = [to_pixels(render(scene, size).convert("RGB")) for scene in scenes]
        for tile in args.tiles:
            if tile >= size:
                continue
            found: dict[str, list[float]] = {"plain": [], "shared": []}
            for pixels in common.tqdm(pictures, desc=f"{size} px, tiles of {tile}"):
                latents = encode(pipe, pixels, torch.Generator().manual_seed(0))
                whole = decode(pipe, latents, (size, size))
                with tiled(pipe.vae, tile):
                    shared = decode(pipe, latents, (size, size))
                    z = latents / pipe.vae.config.scaling_factor
                    with torch.no_grad():
                        plain = pipe.vae.decode(z).sample.mul(0.5).add(0.5).clamp(0, 1)
                for name, picture in (("plain", plain), ("shared", shared)):
                    found[name].append(float(-10 * (picture - whole).square().mean().clamp(min=1e-12).log10()))
            for name, values in found.items():
                rows.append(
                    {"size": size, "tile": tile, "norms": name, "psnr": median(values), "worst": float(np.min(values))}
                )
    settings = {"captions": args.captions, "dtype": args.dtype}
    return {**origin(args), "settings": settings, "rows": rows}


def seams_table(section: dict[str, Any]) -> str:
    """Decibels, one line for each size and tile."""
    told = {"plain": "its own, as diffusers does it", "shared": "the whole picture's"}
    lines = [
        [f"{row['size']} px", f"{row['tile']} px", told[row["norms"]], f"{row['psnr']:.1f}", f"{row['worst']:.1f}"]
        for row in section["rows"]
    ]
    return common.table(["picture", "tile", "norms of a tile", "median PSNR, dB", "worst PSNR, dB"], lines, left=3)


_READING = (
    "Pictures of held-out captions, the same seeds for every way, at multiples of the size that the model was trained "
    "at. *Exact*: the picture shows what was asked and nothing else; *extra* and *missing* count objects against the "
    "caption; objects that touch are read as one, and the picture then as not readable. *Native size, enlarged* draws "
    "nothing anew: what a ladder has to be held against where only objects count, and worthless where detail does. "
    "Seconds are the median of a picture, whatever else the machine did. This is a model of coloured shapes: evidence "
    "about a mechanism, not about photographs."
)
SECTIONS = {
    "shapes-sd": Section("shapes-sd: objects asked and objects read", _READING, quality_table),
    "shapes-flux": Section("shapes-flux: objects asked and objects read", _READING, quality_table),
    "scale": Section(
        "How cost grows",
        "One pass of SD 1.5's layout with fewer channels and random weights, one row, float32, as the latent grows. "
        "*Exponent*: growth of time and memory from the line above as a power of the number of latent cells; 1 is "
        "linear. SDPA ends where a pass would take longer than the command's limit. Peak memory is what a pass needs "
        "above weights. Skips are parked on disk, as there is no other place on a CPU.",
        lambda section: scale_table(section),
    ),
    "seams": Section(
        "The autoencoder in tiles",
        "Decoded pictures in tiles against the same latents decoded as a whole. A tile that is normalised by itself "
        "comes out in another brightness, a plain background above all; with mean and variance of a reduced picture "
        "seams are gone from view. The autoencoder itself is 37 to 39 dB from the picture that it is given.",
        seams_table,
    ),
}
INTRODUCTION = """# Large pictures in numbers

Written by `python -m benchmarks.report` from the JSON files beside this page; edit neither by hand.
"""


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.high_resolution",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True)
    parents = list(shared_arguments())
    for name, ways, guidance in (("shapes-sd", SD_WAYS, 2.0), ("shapes-flux", FLUX_WAYS, 3.0)):
        add = commands.add_parser(name, parents=parents, help=f"the oracle's table on {name}").add_argument
        add("--sizes", type=int, nargs="+", default=[2, 4], help="multiples of the native size")
        add("--ways", nargs="+", choices=ways)
        add("--captions", type=int, default=24, help="held-out captions, one picture each")
        add("--seed", type=int, default=0)
        add("--steps", type=int, default=30)
        add("--guidance", type=float, default=guidance)
        add("--restart", action="store_true", help="drop the rows that are there")
    add = commands.add_parser("scale", parents=parents, help="cost of one pass").add_argument
    add("--sides", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="latent cells of a side")
    add("--repeats", type=int, default=1)
    add("--limit", type=float, default=300, help="seconds of a pass that is still made")
    add("--restart", action="store_true", help="drop the rows that are there")
    add = commands.add_parser("seams", parents=parents, help="the autoencoder in tiles").add_argument
    add("--sizes", type=int, nargs="+", default=[256, 512])
    add("--tiles", type=int, nargs="+", default=[64, 128, 256])
    add("--captions", type=int, default=20)
    args = finish(parser.parse_args(argv), NAME, argv)
    flux = Subject("shapes-flux", ("transformer", "vae"), lambda pipe: pipe.vae.config.sample_size, SHAPES_SD.draw)
    run(
        args,
        SECTIONS,
        {
            "shapes-sd": lambda args: _quality(args, SD_WAYS, SHAPES_SD, ddim=True),
            "shapes-flux": lambda args: _quality(args, FLUX_WAYS, flux, ddim=False),
            "scale": scale,
            "seams": seams,
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
