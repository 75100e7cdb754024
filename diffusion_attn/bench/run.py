"""A bench: every method at every size, timed in turns, counted, and judged by its pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from PIL import Image

from diffusion_attn.bench.parity import ParityError, check_parity
from diffusion_attn.bench.steps import Steps
from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.enable import enabled, resolve, using
from diffusion_attn.core.errors import DiffusionAttnError, UnsupportedModelError
from diffusion_attn.core.method import Method
from diffusion_attn.metrics.images import psnr
from diffusion_attn.metrics.machine import changed, machine
from diffusion_attn.metrics.turns import in_turns, only_thread
from diffusion_attn.planning.forecast import forecast
from diffusion_attn.shapes.captions import CaptionError
from diffusion_attn.shapes.judging import score

PLAIN = "plain"
"""The name of the model without methods."""

PROMPT = "a large red star above a blue ring on a white background"
_EQUAL = 100.0
"""Decibels of equal pictures, whose PSNR is infinite."""

Size = tuple[int, int]
"""Width and height in pixels."""


class OtherSettingsError(ValueError):
    """Earlier rows were made with other settings, whose ``names`` these are."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"before: its rows were made with another {', '.join(names)}; leave them out.")
        self.names = names


def run_bench(
    pipe: Any,
    methods: Mapping[str, Method | None],
    sizes: Sequence[Size],
    *,
    prompt: str | Sequence[str] = PROMPT,
    steps: int = 30,
    guidance: float | None = None,
    repeats: int = 3,
    quality: int = 0,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    before: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], Any] = lambda result: None,
) -> dict[str, Any]:
    """Measure methods on a pipeline beside the plain model, which is left as it was.

    The denoiser's calls of one plain run are kept and made again with each method, so that every method sees the same
    inputs, and neither text encoders nor the autoencoder are in its numbers. Before that, see `check_parity`.

    Args:
        pipe: a text-to-image pipeline on its device, with nothing enabled.
        methods: by the names that rows get; ``None``, and the name ``"plain"``, is the plain model, which always runs.
        sizes: ``(width, height)`` in pixels, multiples of what the pipeline asks for.
        prompt: the first is timed; picture ``i`` is of prompt ``i``, from the first again after the last.
        steps: of each run, so that methods that work by the step show their mean.
        guidance: scale; ``None`` leaves it to the pipeline.
        repeats: rounds that are timed, each beginning with another method, after one that is thrown away.
        quality: pictures that each method draws at each size, from the seeds ``seed + i``; 0 is none.
        seed: of the first picture, and of the run that is timed.
        progress: called between measurements with how many are done, of how many, and what is next; what it raises
            ends the bench.
        before: an earlier result: its rows are kept, and only what is missing is measured.
        keep: called with the result so far whenever a row is finished.

    Returns:
        Ready for JSON. ``settings`` and ``machine``; ``rows``, sorted by size, each of a ``method`` and a ``size``:
        ``seconds_per_step`` and ``peak_bytes`` (above what was in use) are medians, ``relative_time`` and
        ``relative_peak`` those to the plain model's of the same rounds (``None`` where that needs no memory),
        ``flops_per_step`` is counted on the meta device (`planning.forecast`, ``None`` where that knows no such
        model), ``psnr`` is the mean to the plain pictures in dB, 100 where they are equal, ``exact`` the share of
        pictures that show what a caption of shapes asks for, and ``pictures`` how many there were; ``None`` where
        there is no such number. ``skipped``: why a method has no row at a size. The setting ``clock`` is ``"thread"``
        where seconds count only while the one thread that computes ran, else ``"wall"``.

    Raises:
        ValueError: an argument is not what it should be, or a method is enabled.
        OtherSettingsError: ``before`` was made with other settings, or on another machine.
        ParityError: a method does not do what it says.
        DiffusionAttnError: the model or a method stands against it.
    """
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    for name, value, least in (("steps", steps, 1), ("repeats", repeats, 1), ("quality", quality, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: expected {least} or more.")
    if not prompts or not sizes:
        raise ValueError(f"{'prompt' if not prompts else 'sizes'} is empty; give one at least.")
    if on := enabled(pipe):
        raise ValueError(f"{on[0].name!r} is enabled on the pipeline; disable it, so that plain is plain.")
    wanted = {PLAIN: None, **{name: method for name, method in methods.items() if method is not None}}
    device = torch.device(getattr(pipe, "_execution_device", pipe.device))
    clock = "thread" if only_thread(device) else "wall"
    result: dict[str, Any] = {
        "settings": {
            "prompts": list(prompts),
            "steps": steps,
            "guidance": guidance,
            "repeats": repeats,
            "quality": quality,
            "seed": seed,
            "dtype": str(resolve(pipe)[1].dtype).removeprefix("torch."),
            "device": str(device),
            "clock": clock,
        },
        "machine": machine(device),
        "rows": [],
        "skipped": {},
    }
    if before is not None:
        then = {**before, "settings": {k: v for k, v in before["settings"].items() if k in result["settings"]}}
        if names := changed(result, then):
            raise OtherSettingsError(names)
        result |= {"rows": list(before["rows"]), "skipped": dict(before.get("skipped", {}))}
    _Bench(pipe, wanted, result, progress or (lambda done, total, what: None), keep).run(sizes)
    return result


@dataclass
class _Bench:
    """A bench under way: ``result`` grows row by row."""

    pipe: Any
    methods: Mapping[str, Method | None]
    result: dict[str, Any]
    progress: Callable[[int, int, str], None]
    keep: Callable[[dict[str, Any]], Any]
    done: int = 0
    total: int = 0
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = self.result["settings"]

    def run(self, sizes: Sequence[Size]) -> None:
        """Measure what is missing, size by size."""
        missing = {size: [name for name in self.methods if not self._row(name, size)] for size in dict.fromkeys(sizes)}
        each = self.settings["repeats"] + 1 + self.settings["quality"]
        for names in missing.values():
            others = len([name for name in names if name != PLAIN])
            self.total += 1 + others + each * (others + 1) if names else 0
        for size, names in missing.items():
            if names:
                self._measure(size, names)
        self.progress(self.total, self.total, "done")

    def _row(self, name: str, size: Size) -> Any:
        return next((row for row in self.result["rows"] if (row["method"], tuple(row["size"])) == (name, size)), None)

    def _next(self, what: str, size: Size) -> None:
        self.progress(self.done, self.total, f"{size[0]}x{size[1]} {what}")
        self.done += 1

    def _measure(self, size: Size, names: list[str]) -> None:
        """The rows of one size; the plain model runs again where only others are missing, so that ratios are fair."""
        self._next("plain run", size)
        steps = Steps.record(self.pipe, **self._call(size, 0))
        names = [PLAIN, *(name for name in names if name != PLAIN and self._serves(name, size, steps))]
        costs = in_turns(
            names,
            self.settings["repeats"],
            lambda name: steps.take_all(),
            self.settings["device"],
            change=self._in_force,
            clock=time.thread_time if self.settings["clock"] == "thread" else time.perf_counter,
            before_each=lambda name: self._next(f"{name}, time", size),
        )
        seconds = {name: median(cost.seconds for cost in costs[name]) / self.settings["steps"] for name in names}
        peaks = {name: round(median(cost.peak_bytes for cost in costs[name])) for name in names}
        plain = self._draw(PLAIN, size)
        for name in names:
            images = plain if name == PLAIN else self._draw(name, size)
            if self._row(name, size):
                continue
            row = {
                "method": name,
                "size": list(size),
                "seconds_per_step": seconds[name],
                "relative_time": seconds[name] / seconds[PLAIN],
                "rounds": [cost.seconds / self.settings["steps"] for cost in costs[name]],
                "peak_bytes": peaks[name],
                "relative_peak": peaks[name] / peaks[PLAIN] if peaks[PLAIN] > 0 else None,
                "flops_per_step": self._flops(name, size, steps),
                "pictures": len(images),
                "exact": self._exact(images),
                "psnr": None if name == PLAIN else _likeness(images, plain),
            }
            order = [*dict.fromkeys([*self.methods, *(row["method"] for row in self.result["rows"])])]
            self.result["rows"] = sorted(
                [*self.result["rows"], row],
                key=lambda row: (row["size"][0] * row["size"][1], row["size"], order.index(row["method"])),
            )
            self.keep(self.result)

    def _serves(self, name: str, size: Size, steps: Steps) -> bool:
        """Whether a method computes at a size, and as it should."""
        method = self.methods[name]
        assert method is not None
        self._next(f"{name}, parity", size)
        where = f"{name} at {size[0]}x{size[1]}"
        try:
            check_parity(self.pipe, where, method, lambda: steps.take(0))
        except ParityError:
            raise
        except (DiffusionAttnError, ValueError) as error:
            self.result["skipped"][where] = " ".join(str(error).split())
            return False
        return True

    def _in_force(self, name: str) -> AbstractContextManager:
        method = self.methods[name]
        return nullcontext() if method is None else using(self.pipe, method)

    def _call(self, size: Size, index: int) -> dict[str, Any]:
        """The arguments of a run for the picture of an index."""
        prompts = self.settings["prompts"]
        return {
            **call_arguments(self.pipe, [prompts[index % len(prompts)]], self.settings["guidance"]),
            "width": size[0],
            "height": size[1],
            "num_inference_steps": self.settings["steps"],
            "generator": torch.Generator().manual_seed(self.settings["seed"] + index),
        }

    def _draw(self, name: str, size: Size) -> list[Image.Image]:
        images = []
        for index in range(self.settings["quality"]):
            self._next(f"{name}, picture {index + 1}", size)
            with self._in_force(name):
                images += self.pipe(**self._call(size, index)).images
        return images

    def _exact(self, images: list[Image.Image]) -> float | None:
        """The oracle's share of exact pictures; ``None`` without pictures, or where prompts are not about shapes."""
        prompts = self.settings["prompts"]
        try:
            return score(images, [prompts[i % len(prompts)] for i in range(len(images))]).exact if images else None
        except CaptionError:
            return None

    def _flops(self, name: str, size: Size, steps: Steps) -> float | None:
        method, scale = self.methods[name], self.pipe.vae_scale_factor
        try:
            cost = forecast(
                steps.denoiser,
                height=size[1] // scale,
                width=size[0] // scale,
                text_tokens=steps.text_tokens,
                batch=steps.batch,
                methods=() if method is None else (method,),
                steps=self.settings["steps"],
            )
        except UnsupportedModelError:
            return None
        return cost.flops * len(steps.calls) / self.settings["steps"]


def _likeness(images: list[Image.Image], plain: list[Image.Image]) -> float | None:
    return fmean(min(value, _EQUAL) for value in psnr(images, plain)) if images else None
