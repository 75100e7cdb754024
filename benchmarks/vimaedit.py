"""ViMAEdit taken apart, on edits of drawn pictures that an oracle reads, beside other ways to edit.

python -m benchmarks.vimaedit ablation          # its parts one by one, and the alternatives, on the same edits
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, LEditsPPPipelineStableDiffusion
from PIL import Image
from tqdm import tqdm

from benchmarks import common, editing
from benchmarks.editing import WINDOWS, mse, psnr, succeeded
from benchmarks.oracle import SHAPES_SD, digest
from benchmarks.pages import Section, finish, keep, resume, run, shared_arguments
from diffusion_attn.core.session import bind_call
from diffusion_attn.editing.inversion import ddim_invert
from diffusion_attn.metrics.cost import measure
from diffusion_attn.pipelines import DPLPipeline, ViMAEditPipeline
from diffusion_attn.shapes.edits import KINDS_OF_EDIT, SceneEdit, scene_edits
from diffusion_attn.shapes.models import CLIP, IP_ADAPTER, load_pipeline

NAME = "vimaedit"
KINDS = tuple(kind for kind in KINDS_OF_EDIT if kind != "reweight")
"""Of edits: those that change what is said."""

PARTS: dict[str, dict[str, Any]] = {
    "Prompt-to-Prompt, virtual inversion": {"ip_adapter_scale": 0, "blend": False},
    "+ image guidance": {"blend": False},
    "+ grounding": {"variance_threshold": None},
    "+ noise: ViMAEdit": {},
    "ViMAEdit without spreading, R = 0": {"grounding_iterations": 0},
    "ViMAEdit without image guidance": {"ip_adapter_scale": 0},
    "ViMAEdit, a wider area: threshold 0.3": {"blend_threshold": 0.3},
    "ViMAEdit, a picture for each branch": {"image_guidance_layout": "per_branch"},
}
"""Options of the pipeline; ``blend``: whether it is told the words."""


class Bench:
    """The pipelines, which share nothing that a run changes."""

    def __init__(self, device: str, dtype: torch.dtype, steps: int, guidance: float) -> None:
        self.steps, self.guidance = steps, guidance
        adapted, plain, eps = (load_pipeline(SHAPES_SD.name, dtype=dtype).to(device) for _ in range(3))
        told = hashlib.sha256((CLIP / "model.safetensors").read_bytes() + (CLIP / IP_ADAPTER).read_bytes())
        self.digests = {"weights": digest(plain, SHAPES_SD), "adapter": told.hexdigest()[:12]}
        adapted.load_ip_adapter(CLIP, subfolder="", weight_name=IP_ADAPTER, image_encoder_folder=None)
        self.vimaedit = ViMAEditPipeline.from_pipe(adapted)
        self.vimaedit.load_clip(str(CLIP))
        self.inverting = DPLPipeline.from_pipe(plain)
        self.ledits = _ledits(eps)
        for pipe in (self.vimaedit, self.inverting, self.ledits):
            pipe.set_progress_bar_config(disable=True)
        self.side = plain.unet.config.sample_size * plain.vae_scale_factor
        self.cells = plain.unet.config.sample_size

    def by_vimaedit(self, edit: SceneEdit, picture: Image.Image, options: dict[str, Any]) -> Any:
        """The output of one row of `PARTS`."""
        options = dict(options)
        told = options.pop("blend", True) and edit.kind != "insert"
        cross, own = WINDOWS[edit.kind]
        return self.vimaedit(
            picture,
            *edit.prompts,
            edit.blend_words if told else None,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            cross_replace_steps=cross,
            self_replace_steps=own,
            map_size=self.cells,
            generator=torch.Generator().manual_seed(0),
            **options,
        )

    def by_prompt_to_prompt(self, edit: SceneEdit, picture: Image.Image, inversion: str, blend: bool) -> Any:
        """The output after one of the inversions of `benchmarks.editing`."""
        pipe = self.inverting
        source, target = edit.prompts
        plain = ddim_invert(pipe, pipe.encode_image(picture), source, num_inference_steps=self.steps)
        cross, own = WINDOWS[edit.kind]
        return pipe(
            target_prompt=target,
            inversion=editing.METHODS[inversion](pipe, plain, edit, self.guidance),
            guidance_scale=self.guidance,
            cross_replace_steps=cross,
            self_replace_steps=own,
            blend_words=edit.blend_words if blend and edit.kind != "insert" else None,
            map_size=self.cells,
        )

    def by_ledits(self, edit: SceneEdit, picture: Image.Image) -> Any:
        """LEDITS++ at its defaults: away from the source's prompt, towards the target's."""
        self.ledits.invert(
            picture,
            num_inversion_steps=self.steps,
            generator=torch.Generator().manual_seed(0),
            height=self.side,
            width=self.side,
        )
        return self.ledits(
            editing_prompt=list(edit.prompts),
            reverse_editing_direction=[True, False],
            edit_guidance_scale=[self.guidance] * 2,
            edit_threshold=[0.9] * 2,
            generator=torch.Generator().manual_seed(0),
        )


def _ledits(stock: Any) -> Any:
    """LEDITS++ asks for the noise, where shapes-sd predicts the velocity: a hook makes the one of the other."""
    changes = {"prediction_type": "epsilon", "algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    parts = {name: getattr(stock, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    pipe = LEditsPPPipelineStableDiffusion(
        **parts,
        scheduler=DPMSolverMultistepScheduler.from_config(stock.scheduler.config, **changes),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    alphas = pipe.scheduler.alphas_cumprod

    def to_noise(unet: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        call = bind_call(unet, args, kwargs)
        sample = call["sample"]
        alpha = alphas[torch.as_tensor(call["timestep"]).long().cpu()].to(sample).reshape(-1, 1, 1, 1)
        output.sample = alpha.sqrt() * output.sample + (1 - alpha).sqrt() * sample
        return output

    stock.unet.register_forward_hook(to_noise, with_kwargs=True)
    return pipe


METHODS: dict[str, Callable[[Bench, SceneEdit, Image.Image], Any]] = {
    **{name: lambda b, e, p, o=options: b.by_vimaedit(e, p, o) for name, options in PARTS.items()},
    "direct inversion": lambda b, e, p: b.by_prompt_to_prompt(e, p, "direct", False),
    "direct inversion, local blend": lambda b, e, p: b.by_prompt_to_prompt(e, p, "direct", True),
    "null-text, 3 updates, local blend": lambda b, e, p: b.by_prompt_to_prompt(e, p, "null-text, 3 updates", True),
    "DPL, 1 and 3 updates, local blend": lambda b, e, p: b.by_prompt_to_prompt(e, p, "DPL, 1 and 3 updates", True),
    "LEDITS++ of diffusers": lambda b, e, p: b.by_ledits(e, p),
}
"""Ways to edit, each an output with ``images``."""

BASELINES = ("copy of the picture", "autoencoder alone")


def ablation(args: argparse.Namespace) -> dict[str, Any]:
    """Fill the table edit by edit; what an earlier run with the same settings finished is kept.

    Raises:
        SystemExit: there are rows, and they were made with other settings.
    """
    bench = Bench(args.device, getattr(torch, args.dtype), args.steps, args.guidance)
    settings = {
        "model": SHAPES_SD.name,
        **bench.digests,
        **{name: getattr(args, name) for name in ("edits", "seed", "steps", "guidance", "dtype")},
    }
    section = resume(args, settings)
    done = {(row["method"], row["edit"]) for row in section["rows"]}
    names = [*BASELINES, *METHODS]
    edits = [edit for edit in scene_edits(args.edits * 4 // 3, args.seed) if edit.kind in KINDS]
    for index, edit in enumerate(tqdm(edits, desc="edits")):
        missing = [name for name in args.methods if (name, index) not in done]
        if missing:
            rows = [{"edit": index, **_row(bench, edit, name)} for name in missing]
            section = keep(args, rows, lambda row: (names.index(row["method"]), row["edit"]))
    return section


def _row(bench: Bench, edit: SceneEdit, name: str) -> dict[str, Any]:
    picture = edit.image(bench.side)
    mask = None
    with measure(bench.inverting.unet.device) as cost:
        if name == BASELINES[0]:
            edited = picture
        elif name == BASELINES[1]:
            [edited] = bench.inverting.decode_latents(bench.inverting.encode_image(picture), "pil")
        else:
            output = METHODS[name](bench, edit, picture)
            edited, mask = output.images[0], getattr(output, "blend_mask", None)
    return {
        "method": name,
        "kind": edit.kind,
        "success": succeeded(edit, picture, edited),
        "background_mse": mse(picture, edited, ~edit.editable(bench.side)),
        "iou": None if mask is None or edit.kind == "insert" else _overlap(mask, edit.changing(bench.side)),
        "seconds": cost.seconds,
        "peak_mb": cost.peak_bytes / 1e6,
    }


def _overlap(mask: torch.Tensor, known: np.ndarray) -> float:
    """Intersection over union of a mask of latent cells with pixels."""
    found = F.interpolate(mask[:1].float().cpu(), known.shape)[0, 0].numpy() > 0
    return float((found & known).sum() / (found | known).sum())


def table(section: dict[str, Any]) -> str:
    """One line for each way."""
    lines = []
    for method in (*BASELINES, *METHODS):
        rows = [row for row in section["rows"] if row["method"] == method]
        if not rows:
            continue
        shares = []
        for kind in KINDS:
            won = [row["success"] for row in rows if row["kind"] == kind]
            shares.append(f"{sum(won)} of {len(won)}")
        overlaps = [row["iou"] for row in rows if row["iou"] is not None]
        iou = f"{np.mean(overlaps):.3f}" if overlaps else ""
        kept = "" if method == BASELINES[0] else psnr(rows, "background_mse")
        cost = [f"{median(row['seconds'] for row in rows):.2f}", f"{median(row['peak_mb'] for row in rows):.0f}"]
        lines.append([method, *shares, kept, iou, *cost])
    head = ["method", *KINDS, "rest PSNR, dB", "mask IoU", "seconds", "peak MB"]
    return common.table(head, lines, left=1)


INTRODUCTION = """# ViMAEdit taken apart

Written by `python -m benchmarks.report` from the numbers beside it.
"""
SECTIONS = {
    "ablation": Section(
        "Edits that an oracle reads",
        "The same edits of drawn pictures by all, with the same windows and guidance. *swap*, *recolour*: another "
        "shape or colour; *insert*: a second object, named in the prompt; they count when the oracle reads exactly the "
        "target. *Rest*: everything further than three pixels from the object that is edited; for insertions the "
        "object that was there. *Mask IoU*: overlap of where the method allows a change, in latent cells, with what "
        "the object covers before and after; insertions are edited without words to blend. Words are looked for in the "
        "finest maps. Seconds (with inversion) and growth of the process's memory are medians, on a shared machine. "
        "LEDITS++ is given the noise that the predicted velocity means, and both prompts as its concepts. This is "
        "a model of coloured shapes: evidence about a mechanism, not about photographs.",
        table,
    )
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vimaedit", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    add = commands.add_parser("ablation", parents=[*shared_arguments()], help="the oracle's table").add_argument
    add("--edits", type=int, default=60)
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=3.0)
    add("--methods", nargs="+", choices=(*BASELINES, *METHODS), default=[*BASELINES, *METHODS])
    add("--restart", action="store_true", help="drop the rows that are there")
    return finish(parser.parse_args(argv), NAME, argv)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand, print its table and keep its section."""
    args = parse(sys.argv[1:] if argv is None else argv)
    run(args, SECTIONS, {"ablation": ablation})


if __name__ == "__main__":
    main()
