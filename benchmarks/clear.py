"""CLEAR in numbers: the work of local attention, its cost, steps of FLUX's layout, and what an oracle reads.

    python -m benchmarks.clear audit      # blocks and pairs that are visited, next to counts made without this code
    python -m benchmarks.clear op         # one attention call against full, masked and published forms; resumes
    python -m benchmarks.clear step       # one forward pass of FLUX's width on few layers
    python -m benchmarks.clear quality    # the oracle's table on the embedded model; resumes where it stopped

Run from the repository root. They print a table and keep it as a section of the JSON file ``--output``;
``python -m benchmarks.report`` makes the page of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxImg2ImgPipeline, FluxTransformer2DModel
from torch import nn
from tqdm import tqdm

import diffusion_attn as da
from benchmarks import common, oracle
from benchmarks.local_work import (
    BLOCK,
    DENSE,
    FLEX,
    FULL,
    RASTER,
    SORTED,
    TILES,
    VARIANTS,
    Case,
    blocks_per_query,
    dense_mask,
    disc_pairs,
    ideal_pairs,
    raster_blocks,
    raster_mask,
    visited_pairs,
)
from benchmarks.pages import Section, finish, keep, origin, resume, run, shared_arguments
from diffusion_attn.ops.local_attention import choose_backend
from diffusion_attn.ops.local_rule import tile_order

NAME = "clear"
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"dtype": "float32", "heads": 4, "head_dim": 64, "grids": [64, 96, 128], "sizes": [1024]},
    "cuda": {
        "dtype": "bfloat16",
        "heads": 24,
        "head_dim": 128,
        "grids": [64, 96, 128, 256, 512],
        "sizes": [1024, 2048, 4096],
    },
}
"""What is measured where nothing else is asked for."""

# ---- audit

COUNTED = {
    (64, 8): ((8.38, 6.18, 2.31), (6.88, 5.08, 2.03)),
    (64, 16): ((14.75, 2.98, 2.10), (10.62, 2.15, 1.63)),
    (64, 32): ((24.50, 1.59, 1.47), (22.75, 1.48, 1.38)),
    (128, 8): ((14.56, 10.18, 3.42), (7.91, 5.53, 2.19)),
    (128, 16): ((29.12, 5.24, 3.47), (12.72, 2.29, 1.75)),
    (128, 32): ((55.25, 2.77, 2.47), (32.94, 1.65, 1.54)),
    (256, 8): ((29.56, 20.13, 6.14), (8.45, 5.75, 2.28)),
    (256, 16): ((60.12, 10.24, 6.50), (13.84, 2.36, 1.81)),
    (256, 32): ((118.25, 5.27, 4.62), (38.73, 1.73, 1.62)),
    (512, 8): ((37.23, 25.01, 7.51), (8.72, 5.86, 2.32)),
    (512, 16): ((76.33, 12.65, 8.01), (14.41, 2.39, 1.84)),
    (512, 32): ((152.66, 6.43, 5.65), (41.81, 1.76, 1.65)),
}
"""By (side, radius) what was counted once without this code: of raster order, then of tiles of 8 x 16, the key blocks
for a block of queries, computed pairs over the disc's, and the same with 512 tokens of text on both sides."""

ROUNDING = 0.0051
"""How far a number may be from one that is given with two digits."""


def audit(args: argparse.Namespace) -> dict[str, Any]:
    """Count what both layouts visit.

    Raises:
        SystemExit: a number is not what was counted before.
    """
    rows = [audit_row(side, radius) for side, radius in tqdm(COUNTED, desc="audit") if side in args.grids]
    section = {**origin(args), "rows": rows}
    worst = max((torch.tensor(row["visited"]) - torch.tensor(row["counted"])).abs().max().item() for row in rows)
    if worst > ROUNDING:
        print(audit_table(section))
        raise SystemExit(f"a number is {worst:.3f} off what was counted before; nothing is kept.")
    return section


def audit_row(side: int, radius: int) -> dict[str, Any]:
    """One grid and radius: blocks for a block of queries and what they hold over what the disc does, of each layout."""
    case = Case((side, side), radius, text=0)
    ideal = disc_pairs(case.disc) / case.tokens
    visited = []
    for blocks in (raster_blocks(case)[0].sum(1).tolist(), blocks_per_query(case.disc)):
        mean = sum(blocks) / len(blocks)
        visited.append([mean, mean * BLOCK / ideal, (mean * BLOCK + 512) / (ideal + 512)])
    counted = [list(numbers) for numbers in COUNTED[side, radius]]
    return {"side": side, "radius": radius, "ideal": ideal, "visited": visited, "counted": counted}


def audit_table(section: dict[str, Any]) -> str:
    """Both layouts, each beside what was counted before."""
    lines = [
        [
            f"{row['side']} x {row['side']}",
            str(row["radius"]),
            f"{row['ideal']:.1f}",
            *(
                " / ".join(f"{number:.2f}" for number in row[of][layout])
                for layout in (0, 1)
                for of in ("visited", "counted")
            ),
        ]
        for row in section["rows"]
    ]
    head = ["grid", "radius", "disc", "raster blocks", "as counted before", "our blocks", "as counted before"]
    return common.table(head, lines)


# ---- the op


@cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    """FlexAttention as the published code calls it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def op_inputs(args: argparse.Namespace, case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """q, k, v, and a pooled key and value, of which there may be none."""
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    counts = [*[case.length] * 3, *[case.pooled] * 2]
    tensors = [torch.randn(1, args.heads, count, args.head_dim, **like) for count in counts]
    return tensors[:3], tensors[3:]


def sorted_positions(case: Case, device: str) -> torch.Tensor:
    """The order in which `Clear` brings tokens before the first layer: text, and the image tile after tile."""
    return torch.cat([torch.arange(case.text, device=device), case.text + tile_order(case.grid, device)])


def op_calls(
    case: Case, inputs: list[torch.Tensor], pooled: list[torch.Tensor], names: Collection[str]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Variants, ready to run; what they hold from call to call in a model is made here."""
    q, k, v = inputs
    device = q.device
    extra = dict(zip(("pooled_key", "pooled_value"), pooled, strict=True)) if case.pooled else {}
    ours = partial(da.ops.local_attention, grid=case.grid, radius=case.radius, text_tokens=case.text, **extra)

    def keys_and_values() -> list[torch.Tensor]:
        """With what is pooled after the image."""
        return [torch.cat(pair, dim=2) for pair in zip((k, v), pooled, strict=True)] if case.pooled else [k, v]

    def dense() -> Callable[[], torch.Tensor]:
        """Under a mask that is added to the scores: a bool one is slower on a CPU."""
        mask = torch.zeros(1, dtype=q.dtype, device=device).masked_fill(~dense_mask(case, device), -torch.inf)
        return lambda: F.scaled_dot_product_attention(q, *keys_and_values(), attn_mask=mask)

    def raster() -> Callable[[], torch.Tensor]:
        """As the published code calls it."""
        blocks = raster_mask(case, device)
        return lambda: compiled_flex()(q, *keys_and_values(), block_mask=blocks)

    def sorted_once() -> Callable[[], torch.Tensor]:
        """As `Clear` calls it."""
        arranged = [x[:, :, sorted_positions(case, device)] for x in inputs]
        return partial(ours, *arranged, backend="flex", tiled=True)

    make = {
        FULL: lambda: partial(F.scaled_dot_product_attention, q, k, v),
        DENSE: dense,
        RASTER: raster,
        TILES: lambda: partial(ours, q, k, v, backend="tiles"),
        FLEX: lambda: partial(ours, q, k, v, backend="flex"),
        SORTED: sorted_once,
    }
    return {name: make[name]() for name in VARIANTS if name in names}


def gate(args: argparse.Namespace) -> None:
    """What has to hold before a time is worth anything.

    Raises:
        SystemExit: a variant is not the rule.
    """
    case = Case((20, 36), 8, args.text, args.down_factor)
    inputs, pooled = op_inputs(args, case)
    q, k, v = (x.double() for x in inputs)
    if case.pooled:
        k, v = (torch.cat([x, more.double()], dim=2) for x, more in zip((k, v), pooled, strict=True))
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(case, q.device))
    failed = []
    for name, call in op_calls(case, inputs, pooled, args.variants).items():
        expected = exact[:, :, sorted_positions(case, q.device)] if name == SORTED else exact
        off = (call().double() - expected).abs().max() / exact.abs().max()
        if not off <= 1e-5 + 2 * torch.finfo(inputs[0].dtype).eps:
            failed.append(name)
    if failed:
        raise SystemExit(f"parity gate failed, this is not the rule: {'; '.join(failed)}. No times are measured.")
    print("parity gate passed")


def op(args: argparse.Namespace) -> dict[str, Any]:
    """Time the variants on each grid and radius, in turns; what an earlier run with the same settings did is kept."""
    settings = ("heads", "head_dim", "text", "down_factor", "dtype", "repeats", "own_time")
    with torch.no_grad():
        gate(args)
    section = resume(args, {name: getattr(args, name) for name in settings})
    for side in args.grids:
        torch.compiler.reset()  # what was compiled for other sizes counts against dynamo's limit
        names = {FULL, *args.variants} - ({DENSE} if side > args.dense_until else set())
        for radius in args.radii:
            if any((row["side"], row["radius"]) == (side, radius) for row in section["rows"]):
                continue
            case = Case((side, side), radius, args.text, args.down_factor)
            calls = op_calls(case, *op_inputs(args, case), names)
            costs = common.in_turns(
                list(calls),
                args.repeats,
                lambda name: calls[name](),  # noqa: B023
                args.device,
                f"{side} x {side}, radius {radius}",
                own_time=args.own_time,
            )
            seconds = {name: median(cost.seconds for cost in costs[name]) for name in calls}
            rows = [
                {
                    "side": side,
                    "radius": radius,
                    "variant": name,
                    "seconds": seconds[name],
                    "fastest": min(cost.seconds for cost in costs[name]),
                    "slowest": max(cost.seconds for cost in costs[name]),
                    "peak_bytes": max(cost.peak_bytes for cost in costs[name]),
                    "visited_pairs": visited_pairs(name, case),
                    "ideal_pairs": ideal_pairs(case),
                    # The rule's work at the rate of full attention, where no masked or gathered pair costs anything.
                    "limit_seconds": seconds[FULL] * ideal_pairs(case) / visited_pairs(FULL, case),
                    "against": {other: seconds[other] / seconds[name] for other in AGAINST if other in seconds},
                }
                for name in calls
            ]
            section = keep(args, rows, lambda row: (row["side"], row["radius"]))
    return section


AGAINST = {FULL: "full / time", DENSE: "dense / time", RASTER: "raster / time"}
"""What times are compared with, and the columns that tell it."""


def op_table(section: dict[str, Any]) -> str:
    """Medians, the ratios, and the work next to what the rule asks for; below, what is slower than full attention."""
    pair = 4 * section["settings"]["heads"] * section["settings"]["head_dim"]
    lines = [
        [
            f"{row['side']} x {row['side']}",
            str(row["radius"]),
            row["variant"],
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['fastest']:.1f} to {1e3 * row['slowest']:.1f}",
            *(f"{row['against'][name]:.2f}" if name in row["against"] else "-" for name in AGAINST),
            *(f"{row[name] / 1e6:.2f}" for name in ("visited_pairs", "ideal_pairs")),
            f"{pair * row['ideal_pairs'] / 1e9:.2f}",
            f"{pair * row['visited_pairs'] / row['seconds'] / 1e9:.1f}",
            f"{row['limit_seconds'] / row['seconds']:.0%}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in section["rows"]
    ]
    head = ["grid", "radius", "variant", "ms", "range", *AGAINST.values(), "visited, 10^6 pairs", "ideal, 10^6 pairs"]
    head += ["ideal GFLOP", "GFLOP/s", "limit / time", "peak MiB"]
    slow = [row for row in section["rows"] if row["variant"] in (TILES, FLEX, SORTED) and row["against"][FULL] < 1]
    names = "; ".join(f"{row['variant']}, {row['side']} x {row['side']}, radius {row['radius']}" for row in slow)
    return common.table(head, lines, left=3) + f"\n\nSlower than full attention: {names or 'none of ours'}."


# ---- a step

FLUX = {"num_attention_heads": 24, "guidance_embeds": True}
SMALL = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
STEPS: dict[str, tuple[int, int] | None] = {
    "plain": None,
    "radius 8": (8, 1),
    "radius 16": (16, 1),
    "radius 32": (32, 1),
    "radius 8, pooled by 4": (8, 4),
}
"""Radius and down factor of what is compared."""

PUBLISHED = {
    1024: {8: 63.49, 16: 86.65, 32: 154.11},
    2048: {8: 246.2, 16: 352.6, 32: 724.3},
    4096: {8: 979.3, 16: 1433.2, 32: 3141.7},
}
"""GFLOP of one attention layer of FLUX.1 with 512 tokens of text, by pixels and radius."""


def build(args: argparse.Namespace, device: str) -> nn.Module:
    """FLUX.1's transformer of few layers with random weights."""
    torch.manual_seed(0)
    layers = {"num_layers": args.double, "num_single_layers": args.single}
    with torch.device(device):
        transformer = FluxTransformer2DModel(**{**FLUX, **layers, **(SMALL if args.small else {})})
    dtype = getattr(torch, args.dtype)
    return transformer.eval() if dtype is torch.float32 else transformer.eval().to(dtype)


def forward(transformer: nn.Module, side: int, text: int) -> Callable[[], torch.Tensor]:
    """One evaluation on ``side`` x ``side`` image tokens."""
    config, like = transformer.config, next(transformer.parameters())

    def random(*shape: int) -> torch.Tensor:
        """Noise where and as the weights are."""
        return torch.randn(1, *shape, device=like.device, dtype=like.dtype)

    line = torch.arange(side, device=like.device)
    call = {
        "hidden_states": random(side * side, config.in_channels),
        "encoder_hidden_states": random(text, config.joint_attention_dim),
        "pooled_projections": random(config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=like.device, dtype=like.dtype),
        "guidance": torch.full((1,), 3.5, device=like.device, dtype=like.dtype),
        "img_ids": torch.cartesian_prod(line[:1], line, line).float(),
        "txt_ids": torch.zeros(text, 3, device=like.device),
    }
    return lambda: transformer(**call, return_dict=False)[0]


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Time forward passes on random weights, plain and with the rule, and keep each size as it is done."""
    common.check_counter()
    transformer, shapes_only = build(args, args.device), build(args, "meta")
    layers = args.double + args.single
    width = transformer.inner_dim
    section = {
        **origin(args),
        "model": f"FLUX.1 layout{' (small)' if args.small else ''}, {args.double} double and {args.single} single "
        f"blocks, random weights, {args.text} tokens of text",
        "batch": 1,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "rows": [],
    }
    backend = {"tiles": TILES, "flex": SORTED}[choose_backend(torch.empty(0, 128, device=args.device))]

    def change(name: str) -> AbstractContextManager:
        """What the variant is."""
        if STEPS[name] is None:
            return nullcontext()
        radius, factor = STEPS[name]
        return da.using(transformer, da.Clear(radius=radius, down_factor=factor))

    for pixels in args.sizes:
        side = pixels // 16
        call = forward(transformer, side, args.text)
        costs = common.in_turns(args.variants, args.repeats, lambda _: call(), args.device, f"{pixels} px", change)  # noqa: B023
        counted = common.count_flops(forward(shapes_only, side, args.text))
        full = visited_pairs(FULL, Case((side, side), 1, args.text))
        for name in args.variants:
            radius, factor = STEPS[name] or (2 * side, 1)
            case = Case((side, side), radius, args.text, factor)
            visited = full if STEPS[name] is None else visited_pairs(backend, case)
            published = PUBLISHED.get(pixels, {}).get(radius) if factor == 1 and not args.small else None
            section["rows"].append(
                {
                    "pixels": pixels,
                    "variant": name,
                    "seconds": median(cost.seconds for cost in costs[name]),
                    "peak_bytes": max(cost.peak_bytes for cost in costs[name]),
                    # Attention is counted by its pairs: the counter does not see into compiled kernels.
                    "flops": counted + 4 * width * layers * (visited - full),
                    "layer": {"visited": 4 * width * visited, "rule": 4 * width * ideal_pairs(case)},
                    "published": published,
                }
            )
        common.write_section(args.output, "step", section)
    return section


def step_table(section: dict[str, Any]) -> str:
    """Seconds and operations against the plain model, and an attention layer's against those that are published."""
    plain = {row["pixels"]: row for row in section["rows"] if row["variant"] == "plain"}

    def ratio(row: dict[str, Any], name: str) -> str:
        """Plain over variant."""
        return f"{plain[row['pixels']][name] / row[name]:.2f}" if row["pixels"] in plain else "-"

    lines = [
        [
            str(row["pixels"]),
            row["variant"],
            f"{row['seconds']:.3f}",
            ratio(row, "seconds"),
            ratio(row, "flops"),
            f"{row['flops'] / 1e9:.1f}",
            *(f"{row['layer'][of] / 1e9:.2f}" for of in ("visited", "rule")),
            "-" if row["published"] is None else f"{row['published']:g}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in section["rows"]
    ]
    head = ["px", "variant", "seconds", "plain time / time", "plain FLOP / FLOP", "GFLOP", "attention layer, GFLOP"]
    head += ["the rule's", "published", "peak MiB"]
    return common.table(head, lines, left=2)


# ---- quality

STRENGTH = 0.7
"""How much of a picture the second stage of a cascade draws anew."""


def native_pixels(pipe: Any) -> int:
    """FLUX's scheduler is told the number of image tokens that the model was trained on; a token is two cells wide."""
    return round(pipe.scheduler.config.base_image_seq_len**0.5) * 2 * pipe.vae_scale_factor


def draw(
    pipe: Any,
    args: argparse.Namespace,
    prompts: list[str],
    pixels: int,
    generators: list[torch.Generator],
    images: list[Any] | None,
) -> list[Any]:
    """FLUX's pictures, anew from smaller ones where there are some."""
    anew = {}
    if images is not None:
        pipe = FluxImg2ImgPipeline.from_pipe(pipe, dtype=pipe.dtype)
        pipe.set_progress_bar_config(disable=True)
        anew = {"image": [image.resize((pixels, pixels)) for image in images], "strength": STRENGTH}
    return pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=args.guidance,
        height=pixels,
        width=pixels,
        num_inference_steps=args.steps,
        max_sequence_length=20,
        generator=generators,
        **anew,
    ).images


SHAPES_FLUX = oracle.Subject(
    "shapes-flux", ("transformer", "vae", "text_encoder", "text_encoder_2"), native_pixels, draw
)


def rule_alone(radius: int) -> Callable[[Any], AbstractContextManager]:
    """The model's own weights under the rule."""
    return lambda pipe: da.using(pipe, da.Clear(radius=radius))


DIRECT: oracle.Variants = {
    "full attention": lambda pipe: nullcontext(),
    **{f"rule alone, radius {radius}": rule_alone(radius) for radius in (4, 6, 8)},
    "distilled": lambda pipe: da.using(pipe, da.Clear.for_pipeline(pipe)),
    "distilled, pooled": lambda pipe: da.using(pipe, da.Clear.for_pipeline(pipe, down_factor=2)),
}
QUALITY: oracle.Variants = {
    **DIRECT,
    **{f"{name}, cascade": oracle.Cascade(change) for name, change in DIRECT.items()},
}


def is_compared(size: int, variant: str) -> bool:
    """A cascade begins at the native size and leads beyond it."""
    return size > 1 or not isinstance(QUALITY[variant], oracle.Cascade)


# ---- page

INTRODUCTION = """\
# CLEAR in numbers

Written by `python -m benchmarks.report` from the JSON files beside this page; edit neither by hand.
"""

SECTIONS = {
    "audit": Section(
        "The work of two layouts",
        "FlexAttention skips whole blocks of 128 queries and 128 keys. In raster order, as published, a block is a "
        "strip of the image; in ours a tile of 8 x 16 tokens. Each cell: key blocks for a block of queries, computed "
        "pairs over the disc's, and the same with 512 tokens of text on both sides. *Disc* is how many image tokens "
        "a token sees on average, the border included; *as counted before* is a study made without this code.",
        audit_table,
    ),
    "op": Section(
        "One attention call",
        "Median milliseconds, all variants of a grid and radius measured in turns in one run, behind a parity gate "
        "against a dense float64 reference. *Full SDPA* computes something else and is the reference of cost; *flex, "
        "raster* is the published formulation, its block mask made beforehand; *tiles* and *flex* are the backends of "
        "`local_attention`, *sorted once* what a layer costs where tokens come in the order of tiles, as `Clear` "
        "brings them with flex. Ratios are what is named over the variant, so larger is better. Pairs are those of one "
        "head: *visited* are computed, masked or not, *ideal* those that the rule asks for. GFLOP are of all heads; "
        "GFLOP/s count visited pairs, and *limit* is the time of the ideal ones at the rate of full SDPA. Peak memory "
        "is what a call needs above inputs and masks. *Own time* is the time that the only thread ran, where the "
        "machine had other work.",
        op_table,
    ),
    "step": Section(
        "Time and memory of one forward pass",
        "Median seconds of one evaluation at FLUX.1's full width on few layers, in turns in one run. GFLOP are "
        "products of matrices and attention as it is computed, visited pairs that are masked included; of one "
        "attention layer beside them what the rule asks for and what is published. Peak memory is what a pass needs "
        "above the weights.",
        step_table,
    ),
    "quality": replace(
        oracle.SECTION,
        description=f"{oracle.SECTION.description} *Rule alone*: the model's own weights, which were trained with full "
        "attention. *Pooled*: weighted sums over 2 x 2 tokens are seen as well. *Cascade*: the plain model "
        "draws at its native size, and the variant draws that picture anew at the larger one, with a strength of "
        f"{STRENGTH}.",
    ),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True)
    on_device, kept = shared_arguments()
    add = commands.add_parser("audit", parents=[kept], help="blocks and pairs that are visited").add_argument
    add("--grids", type=int, nargs="+", default=[64, 128, 256, 512], help="sides, in tokens")
    add = commands.add_parser("op", parents=[on_device, kept], help="cost of one attention call").add_argument
    add("--grids", type=int, nargs="+", help="sides, in tokens; by default 64, 96, 128, on CUDA also 256 and 512")
    add("--radii", type=int, nargs="+", default=[8, 16, 32])
    add("--variants", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:], help="beside full attention")
    add("--dense-until", type=int, default=96, help="largest side to make a dense mask for")
    add("--text", type=int, default=512, help="tokens of text")
    add("--heads", type=int, help="by default 4, on CUDA 24")
    add("--head-dim", type=int, help="by default 64, on CUDA 128")
    add("--down-factor", type=int, default=1, help="side of the cells that keys are pooled over, 1 for none")
    add("--repeats", type=int, default=5)
    add("--restart", action="store_true", help="drop the rows that are there")
    add("--own-time", action="store_true", help="count only while this runs, on a machine that does other work")
    add = commands.add_parser("step", parents=[on_device, kept], help="cost of one forward pass").add_argument
    add("--sizes", type=int, nargs="+", help="sides in pixels; by default 1024, on CUDA also 2048 and 4096")
    add("--variants", nargs="+", choices=STEPS, default=list(STEPS))
    add("--double", type=int, default=1, help="double-stream blocks, of 19")
    add("--single", type=int, default=2, help="single-stream blocks, of 38")
    add("--text", type=int, default=512, help="tokens of text")
    add("--repeats", type=int, default=3)
    add("--small", action="store_true", help="a toy of the layout, to try the benchmark itself")
    oracle.add_quality(commands, [on_device, kept], QUALITY, [1, 2], SHAPES_FLUX)
    for name in ("op", "step"):
        commands.choices[name].set_defaults(dtype=None)
    args = parser.parse_args(argv)
    device = "cuda" if getattr(args, "device", "cpu").startswith("cuda") else "cpu"
    missing = {name: value for name, value in DEFAULTS[device].items() if getattr(args, name, value) is None}
    vars(args).update(missing)
    return finish(args, NAME, argv)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand, print its table and keep its section."""
    args = parse(sys.argv[1:] if argv is None else argv)
    commands = {
        "audit": audit,
        "op": op,
        "step": step,
        "quality": partial(oracle.quality, variants=QUALITY, applies=is_compared, subject=SHAPES_FLUX),
    }
    run(args, SECTIONS, commands)


if __name__ == "__main__":
    main()
