"""Where a forward pass stands: its step in the run's schedule and the size of its input."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_attn.core.errors import DiffusionAttnError


class ScheduleError(DiffusionAttnError, ValueError):
    """A timestep is not one of the run's schedule."""


@dataclass(frozen=True)
class StepContext:
    """One forward pass of the denoiser.

    Attributes:
        height, width: of a UNet's input, in latent cells; 0 for transformers.
        step: 0-based position of the call in the timesteps that the run executes.
        steps: how many timesteps the run executes; ``0`` without a schedule.
        skipped: timesteps of the schedule before the run's first: above zero for image-to-image runs.
    """

    height: int
    width: int
    step: int = 0
    steps: int = 0
    skipped: int = 0


class Schedule:
    """The timesteps of the run in progress, in which each forward pass looks up its place.

    A step is a position in ``scheduler.timesteps``, that is one evaluation of the denoiser (all guidance branches
    together): a scheduler of two evaluations per step, such as Heun's, has ``2 * num_inference_steps - 1`` of them.

    Nothing is counted. `locate` finds the timestep in the list; where a value stands there more than once (PNDM, Heun,
    rounded Karras sigmas), the scheduler's own index tells which. The run begins at the first timestep that is seen
    after the scheduler made a new list, which every pipeline call does, so that an interrupted run, a truncated one
    (``strength``, ``denoising_start``) and a second pipeline on the same denoiser all find their place.
    """

    def __init__(self, pipeline: Any = None, timesteps: torch.Tensor | None = None) -> None:
        # A pipeline holds its denoiser: a strong reference back would keep both alive after `del pipe`.
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._scheduler = None if pipeline is None else pipeline.scheduler
        self._fixed = None if timesteps is None else _as_list(timesteps)
        self._source: torch.Tensor | None = None
        self._timesteps: list[float] = []
        self._first = 0

    def locate(self, timestep: Any, unit: float = 1) -> tuple[int, int, int]:
        """The place of ``timestep`` (a number or tensor; of a batch the first counts) in the run.

        A timestep that has been rounded to 16 bits may mean several of the schedule's; the scheduler's index tells.

        Args:
            timestep: as the denoiser is given it.
            unit: how much of the schedule's time one of it is.

        Returns:
            ``(step, steps, skipped)`` as in `StepContext`.

        Raises:
            ScheduleError: there is no schedule yet, or the timestep is not in it.
        """
        value = unit * (float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep))
        slack = _rounding(timestep) * abs(value)
        if self._fixed is not None:
            fixed = self._fixed
            nearest = min(_positions(fixed, value, slack), key=lambda position: abs(fixed[position] - value))
            return nearest, len(fixed), 0
        scheduler = self._read_scheduler()
        fresh = scheduler.timesteps is not self._source
        if fresh:
            self._source, self._timesteps = scheduler.timesteps, _as_list(scheduler.timesteps)
        position = self._pick(_positions(self._timesteps, value, slack), scheduler, fresh, value)
        if fresh or position < self._first:
            self._first = position
        return position - self._first, self._last(scheduler) - self._first, self._first

    def _read_scheduler(self) -> Any:
        pipeline = self._pipeline() if self._pipeline is not None else None
        if pipeline is not None:
            self._scheduler = pipeline.scheduler
        if self._scheduler is None or getattr(self._scheduler, "timesteps", None) is None:
            raise ScheduleError(
                "the scheduler has no timesteps yet, so the step of this call is unknown; call "
                "scheduler.set_timesteps(...) first, or enable with timesteps=."
            )
        return self._scheduler

    def _pick(self, positions: list[int], scheduler: Any, fresh: bool, value: float) -> int:
        if len(positions) == 1:
            return positions[0]
        hint = getattr(scheduler, "_step_index", None)
        if hint is None and hasattr(scheduler, "counter"):  # PNDM counts from the run's first step
            hint = scheduler.counter + (positions[0] if fresh else self._first)
        if hint is None:
            hint = getattr(scheduler, "_begin_index", None) or 0
            nearest = min(abs(self._timesteps[position] - value) for position in positions)
            positions = [position for position in positions if abs(self._timesteps[position] - value) == nearest]
        return min(positions, key=lambda position: (position < hint, abs(position - hint)))

    def _last(self, scheduler: Any) -> int:
        """One past the last timestep that the run executes: ``denoising_end`` cuts the list as the pipelines do."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        end = getattr(pipeline, "denoising_end", None)
        if isinstance(end, float) and 0 < end < 1:
            total = scheduler.config.num_train_timesteps
            count = sum(t >= round(total - end * total) for t in self._timesteps)
            if count > self._first:  # else the value is left over from another run
                return count
        return len(self._timesteps)


def _as_list(timesteps: torch.Tensor) -> list[float]:
    values = torch.as_tensor(timesteps)
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"timesteps has shape {tuple(values.shape)}: expected one dimension, the run's timesteps noisiest first."
        )
    return values.tolist()


def _rounding(timestep: Any) -> float:
    """How far off, in shares of itself, a timestep may be that was rounded to 16 bits and divided there."""
    low = isinstance(timestep, torch.Tensor) and timestep.dtype in (torch.bfloat16, torch.float16)
    return torch.finfo(timestep.dtype).eps if low else 0.0


def _positions(timesteps: list[float], value: float, slack: float) -> list[int]:
    nearest = min(abs(t - value) for t in timesteps)
    if nearest > max(0.5, slack):
        raise ScheduleError(
            f"timestep {value:g} is not one of the run's {len(timesteps)} timesteps ({timesteps[0]:g} to "
            f"{timesteps[-1]:g}): the denoiser runs on another schedule than the one it was enabled with; enable "
            "through the pipeline that runs, or pass the run's own timesteps=."
        )
    return [index for index, t in enumerate(timesteps) if abs(t - value) <= max(nearest, slack)]
