"""What a piece of work costs: seconds and peak memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

_INTERVAL = 0.005  # seconds between looks at the process's memory


@dataclass
class Cost:
    """Time in seconds, and the most memory that was in use above what was in use before, in bytes.

    On a CUDA device memory is what the allocator handed out there; elsewhere it is the resident memory of the process.
    """

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measure(device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> Iterator[Cost]:
    """Measure what runs inside the ``with`` block, on the wall clock or another; read the `Cost` after it."""
    cost = Cost()
    cuda = torch.device(device).type == "cuda"
    with _watch_cuda(cost, device) if cuda else _watch_process(cost):
        began = clock()
        yield cost
        if cuda:
            torch.cuda.synchronize(device)
        cost.seconds = clock() - began


@contextmanager
def _watch_cuda(cost: Cost, device: torch.device | str) -> Iterator[None]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    cost.peak_bytes = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _watch_process(cost: Cost) -> Iterator[None]:
    _release_free_memory()
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(_INTERVAL):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        cost.peak_bytes = max(peak, process.memory_info().rss) - before


def _release_free_memory() -> None:
    """Hand memory that is free already back to the system, where the C library has a way to.

    It otherwise stays with the process, and a second run that needs no more than the first would show a peak of zero.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
