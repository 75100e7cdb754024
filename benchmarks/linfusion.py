"""LinFusion in numbers: the op over tokens, steps of full-size UNets, and what an oracle reads from the pictures.

    python -m benchmarks.linfusion op         # against softmax and the published formulation, with the memory floor
    python -m benchmarks.linfusion step       # seconds and peak memory of one UNet step, and where the crossover is
    python -m benchmarks.linfusion quality    # the oracle's table on the embedded model; resumes where it stopped

Run from the repository root. They print a table and keep it as a section of the JSON file ``--output``;
``python -m benchmarks.report`` makes the page of it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import diffusion_attn as da
from benchmarks import common, oracle
from benchmarks.common import LAYOUTS
from benchmarks.pages import Section, finish, origin, run, shared_arguments

NAME = "linfusion"
MID_DIMS = {"sd": None, "sdxl": lambda width: width // 16}
"""The widths inside the projections of the published weights."""

# ---- the op


def published(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The formula as the published layer evaluates it: whole tensors, one operation after the other."""
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    scale = k.shape[2] ** -0.5
    normaliser = phi_q @ phi_k.mean(dim=2, keepdim=True).transpose(-1, -2) + 1e-4
    state = (phi_k * scale).transpose(-1, -2) @ (v * scale)
    return phi_q @ state / normaliser


OPS: dict[str, Callable[..., torch.Tensor]] = {
    "softmax (SDPA)": F.scaled_dot_product_attention,
    "published formulation": published,
    "linear_attention": da.ops.linear_attention,
}


def op_inputs(args: argparse.Namespace, tokens: int) -> list[torch.Tensor]:
    """q, k, v as projections leave them, views ``(batch, heads, tokens, head_dim)`` of ``(batch, tokens, width)``."""
    shape = (args.batch, tokens, args.heads, args.head_dim)
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    return [torch.randn(shape, **like).transpose(1, 2) for _ in range(3)]


def op(args: argparse.Namespace) -> dict[str, Any]:
    """Time the three over token counts, in turns; softmax only as far as ``--softmax-until``."""
    gate(args)
    rows = []
    for tokens in args.tokens:
        q, k, v = op_inputs(args, tokens)
        names = [name for name in OPS if name != "softmax (SDPA)" or tokens <= args.softmax_until]
        costs = common.in_turns(names, args.repeats, lambda name: OPS[name](q, k, v), args.device, f"{tokens} tokens")  # noqa: B023
        seconds = {name: median(cost.seconds for cost in costs[name]) for name in names}
        for name in names:
            rows.append(
                {
                    "tokens": tokens,
                    "op": name,
                    "seconds": seconds[name],
                    "against_published": seconds["published formulation"] / seconds[name],
                    "peak_bytes": max(cost.peak_bytes for cost in costs[name]),
                    "floor_bytes": 4 * q.numel() * q.element_size(),
                    "flops": operations(name, tokens, args),
                }
            )
    settings = {name: getattr(args, name) for name in ("batch", "heads", "head_dim", "dtype", "repeats")}
    return {**origin(args), "settings": settings, "rows": rows, "exponents": exponents(rows)}


def gate(args: argparse.Namespace) -> None:
    """What has to hold before a time is worth anything.

    Raises:
        SystemExit: the op is not the published formula.
    """
    q, k, v = op_inputs(args, 1100)
    exact = published(*(x.double() for x in (q, k, v)))
    off = (da.ops.linear_attention(q, k, v).double() - exact).abs().max() / exact.abs().max()
    if off > 1e-5 + 2 * torch.finfo(q.dtype).eps:
        raise SystemExit("parity gate failed: linear_attention is not the published formula. No times are measured.")
    print("parity gate passed")


def operations(name: str, tokens: int, args: argparse.Namespace) -> int:
    """Operations of an op, multiply and add counted separately: two matrix products, and the normaliser's."""
    heads, dim = args.batch * args.heads, args.head_dim
    if name == "softmax (SDPA)":
        return 4 * heads * tokens * tokens * dim
    return 4 * heads * tokens * dim * dim + 2 * heads * tokens * dim


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How time grows with tokens: the slope between the two largest counts that are at least a factor of four apart."""
    found = {}
    for name in OPS:
        times = {row["tokens"]: row["seconds"] for row in rows if row["op"] == name}
        largest = max(times, default=0)
        smaller = [tokens for tokens in times if tokens * 4 <= largest]
        if smaller:
            start = max(smaller)
            found[name] = math.log(times[largest] / times[start]) / math.log(largest / start)
    return found


def op_table(section: dict[str, Any]) -> str:
    """Medians next to operations and the memory floor, and how time grows."""
    lines = [
        [
            str(row["tokens"]),
            row["op"],
            f"{1e3 * row['seconds']:.2f}",
            f"{row['against_published']:.2f}",
            f"{row['flops'] / row['seconds'] / 1e9:.1f}",
            f"{row['floor_bytes'] / row['seconds'] / 1e9:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['floor_bytes'] / 2**20:.0f}",
        ]
        for row in section["rows"]
    ]
    head = ["tokens", "op", "ms", "published / time", "GFLOP/s", "GB/s of q, k, v, out", "peak MiB above inputs"]
    grown = ", ".join(f"{name} {exponent:.2f}" for name, exponent in section["exponents"].items())
    text = f"Time grows with tokens to the power of: {grown}." if grown else ""
    return common.table([*head, "q, k, v, out MiB"], lines, left=2) + f"\n\n{text}"


# ---- a UNet step


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Time UNet steps on random weights, plain and with LinFusion, and keep each size as it is done."""
    layout = LAYOUTS[args.layout]
    unet = layout.build(args.device, getattr(torch, args.dtype), args.small)
    shapes_only = layout.build("meta", small=args.small)
    methods = {x: da.LinFusion.for_model(x, MID_DIMS[args.layout]) for x in (unet, shapes_only)}
    section = {
        **origin(args),
        "model": f"{layout.name} layout{' (small)' if args.small else ''}, random weights",
        "batch": args.batch,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "rows": [],
    }

    def change(name: str, model: Any) -> AbstractContextManager:
        """What the variant is, on the UNet or on its shapes."""
        return nullcontext() if name == "plain" else da.using(model, methods[model])

    for width, height in args.sizes:
        call = layout.call(unet, (width, height), batch=args.batch)
        count = layout.call(shapes_only, (width, height), batch=args.batch)

        names = ["plain", "LinFusion"]
        what = f"{width} x {height}"
        costs = common.in_turns(names, args.repeats, lambda _: call(), args.device, what, partial(change, model=unet))  # noqa: B023
        for name in names:
            with change(name, shapes_only):
                flops = common.count_flops(count)
            section["rows"].append(
                {
                    "width": width,
                    "height": height,
                    "variant": name,
                    "seconds": median(cost.seconds for cost in costs[name]),
                    "peak_bytes": max(cost.peak_bytes for cost in costs[name]),
                    "flops": flops,
                }
            )
        common.write_section(args.output, "step", section)
    return section


def step_table(section: dict[str, Any]) -> str:
    """Plain and LinFusion side by side, with the ratio that operations alone would give."""
    lines = []
    rows = section["rows"]
    for plain, linear in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            [
                f"{plain['width']} x {plain['height']}",
                *(f"{row['seconds']:.3f}" for row in (plain, linear)),
                f"{plain['seconds'] / linear['seconds']:.2f}",
                f"{plain['flops'] / linear['flops']:.2f}",
                *(f"{row['peak_bytes'] / 2**20:.0f}" for row in (plain, linear)),
            ]
        )
    head = ["px", "plain s", "LinFusion s", "plain / LinFusion", "plain FLOP / FLOP", "plain MiB", "LinFusion MiB"]
    ahead = ", ".join(line[0] for line in lines if float(line[3]) > 1)
    crossover = f"LinFusion is the faster one at: {ahead or 'none of these sizes'}."
    return common.table(head, lines) + f"\n\n{crossover}"


# ---- quality

QUALITY: oracle.Variants = {
    "plain": lambda pipe: nullcontext(),
    "LinFusion, not distilled": lambda pipe: da.using(pipe, da.LinFusion.for_model(pipe.unet)),
    "LinFusion": lambda pipe: da.using(pipe, da.LinFusion.for_pipeline(pipe)),
}

# ---- page

INTRODUCTION = """\
# LinFusion in numbers

Written by `python -m benchmarks.report` from the JSON files beside this page; edit neither by hand.
"""

SECTIONS = {
    "op": Section(
        "The op",
        "Median milliseconds, all ops of a token count measured in turns in one run, behind a parity gate. *Published "
        "formulation* is the same formula as the published layer evaluates it. The floor in memory is q, k, v read "
        "once and the output written once; *peak* is what an op needs above its inputs, output included.",
        op_table,
    ),
    "step": Section(
        "Time and memory of one UNet step",
        "Median seconds of one evaluation, plain and LinFusion in turns in one run; the last ratio of FLOP is what "
        "operations alone would give. Peak memory is what a step needs above the weights.",
        step_table,
    ),
    "quality": oracle.SECTION,
}


def pixels(text: str) -> tuple[int, int]:
    """``"512"`` or ``"512x1024"`` as ``(width, height)``."""
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linfusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True)
    on_device, kept = shared_arguments()
    add = commands.add_parser("op", parents=[on_device, kept], help="cost of the op").add_argument
    add("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    add("--softmax-until", type=int, default=16384, help="most tokens to run softmax attention on")
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=10)
    add("--head-dim", type=int, default=64)
    add("--repeats", type=int, default=5)
    add = commands.add_parser("step", parents=[on_device, kept], help="cost of one UNet step").add_argument
    add("--layout", choices=LAYOUTS, default="sd")
    add("--sizes", type=pixels, nargs="+", default=[(512, 512), (1024, 1024)], metavar="N|WxH", help="in pixels")
    add("--batch", type=int, default=1)
    add("--repeats", type=int, default=3)
    add("--small", action="store_true", help="a toy of the layout, to try the benchmark itself")
    oracle.add_quality(commands, [on_device, kept], QUALITY, [1])
    return finish(parser.parse_args(argv), NAME, argv)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand, print its table and keep its section."""
    args = parse(sys.argv[1:] if argv is None else argv)
    commands = {"op": op, "step": step, "quality": partial(oracle.quality, variants=QUALITY)}
    run(args, SECTIONS, commands)


if __name__ == "__main__":
    main()
