"""What an oracle reads from the embedded model's pictures, with one method in force after the other."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tqdm import tqdm

from benchmarks import common
from benchmarks.pages import Section, origin
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.judging import score
from diffusion_attn.shapes.models import load_pipeline
from diffusion_attn.shapes.scenes import sample_scenes

Variants = Mapping[str, Callable[[Any], AbstractContextManager]]
"""What is compared, by name: each puts something in force on a pipeline for a ``with`` block."""


def add_quality(commands: Any, parents: list[argparse.ArgumentParser], variants: Variants, sizes: list[int]) -> None:
    """Add the subcommand ``quality``."""
    add = commands.add_parser("quality", parents=parents, help="the oracle's table").add_argument
    add("--model", help="folder of a StableDiffusionPipeline; by default the embedded shapes-sd")
    add("--sizes", type=int, nargs="+", default=sizes, help="multiples of the native size")
    add("--variants", nargs="+", choices=variants, default=list(variants))
    add("--captions", type=int, default=100, help="held-out captions, one picture each")
    add("--seed", type=int, default=0, help="of the captions and of the first picture's noise")
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=2.0)
    add("--batch", type=int, default=10, help="pictures drawn together")
    add("--restart", action="store_true", help="drop the rows that are there")


Applies = Callable[[int, str], bool]
"""Whether a variant is worth a row at a multiple of the native size."""


def rows(args: argparse.Namespace, applies: Applies) -> Iterator[tuple[int, str]]:
    """The ``(size, variant)`` pairs of the table."""
    return ((size, variant) for size in args.sizes for variant in args.variants if applies(size, variant))


def load(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The pipeline under test, with the DDIM sampler and no progress bar of its own."""
    pipe = StableDiffusionPipeline.from_pretrained(args.model) if args.model else load_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device, getattr(torch, args.dtype))


def digest(pipe: StableDiffusionPipeline) -> str:
    """A fingerprint of the weights, so that rows of two models never end up in one table."""
    hasher = hashlib.sha256()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for tensor in part.state_dict().values():
            hasher.update(tensor.float().cpu().numpy().tobytes())
    return hasher.hexdigest()[:12]


def picture_row(
    args: argparse.Namespace, pipe: StableDiffusionPipeline, size: int, variant: str, variants: Variants
) -> dict[str, Any]:
    """Draw every caption at a multiple of the native size and have the oracle read the pictures."""
    prompts = [caption(scene) for scene in sample_scenes(args.captions, args.seed, held_out=True)]
    pixels = size * pipe.unet.config.sample_size * pipe.vae_scale_factor
    images: list[Any] = []
    began = time.perf_counter()
    with variants[variant](pipe), tqdm(total=len(prompts), desc=f"{size}x {variant}") as bar:
        for start in range(0, len(prompts), args.batch):
            part = prompts[start : start + args.batch]
            images += pipe(
                part,
                height=pixels,
                width=pixels,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                generator=[torch.Generator().manual_seed(args.seed + start + i) for i in range(len(part))],
            ).images
            bar.update(len(part))
    seconds = (time.perf_counter() - began) / len(prompts)
    return {
        "size": size,
        "pixels": pixels,
        "variant": variant,
        "seconds": seconds,
        **score(images, prompts).as_dict(),
    }


def quality(args: argparse.Namespace, variants: Variants, applies: Applies = lambda size, name: True) -> dict[str, Any]:
    """Fill the oracle's table row by row; what an earlier run with the same settings finished is kept.

    Several runs may fill one table at a time, each with some of ``--variants`` or ``--sizes``.

    Raises:
        SystemExit: there are rows, and they were made with other settings.
    """
    pipe = load(args)
    settings = {
        "model": Path(args.model).name if args.model else "shapes-sd",
        "weights": digest(pipe),
        "native_pixels": pipe.unet.config.sample_size * pipe.vae_scale_factor,
        **{name: getattr(args, name) for name in ("captions", "seed", "steps", "guidance", "batch", "dtype")},
    }
    here = origin(args)
    before = {} if args.restart else common.read_results(args.output).get("quality", {})
    if before:
        now, then = {**settings, **here["machine"]}, {**before["settings"], **before["machine"]}
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        if changed:
            raise SystemExit(
                f"{args.output.name} holds rows made with another {', '.join(changed)}; give the same settings to go "
                "on, another --output, or --restart to drop those rows."
            )
    section = {**here, "settings": settings, "rows": [], **before}
    common.write_section(args.output, "quality", section)
    for size, variant in rows(args, applies):
        if any((row["size"], row["variant"]) == (size, variant) for row in section["rows"]):
            continue
        row = picture_row(args, pipe, size, variant, variants)
        section = common.read_results(args.output)["quality"]
        section["rows"].append(row)
        section["rows"].sort(key=lambda row: (row["size"], list(variants).index(row["variant"])))
        section["commands"] = list(dict.fromkeys([*section["commands"], *here["commands"]]))
        common.write_section(args.output, "quality", section)
    return section


def quality_table(section: dict[str, Any]) -> str:
    """What the oracle read, one line for each size and variant."""
    lines = [
        [
            f"{row['size']}x ({row['pixels']} px)",
            row["variant"],
            f"{row['exact']:.0%}",
            *(str(row[name]) for name in ("asked", "read", "extra", "missing", "wrong_color", "wrong_shape")),
            f"{row['background']:.0%}",
            f"{row['readable']:.0%}",
            f"{row['seconds']:.2f}",
        ]
        for row in section["rows"]
    ]
    head = ["size", "variant", "exact", "objects asked", "objects read", "extra", "missing", "wrong colour"]
    head += ["wrong shape", "background right", "readable", "seconds per picture"]
    return common.table(head, lines, left=2)


SECTION = Section(
    "What an oracle reads from the pictures",
    "Pictures of held-out captions by the embedded model, at multiples of the size it was trained at, the same seeds "
    "for every variant. *Exact*: the picture shows what was asked and nothing else. *Extra* and *missing* count "
    "objects against the caption, *wrong colour* and *wrong shape* those that agree with it in only the other; objects "
    "that touch are read as one, and the picture then as not readable. Seconds are of rows drawn one after the other, "
    "whatever else the machine did. This is a model of coloured shapes: evidence about a mechanism, not about "
    "photographs.",
    quality_table,
)
