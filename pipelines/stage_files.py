"""The finished stages of a long run on disk: written at once, and found again by a run of the same settings."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffusion_attn.core.errors import CheckpointFormatError, DiffusionAttnError
from diffusion_attn.core.files import save_json, save_png, written
from diffusion_attn.core.reading import read_json
from diffusion_attn.core.tensors import read_tensors
from diffusion_attn.pipelines.ladder import Stage
from diffusion_attn.pipelines.pictures import open_png

_MANIFEST, _LATENTS = "stages.json", "base.safetensors"
_RECORD: dict[str, Any] = {"methods": list, "seconds": (int, float), "peak_memory_bytes": int}


class StageFiles:
    """A folder with a picture for each stage, ``stage-1-512x1024.png`` (and ``-2``, ... for further prompts).

    ``stages.json`` holds the settings of the run and what its finished stages took.

    Args:
        folder: made if it is not there.
        settings: what makes a run's pictures what they are, in JSON's types.
        resume: go on with what is there.

    Raises:
        DiffusionAttnError: the folder cannot be written, or holds stages of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        self._manifest: dict[str, Any] = {"settings": json.loads(json.dumps(settings)), "stages": {}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if resume and (folder / _MANIFEST).is_file():
                self._manifest["stages"] = self._finished(read_json(folder / _MANIFEST))
            save_json(folder / _MANIFEST, self._manifest)
        except (OSError, ValueError) as error:
            raise DiffusionAttnError(
                f"output_dir={str(folder)!r} cannot be used ({error}); give another folder."
            ) from error

    def load(self, number: int, stage: Stage, count: int) -> tuple[list[Image.Image], dict[str, Any]] | None:
        """The ``count`` pictures and the record of a finished stage ``number`` (from 1), ``None`` if it is not."""
        record = self._manifest["stages"].get(str(number))
        if record is None:
            return None
        try:
            size = (stage.height, stage.width)
            return [open_png(self.path(number, stage, index), size) for index in range(count)], record
        except OSError:
            return None  # its file is gone or broken: draw it again

    def save(
        self,
        number: int,
        stage: Stage,
        images: list[Image.Image],
        record: dict[str, Any],
        latents: torch.Tensor | None = None,
    ) -> list[Path]:
        """Write the pictures of a stage, and a few ``latents``, and then that it is finished; returns the paths.

        Raises:
            DiffusionAttnError: the disk is full, or the folder has become unwritable.
        """
        paths = [self.path(number, stage, index) for index in range(len(images))]
        try:
            if latents is not None:
                self._save_latents(latents)
            for path, image in zip(paths, images, strict=True):
                save_png(path, image, {**self._manifest["settings"], "stage": number})
            self._manifest["stages"][str(number)] = record
            save_json(self.folder / _MANIFEST, self._manifest)
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            what = "the disk is full" if full else f"writing failed ({error})"
            raise DiffusionAttnError(
                f"stage {number} ({stage.name}) is not saved: {what} in output_dir={str(self.folder)!r}; make room and "
                "go on with resume=True."
            ) from error
        return paths

    def load_latents(self) -> torch.Tensor | None:
        """The latents that were kept, ``(n, C, h, w)``, if there are any and their file is whole."""
        try:
            latents = read_tensors(self.folder / _LATENTS).get("latents")
        except CheckpointFormatError:
            return None
        return latents if latents is not None and latents.ndim == 4 else None

    def _save_latents(self, latents: torch.Tensor) -> None:
        with written(self.folder / _LATENTS) as part:
            save_file({"latents": latents.cpu().contiguous()}, part)

    def path(self, number: int, stage: Stage, index: int) -> Path:
        """Where picture ``index`` of a stage is."""
        further = f"-{index + 1}" if index else ""
        return self.folder / f"stage-{number}-{stage.name}{further}.png"

    def _finished(self, found: Any) -> dict[str, Any]:
        if not _is_manifest(found):
            raise ValueError(f"its {_MANIFEST} is damaged; remove it to begin anew")
        theirs, ours = found["settings"], self._manifest["settings"]
        if differ := sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)):
            raise ValueError(
                f"it holds stages of a run with another {differ[0]}: {theirs.get(differ[0])!r} instead of "
                f"{ours.get(differ[0])!r}"
            )
        return found["stages"]


def _is_manifest(found: Any) -> bool:
    parts = [found.get(name) for name in ("settings", "stages")] if isinstance(found, dict) else [None]
    return all(isinstance(part, dict) for part in parts) and all(map(_is_record, found["stages"].values()))


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or record.keys() != _RECORD.keys():
        return False
    return all(isinstance(record[name], kind) for name, kind in _RECORD.items())


def digest(generator: torch.Generator | None) -> str | None:
    """A short name of a generator's state."""
    return None if generator is None else hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()[:16]
