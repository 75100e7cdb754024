"""HiDiffusion in numbers: operations, seconds and memory, and what an oracle reads from the pictures.

    python -m benchmarks.hidiffusion flops      # per UNet evaluation, next to the official code's
    python -m benchmarks.hidiffusion speed      # seconds and peak memory of one UNet step, behind a parity gate
    python -m benchmarks.hidiffusion quality    # the oracle's table on the embedded model; resumes where it stopped

Run from the repository root. They print a table and keep it as a section of the JSON file ``--output``;
``python -m benchmarks.report`` makes the page of it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import diffusion_attn as da
from benchmarks import common, oracle
from benchmarks.common import LAYOUTS, TIMESTEPS, Layout
from benchmarks.pages import Section, finish, origin, run, shared_arguments
from diffusion_attn.core.context import StepContext
from diffusion_attn.methods.hidiffusion.regime import regime

NAME = "hidiffusion"
REGIMES = ("D", "P", "D+P")
Change = Callable[[Any], AbstractContextManager]
"""Puts something in force on a UNet (for pictures: on a pipeline) for a ``with`` block."""

# ---- which switches are on


def schedule(layout: Layout, pixels: int) -> list[str]:
    """The regime of each of the 50 steps by the method's own rules: ``""`` (windows only), ``D``, ``P`` or ``D+P``."""
    native, side = layout.config["sample_size"], pixels // 8
    steps = [
        regime(da.HiDiffusion(), layout.family, StepContext(side, side, step, len(TIMESTEPS)), native)
        for step in range(len(TIMESTEPS))
    ]
    return ["+".join("D" * on.dilate + "P" * on.pool) for on in steps]


_SWITCHES: dict[tuple[str, str], dict[str, Any]] = {
    ("sd", "D"): {"t1_ratio": 1.0, "t2_ratio": 0.0},
    ("sd", "D+P"): {"t1_ratio": 1.0, "t2_ratio": 1.0},
    ("sdxl", "D"): {"aggressive": True},
    ("sdxl", "P"): {"t1_ratio": 1.0, "t2_ratio": 0.0, "aggressive": False},
    ("sdxl", "D+P"): {"t1_ratio": 1.0, "t2_ratio": 1.0, "aggressive": False},
}


def hidiffusion(layout: Layout, name: str, windows: bool = True) -> Change:
    """HiDiffusion with the regime ``name`` in force at the first step, at any size."""
    if name:
        method = da.HiDiffusion(window_attention=windows, shift=0, min_size=0, **_SWITCHES[layout.family, name])
    else:
        method = da.HiDiffusion(raunet=False, shift=0)
    return lambda unet: da.using(unet, method, timesteps=TIMESTEPS)


def by_default(unet: nn.Module) -> AbstractContextManager:
    """HiDiffusion as a user gets it, but for the shifts, which cost nothing and need not differ."""
    return da.using(unet, da.HiDiffusion(shift=0), timesteps=TIMESTEPS)


def plain(unet: nn.Module) -> AbstractContextManager:
    """The UNet as it is."""
    return nullcontext()


# ---- flops

OFFICIAL = {
    ("sd", 1024): {"vanilla": 4.67, "window": 3.39, "D": 1.81, "mean": 2.75, "ratio": 1.70},
    ("sd", 2048): {"vanilla": 42.2, "window": 21.6, "D": 12.6, "D+P": 11.3, "mean": 14.9, "ratio": 2.84},
    ("sdxl", 2048): {"vanilla": 35.9, "window": 30.8, "D": 13.3, "P": 9.97, "mean": 23.0, "ratio": 1.56},
    ("sdxl", 4096): {
        "vanilla": 287.8,
        "window": 205.3,
        "D": 77.6,
        "P": 52.6,
        "D+P": 35.2,
        "mean": 93.2,
        "ratio": 3.09,
    },
}
"""TFLOP per UNet evaluation as the official code has them, counted on the same layouts."""

TOLERANCE = 0.01
_COLUMNS = {
    "vanilla": "vanilla",
    "window": "window only",
    "D": "D",
    "P": "P",
    "D+P": "D+P",
    "mean": "mean of 50 steps",
    "ratio": "vanilla / mean",
}


def flops_row(layout: Layout, pixels: int, official: dict[str, float]) -> dict[str, Any]:
    """One line counted again: TFLOP of each regime at the moment it runs, and their mean over a run."""
    unet = layout.build("meta")

    steps = schedule(layout, pixels)

    def count(change: Change, step: int = 0) -> float:
        """TFLOP of one evaluation with ``change`` in force."""
        with change(unet):
            return common.count_flops(layout.call(unet, pixels, step)) / 1e12

    def count_regime(name: str) -> float:
        """A regime where the method's defaults reach it; one that they do not use at this size is forced."""
        return count(by_default, steps.index(name)) if name in steps else count(hidiffusion(layout, name))

    counted = {"vanilla": count(plain), "window": count(hidiffusion(layout, ""))}
    counted |= {name: count_regime(name) for name in REGIMES if name in official}
    counted["mean"] = sum(counted[name or "window"] for name in steps) / len(steps)
    counted["ratio"] = counted["vanilla"] / counted["mean"]
    deviation = {name: counted[name] / official[name] - 1 for name in official}
    return {"model": layout.name, "pixels": pixels, "counted": counted, "official": official, "deviation": deviation}


def flops_table(section: dict[str, Any]) -> str:
    """The counted numbers, the official code's, and how far they are apart."""
    styles = {"counted": "{:.3f}", "official": "{:g}", "deviation": "{:+.2%}"}
    lines = [
        [
            f"{row['model']}, {row['pixels']} px",
            kind,
            *(style.format(row[kind][name]) if name in row[kind] else "-" for name in _COLUMNS),
        ]
        for row in section["rows"]
        for kind, style in styles.items()
    ]
    return common.table(["UNet", "TFLOP", *_COLUMNS.values()], lines, left=2)


def flops(args: argparse.Namespace) -> dict[str, Any]:
    """Count operations on the meta device, where only shapes exist."""
    common.check_counter()
    rows = [
        flops_row(LAYOUTS[name], pixels, official) for (name, pixels), official in tqdm(OFFICIAL.items(), desc="flops")
    ]
    section = {**origin(args), "rows": rows}
    worst = max(abs(deviation) for row in rows for deviation in row["deviation"].values())
    if worst > TOLERANCE:
        print(flops_table(section))
        raise SystemExit(
            f"a number is {worst:.1%} off the official code's, expected {TOLERANCE:.0%} at most; nothing is kept."
        )
    return section


# ---- speed


def gate(layout: Layout, device: str) -> None:
    """What has to hold before a time is worth anything, checked on a small UNet in float32.

    Raises:
        SystemExit: something does not hold.
    """
    unet = layout.build(device, small=True)
    noisy, late = layout.call(unet, 256), layout.call(unet, 256, step=len(TIMESTEPS) - 1)
    raunet = da.HiDiffusion(window_attention=False, min_size=0)
    q, k, v = torch.randn(3, 2, 4, 64, 16, device=device).unbind()
    with torch.no_grad():
        before, after_t1 = noisy(), late()
        with da.using(unet, raunet, timesteps=TIMESTEPS):
            shrunk, same = noisy(), late()
        with common.deep_shrink(unet):
            deep, spared = noisy(), late()
        for change in speed_variants(layout, 256, every_regime=True).values():
            with change(unet):
                noisy()
        checks = {
            "RAU-Net changes the first step": not torch.equal(shrunk, before),
            "after T1 RAU-Net is the plain UNet": torch.equal(same, after_t1),
            "a single window is full attention": torch.allclose(
                da.ops.window_attention(q, k, v, grid=(8, 8), windows=(1, 1)),
                F.scaled_dot_product_attention(q, k, v),
                atol=1e-6,
            ),
            "deep shrink changes the first step only": not torch.equal(deep, before) and torch.equal(spared, after_t1),
            "what is taken off leaves the plain UNet": torch.equal(noisy(), before),
        }
    failed = [name for name, holds in checks.items() if not holds]
    if failed:
        raise SystemExit(f"parity gate failed: {'; '.join(failed)}. No times are measured.")
    print(f"parity gate passed: {len(checks)} checks")


def speed_variants(layout: Layout, pixels: int, every_regime: bool) -> dict[str, Change]:
    """What is timed at a size: the plain UNet, each regime that the method's schedule uses there, the alternatives."""
    used = set(REGIMES if every_regime else schedule(layout, pixels))
    regimes = [name for name in REGIMES if name in used and (layout.family, name) in _SWITCHES]
    variants: dict[str, Change] = {"plain": plain, "window": hidiffusion(layout, "")}
    for name in regimes:
        variants[name] = hidiffusion(layout, name, windows=False)
        variants[f"{name} + window"] = hidiffusion(layout, name)
    if pixels > 8 * layout.config["sample_size"]:
        variants["deep shrink"] = common.deep_shrink
    if version := common.tomesd_version():
        variants[f"tomesd {version}"] = common.tomesd
    return variants


def runs(layout: Layout, pixels: int) -> dict[str, Counter[str]]:
    """How often each variant's step occurs in a whole run of 50 steps."""
    mixed = {"HiDiffusion": Counter(f"{name} + window" if name else "window" for name in schedule(layout, pixels))}
    if pixels > 8 * layout.config["sample_size"]:
        early = int((TIMESTEPS >= (1 - common.DEEP_SHRINK_SHARE) * common.TRAIN_TIMESTEPS).sum())
        mixed["deep shrink"] = Counter({"deep shrink": early, "plain": len(TIMESTEPS) - early})
    return mixed


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Time UNet steps on random weights, and keep each size as it is done."""
    layout = LAYOUTS[args.layout]
    gate(layout, args.device)
    unet = layout.build(args.device, getattr(torch, args.dtype), args.small)
    shapes_only = layout.build("meta", small=args.small)
    section = {
        **origin(args),
        "model": f"{layout.name} layout{' (small)' if args.small else ''}, random weights",
        "batch": args.batch,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "rows": [],
    }
    for pixels in args.sizes:
        variants = speed_variants(layout, pixels, args.every_regime)
        operations = {}
        for name, change in variants.items():
            with change(shapes_only):
                operations[name] = common.count_flops(layout.call(shapes_only, pixels, batch=args.batch))
        call = layout.call(unet, pixels, batch=args.batch)
        costs = common.in_turns(
            list(variants),
            args.repeats,
            lambda _: call(),  # noqa: B023
            args.device,
            f"{pixels} px",
            lambda name: variants[name](unet),  # noqa: B023
        )
        seconds = {name: median(cost.seconds for cost in costs[name]) for name in variants}
        rows = [
            {
                "pixels": pixels,
                "variant": name,
                "seconds": seconds[name],
                "fastest": min(cost.seconds for cost in costs[name]),
                "slowest": max(cost.seconds for cost in costs[name]),
                "peak_bytes": max(cost.peak_bytes for cost in costs[name]),
                "flops": operations[name],
            }
            for name in variants
        ]
        for name, steps in runs(layout, pixels).items():
            total = sum(steps.values())
            rows.append(
                {
                    "pixels": pixels,
                    "variant": f"{name}, mean of a run",
                    "seconds": sum(seconds[step] * count for step, count in steps.items()) / total,
                    "peak_bytes": max(row["peak_bytes"] for row in rows if row["variant"] in steps),
                    "flops": sum(operations[step] * count for step, count in steps.items()) / total,
                    "steps": dict(steps),
                }
            )
        for row in rows:
            row["speedup"] = seconds["plain"] / row["seconds"]
            row["flop_ratio"] = operations["plain"] / row["flops"]
        section["rows"] += rows
        common.write_section(args.output, "speed", section)
    return section


def speed_table(section: dict[str, Any]) -> str:
    """Medians, with the ratios of time and of operations side by side."""
    lines = [
        [
            str(row["pixels"]),
            row["variant"],
            f"{row['seconds']:.3f}",
            f"{row['fastest']:.3f} to {row['slowest']:.3f}" if "fastest" in row else "-",
            f"{row['speedup']:.2f}",
            f"{row['flop_ratio']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in section["rows"]
    ]
    head = ["px", "variant", "seconds", "range", "plain time / time", "plain FLOP / FLOP", "peak MiB"]
    return common.table(head, lines, left=2)


# ---- quality

QUALITY: dict[str, Change] = {
    "plain": plain,
    "RAU-Net": lambda pipe: da.using(pipe, da.HiDiffusion(window_attention=False)),
    "windows": lambda pipe: da.using(pipe, da.HiDiffusion(raunet=False)),
    "both": lambda pipe: da.using(pipe, da.HiDiffusion()),
    "LinFusion": lambda pipe: da.using(pipe, da.LinFusion.for_pipeline(pipe)),
    "RAU-Net + LinFusion": lambda pipe: da.using(
        pipe, da.LinFusion.for_pipeline(pipe), da.HiDiffusion(window_attention=False)
    ),
    "deep shrink": lambda pipe: common.deep_shrink(pipe.unet),
    "deep shrink by 4": lambda pipe: common.deep_shrink(pipe.unet, factor=4),
}
"""What is compared, each put in force on a pipeline."""


def is_compared(size: int, variant: str) -> bool:
    """At the native size only what is meant for it: the plain model, as what to live up to, and LinFusion."""
    return size >= (4 if variant == "deep shrink by 4" else 1 if variant in ("plain", "LinFusion") else 2)


# ---- page

INTRODUCTION = """\
# HiDiffusion in numbers

Written by `python -m benchmarks.report` from the JSON files beside this page; edit neither by hand. D is
the dilated downsampler and P the pooled block of RAU-Net; a window is a quarter of the token grid.
"""

SECTIONS = {
    "flops": Section(
        "Operations per UNet evaluation",
        "TFLOP, batch 1, multiply and add counted separately; matrix products, convolutions and attention as they are "
        "executed on the full-size layouts. D, P and D+P include window attention. The mean is over 50 steps of the "
        "method's own schedule. *Official* is the same count of the official code.",
        flops_table,
    ),
    "speed": Section(
        "Time and memory of one UNet step",
        "Median seconds of one evaluation, all variants of a size measured in turns in one run, behind a parity gate. "
        "Both ratios are plain over variant, so larger is better; the second is what operations alone would give. "
        "Peak memory is what a step needs above the weights. *Mean of a run* weighs the steps by the schedule of 50. "
        "*Deep shrink* is Kohya's method with a factor of 2 for the first 35 % of a run; *tomesd* is token merging by "
        "its authors' package, ratio 0.5.",
        speed_table,
    ),
    "quality": oracle.SECTION,
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hidiffusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True)
    on_device, kept = shared_arguments()
    commands.add_parser("flops", parents=[kept], help="operations per UNet evaluation")
    add = commands.add_parser("speed", parents=[on_device, kept], help="cost of one UNet step").add_argument
    add("--layout", choices=LAYOUTS, default="sd")
    add("--sizes", type=int, nargs="+", default=[512, 768, 1024], help="sides of square pictures, in pixels")
    add("--repeats", type=int, default=5)
    add("--batch", type=int, default=1)
    add("--every-regime", action="store_true", help="also those that the method's schedule does not use at a size")
    add("--small", action="store_true", help="a toy of the layout, to try the benchmark itself")
    oracle.add_quality(commands, [on_device, kept], QUALITY, [1, 2, 4])
    return finish(parser.parse_args(argv), NAME, argv)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand, print its table and keep its section."""
    args = parse(sys.argv[1:] if argv is None else argv)
    commands = {
        "flops": flops,
        "speed": speed,
        "quality": partial(oracle.quality, variants=QUALITY, applies=is_compared),
    }
    run(args, SECTIONS, commands)


if __name__ == "__main__":
    main()
