"""Agent attention and token merging in numbers: operations, one layer, one UNet step, and what an oracle reads.

    python -m benchmarks.agent flops      # per UNet and per layer, next to the official code's
    python -m benchmarks.agent layer      # one self-attention and its matching, ours and the package tomesd's
    python -m benchmarks.agent step       # one UNet step of full-size layouts; resumes where it stopped
    python -m benchmarks.agent quality    # the oracle's table on the embedded model; resumes where it stopped

Run from the repository root. They print a table and keep it as a section of the JSON file ``--output``;
``python -m benchmarks.report`` makes the page of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

import diffusion_attn as da
from benchmarks import common, oracle
from benchmarks.common import LAYOUTS, TIMESTEPS
from benchmarks.pages import Section, finish, keep, origin, resume, run, shared_arguments
from diffusion_attn.methods.agent.setting import Setting
from diffusion_attn.ops.match_tokens import TokenMatch, match_tokens

NAME = "agent"
RATIO = 0.4
Change = Callable[[Any], AbstractContextManager]

METHODS: dict[str, Change] = {
    "plain": lambda unet: nullcontext(),
    "TokenMerging 0.4": lambda unet: da.using(unet, da.TokenMerging(RATIO), timesteps=TIMESTEPS),
    "AgentAttention, early": lambda unet: da.using(unet, da.AgentAttention(switch=1.0), timesteps=TIMESTEPS),
    "AgentAttention, late": lambda unet: da.using(unet, da.AgentAttention(switch=0.0), timesteps=TIMESTEPS),
}
"""What is in force on a UNet."""

OURS = list(METHODS)[1:]
EARLY, LATE = da.AgentAttention().phases().values()

# ---- operations

OFFICIAL = {
    512: {"UNet": 803, "full": 21.5, "merged": 7.7, "merged matching": 2.0, "agents": 1.6, "agents matching": 0.6},
    768: {"UNet": 2148, "full": 108.7, "merged": 39.1, "merged matching": 10.2, "agents": 8.2, "agents matching": 3.2},
    1024: {
        "UNet": 4674,
        "full": 343.6,
        "merged": 123.7,
        "merged matching": 32.2,
        "agents": 25.8,
        "agents matching": 10.1,
    },
}
"""GFLOP of SD 1.5 by the official code: of the UNet, and per self-attention of the finest level."""

TOLERANCE = 0.02


def flops(args: argparse.Namespace) -> dict[str, Any]:
    """Count operations on the meta device, where only shapes exist.

    Raises:
        SystemExit: a number is further from the official code's than rounding and 2 % explain.
    """
    common.check_counter()
    layout, rows = LAYOUTS["sd"], []
    unet = layout.build("meta")
    for pixels, official in OFFICIAL.items():
        side = pixels // 8
        totals = {}
        for name, change in METHODS.items():
            with change(unet):
                totals[name] = common.count_flops(layout.call(unet, pixels)) / 1e9
        counted = {"UNet": totals["plain"], **layer_flops(side)}
        deviation = {name: counted[name] / official[name] - 1 for name in official}
        rows.append(
            {"pixels": pixels, "counted": counted, "official": official, "deviation": deviation, "unet": totals}
        )
    section = {**origin(args), "rows": rows}
    # The official numbers are given to a tenth.
    off = max(
        abs(row["counted"][name] - value) - 0.05 - TOLERANCE * value
        for row in rows
        for name, value in row["official"].items()
    )
    if off > 0:
        print(flops_table(section))
        raise SystemExit(f"a number is further off the official code's than {TOLERANCE:.0%}; nothing is kept.")
    return section


def layer_flops(side: int) -> dict[str, float]:
    """GFLOP of one self-attention of SD 1.5's finest level, and of its matching."""
    grid, tokens = (side, side), side * side
    metric = torch.empty(1, tokens, 320, device="meta")

    def heads(count: int) -> torch.Tensor:
        return torch.empty(1, 8, count, 40, device="meta")

    def count(call: Callable[[], Any]) -> float:
        return common.count_flops(call) / 1e9

    full, merged = heads(tokens), heads(tokens - LATE.counts(grid).merge)
    early = EARLY.counts(grid)
    agents = heads(tokens - (early.fewer or 0))
    return {
        "full": count(lambda: F.scaled_dot_product_attention(full, full, full)),
        "merged": count(lambda: F.scaled_dot_product_attention(merged, merged, merged)),
        "merged matching": count(lambda: match(metric, grid, LATE)),
        "agents": count(lambda: da.ops.agent_attention(merged, merged, merged, agents)),
        "agents matching": count(lambda: match(metric, grid, EARLY)),
    }


def match(metric: torch.Tensor, grid: tuple[int, int], setting: Setting) -> TokenMatch:
    """The matching of one layer."""
    counts = setting.counts(grid)
    return match_tokens(metric, grid=grid, stride=setting.stride, merge=counts.merge, agents=counts.fewer)


def flops_table(section: dict[str, Any]) -> str:
    """Per layer against the official code's numbers, then whole UNets."""
    names = list(OFFICIAL[512])
    styles = {"counted": "{:.1f}", "official": "{:g}", "deviation": "{:+.1%}"}
    lines = [
        [str(row["pixels"]), kind, *(style.format(row[kind][name]) for name in names)]
        for row in section["rows"]
        for kind, style in styles.items()
    ]
    unets = [
        [str(row["pixels"]), *(f"{row['unet'][name]:.0f}" for name in METHODS)]
        + [f"{row['unet']['plain'] / row['unet'][name]:.2f}" for name in OURS]
        for row in section["rows"]
    ]
    ratios = [f"plain / {name}" for name in OURS]
    return "\n\n".join(
        [
            common.table(["px", "GFLOP", *names], lines, left=2),
            common.table(["px, UNet GFLOP", *METHODS, *ratios], unets),
        ]
    )


# ---- one layer


def layer(args: argparse.Namespace) -> dict[str, Any]:
    """Time the parts of one self-attention: everything that merging adds, and what it saves."""
    gate(args)
    rows = []
    for side in args.sides:
        calls = layer_calls(args, side)
        costs = common.in_turns(
            list(calls),
            args.repeats,
            lambda name: calls[name](),  # noqa: B023
            args.device,
            f"{side} x {side}",
            own_time=args.own_time,
        )
        seconds = {name: median(cost.seconds for cost in costs[name]) for name in calls}
        rows.append({"side": side, "seconds": seconds})
    settings = {name: getattr(args, name) for name in ("batch", "heads", "head_dim", "dtype", "repeats", "own_time")}
    return {**origin(args), "settings": settings, "rows": rows}


def layer_calls(args: argparse.Namespace, side: int) -> dict[str, Callable[[], Any]]:
    """The parts by name."""
    grid, tokens, width = (side, side), side * side, args.heads * args.head_dim
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden = torch.randn(args.batch, tokens, width, **like)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(args.batch, count, args.heads, args.head_dim, **like).transpose(1, 2)

    early, late = match(hidden, grid, EARLY), match(hidden, grid, LATE)
    full, merged, agents = heads(tokens), heads(late.merged_tokens), heads(early.agent_tokens)
    attend = F.scaled_dot_product_attention
    calls: dict[str, Callable[[], Any]] = {
        "full attention": lambda: attend(full, full, full),
        "merged attention": lambda: attend(merged, merged, merged),
        "agent attention": lambda: da.ops.agent_attention(merged, merged, merged, agents, shortcut=0.075),
        "matching, late": lambda: match(hidden, grid, LATE),
        "matching, early": lambda: match(hidden, grid, EARLY),
        "merge and unmerge": lambda: late.unmerge(late.merge(hidden)),
    }
    if common.tomesd_version():
        from tomesd.merge import bipartite_soft_matching_random2d as theirs

        generator = torch.Generator(args.device).manual_seed(0)
        matched = partial(theirs, hidden, side, side, 2, 2, int(RATIO * tokens), False, generator)
        merge, unmerge = matched()
        calls["tomesd: matching"] = matched
        calls["tomesd: merge and unmerge"] = lambda: unmerge(merge(hidden))
    return calls


def gate(args: argparse.Namespace) -> None:
    """What has to hold before a time is worth anything: tomesd's own UNet is ours, draw for draw.

    Raises:
        SystemExit: it is not.
    """
    if not common.tomesd_version():
        print("tomesd is not installed: no alternative is measured (pip install tomesd)")
        return
    layout = LAYOUTS["sd"]
    unet = layout.build(args.device, small=True)
    call = layout.call(unet, 128, batch=2)
    with torch.no_grad():
        torch.manual_seed(3)
        with common.tomesd(unet, RATIO):
            theirs = call()
        with da.using(unet, da.TokenMerging(RATIO, rng="reference", seed=3), timesteps=TIMESTEPS):
            ours = call()
    if not torch.allclose(ours, theirs, atol=1e-4):
        raise SystemExit("parity gate failed: tomesd and TokenMerging give different UNets. No times are measured.")
    print("parity gate passed: TokenMerging is tomesd")


def layer_table(section: dict[str, Any]) -> str:
    """Milliseconds of the parts, grid by grid, and what a layer comes to in all."""
    names = list(section["rows"][0]["seconds"])
    lines = [[name, *(f"{1e3 * row['seconds'][name]:.1f}" for row in section["rows"])] for name in names]
    sums = {
        "**full attention, against**": ["full attention"],
        "**merged, all in all**": ["merged attention", "matching, late", "merge and unmerge"],
        "**agents, all in all**": ["agent attention", "matching, early", "merge and unmerge"],
    }
    if "tomesd: matching" in names:
        sums["**tomesd, all in all**"] = ["merged attention", "tomesd: matching", "tomesd: merge and unmerge"]
    for title, parts in sums.items():
        totals = [sum(row["seconds"][part] for part in parts) for row in section["rows"]]
        against = [row["seconds"]["full attention"] for row in section["rows"]]
        lines.append([title, *(f"{1e3 * t:.1f} ({f / t:.2f}x)" for t, f in zip(totals, against, strict=True))])
    return common.table(["ms", *(f"{row['side']} x {row['side']} tokens" for row in section["rows"])], lines)


# ---- one step


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Time UNet steps on random weights, case by case; what an earlier run with the same settings finished is kept."""
    gate(args)
    settings = {name: getattr(args, name) for name in ("batch", "dtype", "repeats", "own_time", "small")}
    section = resume(args, settings)
    variants = dict(METHODS)
    if version := common.tomesd_version():
        variants[f"tomesd {version}"] = partial(common.tomesd, ratio=RATIO)
    for family, pixels in args.cases:
        if any((row["layout"], row["pixels"]) == (family, pixels) for row in section["rows"]):
            continue
        layout = LAYOUTS[family]
        unet = layout.build(args.device, getattr(torch, args.dtype), args.small)
        shapes_only = layout.build("meta", small=args.small)
        call = layout.call(unet, pixels, batch=args.batch)
        count = layout.call(shapes_only, pixels, batch=args.batch)
        costs = common.in_turns(
            list(variants),
            args.repeats,
            lambda _: call(),  # noqa: B023
            args.device,
            f"{layout.name}, {pixels} px",
            lambda name: variants[name](unet),  # noqa: B023
            args.own_time,
        )
        rows = []
        for name, change in variants.items():
            with change(shapes_only):
                operations = common.count_flops(count)
            rows.append(
                {
                    "layout": family,
                    "pixels": pixels,
                    "variant": name,
                    "seconds": median(cost.seconds for cost in costs[name]),
                    "fastest": min(cost.seconds for cost in costs[name]),
                    "slowest": max(cost.seconds for cost in costs[name]),
                    "peak_bytes": max(cost.peak_bytes for cost in costs[name]),
                    "flops": operations,
                    "matching": matching_time(unet, call, change, args.device) if name in OURS else None,
                }
            )
        section = keep(args, rows, lambda row: (row["layout"], row["pixels"]))
    return section


def matching_time(unet: nn.Module, call: Callable[[], Any], change: Change, device: str) -> float:
    """Seconds that the matchings of one step take: between two hooks, around the one that makes them."""
    moments: list[float] = []

    def now(module: nn.Module, args: tuple) -> None:
        """Remember the time."""
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        moments.append(time.thread_time() if device == "cpu" else time.perf_counter())

    with torch.no_grad(), change(unet):
        blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
        handles = [block.register_forward_pre_hook(now, prepend=first) for block in blocks for first in (True, False)]
        call()
    for handle in handles:
        handle.remove()
    return sum(moments[1::2]) - sum(moments[::2])


def step_table(section: dict[str, Any]) -> str:
    """Medians, with the ratios of time and of operations side by side."""
    lines = []
    for row in section["rows"]:
        plain = next(
            other
            for other in section["rows"]
            if (other["layout"], other["pixels"], other["variant"]) == (row["layout"], row["pixels"], "plain")
        )
        matching = row["matching"]
        lines.append(
            [
                f"{LAYOUTS[row['layout']].name}, {row['pixels']} px",
                row["variant"],
                f"{row['seconds']:.3f}",
                f"{row['fastest']:.3f} to {row['slowest']:.3f}",
                f"{plain['seconds'] / row['seconds']:.2f}",
                f"{plain['flops'] / row['flops']:.2f}",
                "-" if matching is None else f"{matching:.3f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
            ]
        )
    head = [
        "UNet",
        "variant",
        "seconds",
        "range",
        "plain / variant",
        "plain FLOP / FLOP",
        "of it matching s",
        "peak MiB",
    ]
    return common.table(head, lines, left=2)


# ---- quality


def merging(**options: Any) -> Change:
    """Token merging on a pipeline."""
    return lambda pipe: da.using(pipe, da.TokenMerging(RATIO, **options))


def agents(**options: Any) -> Change:
    """Agent attention on a pipeline."""
    return lambda pipe: da.using(pipe, da.AgentAttention(**options))


def raunet(pipe: Any) -> AbstractContextManager:
    """HiDiffusion without its windows, beside agents."""
    return da.using(pipe, da.HiDiffusion(window_attention=False), da.AgentAttention())


QUALITY: oracle.Variants = {
    "plain": lambda pipe: nullcontext(),
    "TokenMerging 0.4": merging(),
    "AgentAttention 0.4": agents(),
    "AgentAttention 0.4, agents at every step": agents(switch=1.0),
    "HiDiffusion's RAU-Net": lambda pipe: da.using(pipe, da.HiDiffusion(window_attention=False)),
    "RAU-Net + AgentAttention 0.4": raunet,
}


def applies(size: int, variant: str) -> bool:
    """RAU-Net is off at the native size."""
    return size > 1 or "RAU-Net" not in variant


# ---- page

INTRODUCTION = """\
# Agent attention and token merging in numbers

Written by `python -m benchmarks.report` from the JSON files beside this page; edit neither by hand.
"""

SECTIONS = {
    "flops": Section(
        "Operations",
        "GFLOP of one evaluation of SD 1.5's UNet at batch 1, and of one self-attention of its finest level: on all "
        "tokens, on merged ones, through agents, with the matching that each needs. *Official*: counted in the "
        "official code, which is given to a tenth. The ratios are what operations alone would give.",
        flops_table,
    ),
    "layer": Section(
        "One layer",
        "Median milliseconds of the parts of one self-attention on merged tokens (ratio 0.4), all measured in turns in "
        "one run, behind a parity gate: a UNet patched by the package `tomesd` equals ours draw for draw.",
        layer_table,
    ),
    "step": Section(
        "One UNet step",
        "Median seconds of one evaluation with random weights, all variants of a row in turns in one run, against the "
        "plain UNet with fused attention and against `tomesd` at the same ratio. *Of it matching*: what the matchings "
        "take, in a step of their own. Peak memory is what a step needs above the weights.",
        step_table,
    ),
    "quality": oracle.SECTION,
}


def case(text: str) -> tuple[str, int]:
    """``"sd:512"`` as ``("sd", 512)``."""
    family, _, pixels = text.partition(":")
    if family not in LAYOUTS or not pixels.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a layout and pixels, such as sd:512.")
    return family, int(pixels)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agent",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True)
    on_device, kept = shared_arguments()
    commands.add_parser("flops", parents=[kept], help="operations")
    timed = argparse.ArgumentParser(add_help=False)
    add = timed.add_argument
    add("--batch", type=int, default=2, help="2: both branches of guidance")
    add("--repeats", type=int, default=3)
    add("--own-time", action="store_true", help="count only while the one thread runs, where other work goes on")
    add = commands.add_parser("layer", parents=[on_device, kept, timed], help="cost of one layer").add_argument
    add("--sides", type=int, nargs="+", default=[64, 96, 128], help="of the token grid")
    add("--heads", type=int, default=8)
    add("--head-dim", type=int, default=40)
    add = commands.add_parser("step", parents=[on_device, kept, timed], help="cost of one UNet step").add_argument
    add("--cases", type=case, nargs="+", default=[("sd", 512), ("sd", 1024), ("sdxl", 1024)], metavar="LAYOUT:PX")
    add("--small", action="store_true", help="a toy of the layout, to try the benchmark itself")
    add("--restart", action="store_true", help="drop the rows that are there")
    oracle.add_quality(commands, [on_device, kept], QUALITY, [1, 2])
    return finish(parser.parse_args(argv), NAME, argv)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand, print its table and keep its section."""
    args = parse(sys.argv[1:] if argv is None else argv)
    quality = partial(oracle.quality, variants=QUALITY, applies=applies)
    run(args, SECTIONS, {"flops": flops, "layer": layer, "step": step, "quality": quality})


if __name__ == "__main__":
    main()
