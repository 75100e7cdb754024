"""Checkpoints of a run: everything it needs to go on as if it had never stopped; safetensors and JSON only."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import CheckpointFormatError, DiffusionAttnError
from diffusion_attn.core.tensors import read_tensors
from diffusion_attn.distill.config import ConfigError
from diffusion_attn.methods.checkpoints import read_json

TENSORS, STATE = "state.safetensors", "state.json"
_PREFIX, _PART, _OLD = "step-", ".part-", ".old-"


@dataclass
class TrainState:
    """What changes from step to step.

    Attributes:
        identity: `DistillConfig.identity`, which a checkpoint has to agree with.
        parameters: the weights in training.
        optimizer: a torch optimiser.
        schedule: its learning-rate schedule.
        ema: diffusers' ``EMAModel``, or ``None``.
        scaler: of the gradients, in fp16, or ``None``.
        step: optimiser steps that were done.
        history: losses, one entry for every ``log_every`` steps.
    """

    identity: dict[str, Any]
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: Any = None
    scaler: Any = None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write tensors and state into ``folder``, which has to be there."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {f"weights/{i}": p for i, p in enumerate(self.parameters)}
        numbers: dict[str, Any] = {}
        optimizer = self.optimizer.state_dict()
        for index, state in optimizer["state"].items():
            for name, value in state.items():
                (tensors if torch.is_tensor(value) else numbers)[f"optimizer/{index}/{name}"] = value
        if self.ema is not None:
            tensors |= {f"ema/{i}": p for i, p in enumerate(self.ema.shadow_params)}
        state = {
            "step": self.step,
            "identity": self.identity,
            "history": self.history,
            "numbers": numbers,
            "groups": optimizer["param_groups"],
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler and self.scaler.state_dict(),
            "ema_step": self.ema and self.ema.optimization_step,
        }
        # clone: tensors that share memory are refused
        save_file({name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Bring back what `save` wrote.

        Raises:
            ConfigError: the checkpoint belongs to another configuration.
            CheckpointFormatError: it is damaged.
        """
        state, tensors = read_json(folder / STATE), read_tensors(folder / TENSORS)
        try:
            _check_identity(folder, state["identity"], self.identity)
            by_index: dict[int, dict[str, Any]] = {}
            for key, value in {**_part(tensors, "optimizer/"), **_part(state["numbers"], "optimizer/")}.items():
                index, name = key.split("/")
                by_index.setdefault(int(index), {})[name] = value
            with torch.no_grad():
                for i, parameter in enumerate(self.parameters):
                    parameter.copy_(_like(parameter, tensors, f"weights/{i}"))
            self.optimizer.load_state_dict({"state": by_index, "param_groups": state["groups"]})
            self.schedule.load_state_dict(state["schedule"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                for i, shadow in enumerate(self.ema.shadow_params):
                    shadow.copy_(_like(shadow, tensors, f"ema/{i}"))
                self.ema.optimization_step = state["ema_step"]
            self.step, self.history = int(state["step"]), list(state["history"])
        except DiffusionAttnError:
            raise
        except Exception as error:  # torch's own loaders raise whatever the damage made them raise
            raise CheckpointFormatError(
                f"checkpoint {str(folder)!r} does not hold what this run needs ({error}); remove it to go on from the "
                "one before."
            ) from error


class Checkpoints:
    """The checkpoints of a run in one folder; each appears as a whole, and the last ``keep`` stay.

    Args:
        folder: made when the first one is saved.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """The complete ones, oldest first."""
        return sorted(path for path in self.folder.glob("*") if re.fullmatch(rf"{_PREFIX}\d{{9}}", path.name))

    def last(self) -> Path | None:
        """The newest, or ``None``."""
        return next(reversed(self.all()), None)

    def save(self, state: TrainState) -> Path:
        """Write ``state`` beside the others, give it its name when it is complete, and remove what is too old.

        Raises:
            DiffusionAttnError: it cannot be written; the others are left as they are.
        """
        from safetensors import SafetensorError

        self.clean()
        final = self.folder / f"{_PREFIX}{state.step:09d}"
        part = self.folder / f"{_PART}{final.name}"
        try:
            part.mkdir(parents=True)
            state.save(part)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if not isinstance(error, (OSError, SafetensorError)):
                raise
            raise DiffusionAttnError(
                f"checkpoint {str(final)!r} cannot be written ({error}); make room, and go on from the one before with "
                "--resume."
            ) from error
        if final.exists():
            self._remove(final)
        part.rename(final)
        for old in self.all()[: -self.keep]:
            self._remove(old)
        return final

    def clean(self) -> None:
        """Remove what an interrupted run left half-done."""
        for path in (*self.folder.glob(f"{_PART}*"), *self.folder.glob(f"{_OLD}*")):
            shutil.rmtree(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill in between must not leave half a checkpoint under a good name.
        shutil.rmtree(path.rename(path.with_name(f"{_OLD}{path.name}")))


def _part(entries: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def _like(parameter: torch.Tensor, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if tensors[name].shape != parameter.shape:  # copy_ would repeat what is smaller
        raise ValueError(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}")
    return tensors[name]


def _check_identity(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    for section, values in wanted.items():
        for name, value in values.items():
            other = found.get(section, {}).get(name)
            if other != value:
                raise ConfigError(
                    f"{section}.{name}={value!r}, but the run in {str(folder)!r} was begun with {other!r}: a run "
                    "goes on with what it was begun with; set it back, or choose another --output."
                )
