"""Self-generated data: pictures that the teacher itself draws, in a folder that distillation reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.files import save_json, save_text, written
from diffusion_attn.distill.encoding import fingerprint
from diffusion_attn.distill.sources import DataError
from diffusion_attn.methods.checkpoints import read_json

SETTINGS = "made.json"


def make_data(
    pipe: Any,
    prompts: Sequence[str],
    count: int,
    output: Path,
    size: tuple[int, int],
    steps: int,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 8,
    quiet: bool = False,
) -> None:
    """Draw ``count`` pictures of ``prompts`` in turn, each with its caption beside; goes on where it stopped.

    Picture ``i`` is drawn from seed ``seed + i`` whatever the batch.

    Args:
        pipe: a text-to-image pipeline.
        prompts: one or more.
        count: pictures in the end, those that are there already included.
        output: folder; made if there is none.
        size: width and height in pixels.
        steps: denoising steps.
        guidance: guidance scale; ``None``: the pipeline's own, or none where it takes none.
        seed: of the first picture.
        batch: pictures drawn together.
        quiet: show no progress.

    Raises:
        DataError: ``output`` holds pictures made otherwise, or cannot be written.
        CheckpointFormatError: its record of how they were made is damaged.
    """
    settings = {
        "model": fingerprint(pipe, denoiser=True),
        "prompts": list(prompts),
        "size": list(size),
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
    }
    try:
        _begin(output, settings)
        todo = [number for number in range(count) if not _picture(output, number).exists()]
        with tqdm(total=count, initial=count - len(todo), desc="pictures", unit="picture", disable=quiet) as bar:
            for start in range(0, len(todo), batch):
                numbers = todo[start : start + batch]
                captions = [prompts[number % len(prompts)] for number in numbers]
                images = pipe(
                    **call_arguments(pipe, captions, guidance),
                    width=size[0],
                    height=size[1],
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(seed + number) for number in numbers],
                ).images
                for number, caption, image in zip(numbers, captions, images, strict=True):
                    _write(_picture(output, number), caption, image)
                bar.update(len(numbers))
    except OSError as error:
        raise DataError(
            f"--output {str(output)!r} cannot be written ({error.strerror or error}); make room or choose another "
            "folder, and run the same command again to go on."
        ) from error


def _begin(output: Path, settings: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    file = output / SETTINGS
    if file.exists():
        if (found := read_json(file)) != settings:
            found = found if isinstance(found, dict) else {}
            changed = ", ".join(name for name in settings if found.get(name) != settings[name])
            raise DataError(
                f"--output {str(output)!r} holds pictures made with another {changed}; choose another folder, or go on "
                "with the same settings."
            )
        return
    save_json(file, settings)


def _picture(output: Path, number: int) -> Path:
    return output / f"{number:07d}.png"


def _write(path: Path, caption: str, image: Any) -> None:
    """The picture comes last, so that one that is there is complete."""
    save_text(path.with_suffix(".txt"), caption + "\n")
    with written(path) as part:
        image.save(part, "PNG")
