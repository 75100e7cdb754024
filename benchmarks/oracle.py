"""What an oracle reads from the embedded model's pictures, with one method in force after the other."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tqdm import tqdm

from benchmarks import common
from benchmarks.pages import Section, keep, resume
from diffusion_attn.core.loading import WEIGHTS_ONLY
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.judging import score
from diffusion_attn.shapes.models import load_pipeline
from diffusion_attn.shapes.scenes import sample_scenes

Variants = Mapping[str, Callable[[Any], AbstractContextManager]]
"""What is compared, by name: each puts something in force on a pipeline for a ``with`` block."""


@dataclass(frozen=True)
class Cascade:
    """A variant that draws pictures anew, larger, which the plain model has drawn at its native size."""

    change: Callable[[Any], AbstractContextManager]

    def __call__(self, pipe: Any) -> AbstractContextManager:
        """In force on a pipeline while pictures are drawn anew."""
        return self.change(pipe)


@dataclass(frozen=True)
class Subject:
    """The embedded model whose pictures are read.

    Attributes:
        name: of the embedded model.
        parts: of its pipeline that hold weights.
        native_pixels: side of the pictures that it was trained on.
        draw: pictures for ``(pipe, args, prompts, pixels, generators, images)``, anew from ``images`` where there are.
        prepare: what is done to the pipeline once it is loaded.
    """

    name: str
    parts: tuple[str, ...]
    native_pixels: Callable[[Any], int]
    draw: Callable[..., list[Any]]
    prepare: Callable[[Any], None] = lambda pipe: None


def _sample_by_ddim(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


def _draw(
    pipe: Any,
    args: argparse.Namespace,
    prompts: list[str],
    pixels: int,
    generators: list[torch.Generator],
    images: None,
) -> list[Any]:
    """Stable Diffusion's pictures."""
    return pipe(
        prompts,
        height=pixels,
        width=pixels,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=generators,
    ).images


SHAPES_SD = Subject(
    "shapes-sd",
    ("unet", "vae", "text_encoder"),
    lambda pipe: pipe.unet.config.sample_size * pipe.vae_scale_factor,
    _draw,
    _sample_by_ddim,
)


def add_quality(
    commands: Any,
    parents: list[argparse.ArgumentParser],
    variants: Variants,
    sizes: list[int],
    subject: Subject = SHAPES_SD,
) -> None:
    """Add the subcommand ``quality``."""
    add = commands.add_parser("quality", parents=parents, help="the oracle's table").add_argument
    add("--model", help=f"folder of a pipeline; by default the embedded {subject.name}")
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


def load(args: argparse.Namespace, subject: Subject) -> Any:
    """The pipeline under test, with no progress bar of its own."""
    pipe = DiffusionPipeline.from_pretrained(args.model, **WEIGHTS_ONLY) if args.model else load_pipeline(subject.name)
    subject.prepare(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device, getattr(torch, args.dtype))


def digest(pipe: Any, subject: Subject) -> str:
    """A fingerprint of the weights, so that rows of two models never end up in one table."""
    hasher = hashlib.sha256()
    for part in subject.parts:
        for tensor in getattr(pipe, part).state_dict().values():
            hasher.update(tensor.float().cpu().numpy().tobytes())
    return hasher.hexdigest()[:12]


def picture_row(
    args: argparse.Namespace, pipe: Any, size: int, variant: str, variants: Variants, subject: Subject
) -> dict[str, Any]:
    """Draw every caption at a multiple of the native size and have the oracle read the pictures."""
    prompts = [caption(scene) for scene in sample_scenes(args.captions, args.seed, held_out=True)]
    native, change = subject.native_pixels(pipe), variants[variant]

    def draw(pixels: int, what: str, before: list[Any] | None = None) -> list[Any]:
        """A picture of each caption, from those that were drawn ``before`` if there are any."""
        images: list[Any] = []
        with tqdm(total=len(prompts), desc=what) as bar:
            for start in range(0, len(prompts), args.batch):
                part = slice(start, start + args.batch)
                seeds = range(args.seed + start, args.seed + start + len(prompts[part]))
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                images += subject.draw(pipe, args, prompts[part], pixels, generators, before and before[part])
                bar.update(len(generators))
        return images

    began = time.perf_counter()
    small = draw(native, f"{size}x {variant}, 1x first") if isinstance(change, Cascade) else None
    with change(pipe):
        images = draw(size * native, f"{size}x {variant}", small)
    seconds = (time.perf_counter() - began) / len(prompts)
    return {
        "size": size,
        "pixels": size * native,
        "variant": variant,
        "seconds": seconds,
        **score(images, prompts).as_dict(),
    }


def quality(
    args: argparse.Namespace,
    variants: Variants,
    applies: Applies = lambda size, name: True,
    subject: Subject = SHAPES_SD,
) -> dict[str, Any]:
    """Fill the oracle's table row by row; what an earlier run with the same settings finished is kept.

    Several runs may fill one table at a time, each with some of ``--variants`` or ``--sizes``.

    Raises:
        SystemExit: there are rows, and they were made with other settings.
    """
    pipe = load(args, subject)
    settings = {
        "model": Path(args.model).name if args.model else subject.name,
        "weights": digest(pipe, subject),
        "native_pixels": subject.native_pixels(pipe),
        **{name: getattr(args, name) for name in ("captions", "seed", "steps", "guidance", "batch", "dtype")},
    }
    section = resume(args, settings)
    for size, variant in rows(args, applies):
        if any((row["size"], row["variant"]) == (size, variant) for row in section["rows"]):
            continue
        row = picture_row(args, pipe, size, variant, variants, subject)
        section = keep(args, [row], lambda row: (row["size"], list(variants).index(row["variant"])))
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
