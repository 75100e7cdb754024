"""Costs of several variants, measured in turns, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from diffusion_attn.metrics.cost import Cost, measure


def in_turns(
    names: Sequence[str],
    repeats: int,
    call: Callable[[str], Any],
    device: torch.device | str = "cpu",
    *,
    change: Callable[[str], AbstractContextManager] = nullcontext,
    clock: Callable[[], float] = time.perf_counter,
    before_each: Callable[[str], Any] = lambda name: None,
) -> dict[str, list[Cost]]:
    """Costs of every variant, measured in rounds that each begin with another one; a first round is thrown away.

    Args:
        names: of the variants.
        repeats: rounds that count.
        call: what is measured, without gradients.
        device: where it computes.
        change: puts a variant in force, which is not measured.
        clock: what seconds are read from. ``time.thread_time`` counts while the calling thread ran: what one thread
            computes on a CPU costs the same then, whatever else the machine does.
        before_each: told of each measurement, those of the first round included; what it raises ends them.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    order = [names[(i + shift) % len(names)] for shift in range(-1, repeats) for i in range(len(names))]
    for index, name in enumerate(order):
        before_each(name)
        with torch.no_grad(), change(name), measure(device, clock) as cost:
            call(name)
        if index >= len(names):
            costs[name].append(cost)
    return costs


def only_thread(device: torch.device | str = "cpu") -> bool:
    """Whether the calling thread does all the work, so that ``time.thread_time`` misses nothing."""
    return torch.device(device).type == "cpu" and torch.get_num_threads() == 1
