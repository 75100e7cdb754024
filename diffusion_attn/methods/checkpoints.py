"""Published weights: found on the Hub or in a folder, checked and written; safetensors only."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from diffusion_attn.core import reading
from diffusion_attn.core.errors import CheckpointFormatError, DiffusionAttnError
from diffusion_attn.core.files import written

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The usual name of the weights in a published folder."""

EMBEDDED = Path(__file__).parents[1] / "shapes" / "models"
"""Weights for embedded models, one folder each."""


def locate(id_or_folder: str | os.PathLike[str], name: str, **hub: Any) -> Path:
    """The file ``name`` of a local folder, of weights that come with the package, or of a Hub repository.

    Args:
        id_or_folder: a folder, the name of embedded weights, or a Hub id of the form ``owner/name``, whose file is
            downloaded if it is not in the cache.
        hub: passed to ``huggingface_hub.hf_hub_download``: ``revision``, ``token``, ``cache_dir``, ...

    Raises:
        CheckpointFormatError: the folder has no such file.
        DiffusionAttnError: there is neither such a folder nor such a file on the Hub, or the Hub cannot be reached.
        TypeError: an option that the Hub does not know.
    """
    from huggingface_hub import hf_hub_download

    check_hub_options(hub)
    folder = local_folder(id_or_folder)
    if folder is not None:
        if not (folder / name).is_file():
            others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))) or "other files"
            raise CheckpointFormatError(
                f"folder {str(id_or_folder)!r} has no {name}, only {others}; give the folder that save_pretrained "
                "wrote, or the id of published weights on the Hub."
            )
        return folder / name
    try:
        return Path(hf_hub_download(str(id_or_folder), name, **hub))
    except Exception as error:  # the Hub's client, its HTTP library and its storage each have errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DiffusionAttnError(
            f"{str(id_or_folder)!r} is no folder here, and {name} cannot be had from the Hub under that id ({reason}); "
            "give a local folder, or an id of the form owner/name."
        ) from error


def check_hub_options(hub: Mapping[str, Any]) -> None:
    """Make sure that options are those of ``huggingface_hub.hf_hub_download``.

    Raises:
        TypeError: one is not.
    """
    from huggingface_hub import hf_hub_download

    unknown = sorted(hub.keys() - inspect.signature(hf_hub_download).parameters.keys())
    if unknown:
        raise TypeError(
            f"unknown options {unknown}: expected those of huggingface_hub.hf_hub_download; leave them out."
        )


def local_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder of that name here, or of the weights that come with the package; ``None`` if there is neither."""
    folder = Path(name).expanduser()
    return next((place for place in (folder, EMBEDDED / folder) if place.is_dir()), None)


def read_json(path: Path, largest: int = reading.LARGEST_JSON) -> Any:
    """The content of a JSON file of ``largest`` bytes at most.

    Raises:
        CheckpointFormatError: it is not JSON, or not within the bounds of `reading`.
    """
    try:
        return reading.read_json(path, largest)
    except ValueError as error:
        raise CheckpointFormatError(
            f"{path.name} in {path.parent.name!r} is not JSON ({error}); get it again."
        ) from error


def check_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str) -> None:
    """Make sure that names and shapes agree, and that numbers are of 16 bit or more.

    Raises:
        CheckpointFormatError: lists what is missing, unexpected, of another shape or dtype.
    """
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    narrow = [f"{k} is {v.dtype}" for k, v in found.items() if not v.is_floating_point() or v.dtype.itemsize < 2]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
        "of no dtype to compute with": narrow,
    }
    told = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if told:
        raise CheckpointFormatError(f"{what}: {'; '.join(told)}; give weights of the right format and model.")


def write_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, str],
    weights: str = WEIGHTS,
) -> None:
    """Write ``tensors`` as the file ``weights`` and text ``files`` into a folder.

    Each appears as a whole or not at all.
    """
    from safetensors.torch import save_file

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        part = {name: stack.enter_context(written(folder / name)) for name in (weights, *files)}
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part[weights], {"format": "pt"})
        for name, text in files.items():
            part[name].write_text(text, encoding="utf-8")


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
