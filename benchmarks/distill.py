"""Distillation in numbers: what a step costs, part by part, and how runs went.

    python -m benchmarks.distill step                # on the embedded model, or on a folder with --model
    diffusion-attn evaluate --student RUN --output RUN/evaluation
    python -m benchmarks.distill curve --runs RUN... # losses and scores of finished runs, side by side

Run from the repository root. They print a table and keep it as a section of the JSON file ``--output``;
``python -m benchmarks.report`` makes the page of it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import diffusion_attn as da
from benchmarks import common
from benchmarks.pages import Section, finish, origin, run, shared_arguments
from diffusion_attn.core.reading import read_json, read_yaml
from diffusion_attn.distill import losses
from diffusion_attn.distill.cache import CachedData, make_cache
from diffusion_attn.distill.config import DataConfig, MethodConfig
from diffusion_attn.distill.data import ShapesData
from diffusion_attn.distill.draws import Draws
from diffusion_attn.distill.encoding import Encoded, encode, encode_captions
from diffusion_attn.distill.features import Features
from diffusion_attn.distill.student import StudentModel, build_student
from diffusion_attn.distill.teacher import NoiseSchedule, load_teacher, native_size
from diffusion_attn.distill.trainer import denoiser_inputs

NAME = "distill"
PICTURES, ENCODE, CACHED = "pictures and captions", "latents and conditions", "both from a cache"
TEACHER, FORWARD, BOTH = "teacher, forward", "student, forward", "student, forward and backward"
CHECKPOINTED = "student, forward and backward, checkpointed"
UPDATE = "clipping and AdamW"


def parts(args: argparse.Namespace, cache: Path) -> dict[str, Callable[[], Any]]:
    """What a step is made of, each as a function, on drawn scenes with all terms of the loss."""
    pipe = load_teacher(args.model)
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).requires_grad_(False).eval().to(args.device)
    device, size, batch = pipe.unet.device, native_size(pipe), args.batch
    student = build_student(MethodConfig(mid_divisor=args.mid_divisor), pipe.unet).to(device)
    model = StudentModel(pipe.unet, student)
    optimizer = torch.optim.AdamW(student.parameters())
    layers = [module for _, module in student.attentions(pipe.unet)]
    make_cache(pipe, DataConfig(source="shapes", size=size), cache, count=batch, quiet=True)
    scenes, cached = ShapesData(size, 0), CachedData(str(cache))
    samples = [scenes[i] for i in range(batch)]
    schedule = NoiseSchedule(pipe.scheduler)
    with torch.no_grad():
        encoded = encode(pipe, samples, device)
        empty = encode_captions(pipe, [""], device)
    draws = Draws.of(0, 0, batch, encoded.mean.shape[1:], len(schedule), 0.1, sampled=True).to(device)
    call, target = denoiser_inputs(pipe, schedule, encoded, empty, draws)

    def teach() -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.no_grad(), Features(layers) as features:
            return pipe.unet(**call, return_dict=False)[0], features.outputs

    taught, expected = teach()

    def learn(backward: bool, checkpointed: bool = False) -> None:
        (pipe.unet.enable_gradient_checkpointing if checkpointed else pipe.unet.disable_gradient_checkpointing)()
        with da.using(pipe, student), torch.set_grad_enabled(backward):
            with Features(layers) as features:
                predicted = model(**call)
            loss = losses.mse(predicted, target) + 0.5 * losses.mse(predicted, taught)
            loss = loss + 0.5 * losses.attention_mse(features.outputs, expected)
            if backward:
                loss.backward()

    def update() -> None:
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    return {
        PICTURES: lambda: [scenes[i] for i in range(batch)],
        ENCODE: lambda: encode(pipe, samples, device),
        CACHED: lambda: Encoded.stack([cached[i] for i in range(batch)]).to(device, pipe.unet.dtype),
        TEACHER: teach,
        FORWARD: lambda: learn(False),
        BOTH: lambda: learn(True),
        CHECKPOINTED: lambda: learn(True, True),
        UPDATE: update,
    }


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Time the parts in turns."""
    with tempfile.TemporaryDirectory() as folder:
        calls = parts(args, Path(folder))
        costs = common.in_turns(list(calls), args.repeats, lambda name: calls[name](), args.device, "parts")
        flops = {name: common.count_flops(call) for name, call in calls.items()}
    rows = [
        {
            "part": name,
            "seconds": median(cost.seconds for cost in costs[name]),
            "peak_bytes": max(cost.peak_bytes for cost in costs[name]),
            "flops": flops[name],
        }
        for name in calls
    ]
    settings = {name: getattr(args, name) for name in ("model", "batch", "mid_divisor", "repeats")}
    settings["model"] = Path(args.model).name
    return {**origin(args), "settings": settings, "rows": rows}


def step_table(section: dict[str, Any]) -> str:
    """The parts, and the whole steps that they add up to."""
    rows = {row["part"]: row for row in section["rows"]}
    whole = sum(rows[name]["seconds"] for name in (PICTURES, ENCODE, TEACHER, BOTH, UPDATE))
    lines = [
        [
            name,
            f"{1e3 * row['seconds']:.1f}",
            f"{row['seconds'] / whole:.0%}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops'] / row['seconds'] / 1e9:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for name, row in rows.items()
    ]
    sums = {
        "step": (PICTURES, ENCODE, TEACHER, BOTH, UPDATE),
        "step, from a cache": (CACHED, TEACHER, BOTH, UPDATE),
        "step, from a cache, checkpointed": (CACHED, TEACHER, CHECKPOINTED, UPDATE),
    }
    for name, members in sums.items():
        seconds = sum(rows[member]["seconds"] for member in members)
        flops = sum(rows[member]["flops"] for member in members)
        peak = max(rows[member]["peak_bytes"] for member in members)
        lines.append(
            [
                name,
                f"{1e3 * seconds:.1f}",
                f"{seconds / whole:.0%}",
                f"{flops / 1e9:.1f}",
                f"{flops / seconds / 1e9:.0f}",
                f"{peak / 2**20:.0f}",
            ]
        )
    return common.table(["part", "ms", "of a step", "GFLOP", "GFLOP/s", "peak MiB"], lines)


# ---- curve

TERMS = ("target", "prediction", "attention")
POINTS = 12  # of a curve
SHOWN = {"steps": "run", "batch_size": "optim", "lr": "optim", **dict.fromkeys(TERMS, "loss")}
"""Settings that the table of runs shows, with their sections."""


def curve(args: argparse.Namespace) -> dict[str, Any]:
    """Losses of finished runs, each point the mean of a stretch of steps, and scores where they were evaluated."""
    return {**origin(args), "runs": {folder.name: read_run(folder) for folder in args.runs}}


def read_run(folder: Path) -> dict[str, Any]:
    """What a run's folder tells.

    Raises:
        SystemExit: it is not one of a finished run.
    """
    if not (folder / "history.json").is_file():
        raise SystemExit(f"{folder} holds no history.json; give folders that diffusion-attn distill finished.")
    history, config = read_json(folder / "history.json"), read_yaml(folder / "distill.yaml")
    evaluation = folder / "evaluation" / "evaluation.json"
    points = []
    for start in range(0, len(history), size := math.ceil(len(history) / POINTS)):
        part = history[start : start + size]
        means = {name: fmean(entry[name] for entry in part) for name in TERMS if name in part[0]}
        points.append({"step": part[-1]["step"], **means})
    return {
        "settings": {name: config[section][name] for name, section in SHOWN.items()},
        "points": points,
        "evaluation": read_json(evaluation) if evaluation.is_file() else None,
    }


def curve_table(section: dict[str, Any]) -> str:
    """The runs with their scores, then the losses of each."""
    lines = []
    for name, one in section["runs"].items():
        settings, result = one["settings"], one["evaluation"]
        line = [name, *(f"{settings[key]:g}" for key in SHOWN)]
        if result is None:
            lines.append([*line, "-", "-", "-"])
            continue
        teacher, student = (result["numbers"][who]["oracle"]["exact"] for who in ("teacher", "student"))
        lines.append([*line, f"{student:.1%}", f"{student / teacher:.0%}", f"{result['likeness']['psnr']:.1f}"])
    head = ["run", "steps", "batch", "lr", *(f"weight of {name}" for name in TERMS)]
    tables = [common.table([*head, "exact", "of the teacher's", "PSNR to the teacher, dB"], lines)]
    for name, one in section["runs"].items():
        rows = [
            [str(point["step"]), *(f"{point[term]:.4f}" if term in point else "-" for term in TERMS)]
            for point in one["points"]
        ]
        tables.append(f"{name}:\n\n{common.table(['steps to', *TERMS], rows)}")
    return "\n\n".join(tables)


INTRODUCTION = """\
# Distillation in numbers

Written by `python -m benchmarks.report` from the JSON files beside this page; edit neither by hand.
"""

SECTIONS = {
    "step": Section(
        "A step, part by part",
        "Median milliseconds of each part of a step of LinFusion's distillation with all terms of the loss, measured "
        "in turns in one run; the last rows are sums. Peak memory is what a part needs above what was there before; "
        "GFLOP are matrix products, convolutions and attention as they were executed.",
        step_table,
    ),
    "curve": Section(
        "Runs",
        "LinFusion students of the embedded model by the recipe `shapes-linfusion` and variations of it. *Exact*: the "
        "share of 200 captions, held out from teacher and student, of which the student's picture shows what was asked "
        "and nothing else. Below, the terms of the loss, each the mean of the steps since the row above.",
        curve_table,
    ),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True)
    on_device, kept = shared_arguments()
    add = commands.add_parser("step", parents=[on_device, kept], help="cost of a step").add_argument
    add("--model", default="shapes-sd", help="an embedded model or the folder of a Stable Diffusion pipeline")
    add("--mid-divisor", type=int, default=1, help="see the recipes")
    add("--batch", type=int, default=32)
    add("--repeats", type=int, default=5)
    add = commands.add_parser("curve", parents=[kept], help="how runs went").add_argument
    add("--runs", type=Path, nargs="+", required=True, help="folders of finished runs")
    return finish(parser.parse_args(argv), NAME, argv)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand, print its table and keep its section."""
    run(parse(sys.argv[1:] if argv is None else argv), SECTIONS, {"step": step, "curve": curve})


if __name__ == "__main__":
    main()
