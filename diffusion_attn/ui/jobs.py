"""Work that tells how far it is while it goes on, and that stops when it is told to."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Cancelled(KeyboardInterrupt):
    """A job was told to stop. What handles Ctrl-C handles this: methods are taken off, finished stages kept."""


class _Notes(logging.Handler):
    """Keeps messages, each once."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.notes:
            self.notes.append(text)


class Job:
    """One piece of work, in a thread of its own.

    Args:
        turn: held while it works; jobs that share one never work at the same time.

    Attributes:
        begun: whether it no longer waits for its turn.
        notes: what methods had to say in the meantime, each once, such as that they stay off.
    """

    def __init__(self, turn: threading.Lock) -> None:
        self._turn = turn
        self.begun = False
        self.notes: list[str] = []
        self._stop = threading.Event()
        self._updates: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def cancel(self) -> None:
        """Let the work end at its next step, or before it has begun."""
        self._stop.set()

    def check(self) -> None:
        """Called by the work wherever it may end.

        Raises:
            Cancelled: it was told to.
        """
        if self._stop.is_set():
            raise Cancelled

    def tell(self, update: Any) -> None:
        """Called by the work: what `run` gives next."""
        self.check()
        self._updates.put((False, update))

    def run(self, work: Callable[[], Any]) -> Iterator[Any]:
        """Do ``work``; gives what it tells, and at last what it returns.

        Where nobody takes what it gives any more the work is stopped, but not waited for: that would keep the server.

        Raises:
            Cancelled: it was stopped.
            Exception: what the work raised.
        """
        self.check()
        threading.Thread(target=self._do, args=(work,), daemon=True).start()
        try:
            over = False
            while not over:
                over, update = self._updates.get()
                if isinstance(update, BaseException):
                    raise update
                yield update
        finally:
            self.cancel()

    def _do(self, work: Callable[[], Any]) -> None:
        handler = _Notes(self.notes)
        logger = logging.getLogger("diffusion_attn")
        with self._turn:
            logger.addHandler(handler)
            try:
                self.check()
                result = work()
            except BaseException as error:
                result = error
            finally:
                logger.removeHandler(handler)
        self._updates.put((True, result))

    @contextmanager
    def watching(self, pipe: Any, each: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """Inside the block the work may end before every forward pass of the denoiser of ``pipe``, whoever calls it.

        Args:
            each: is called before each of them, if the work goes on.
        """
        denoiser = getattr(pipe, "unet", None) or pipe.transformer

        def before(module: Any, args: Any) -> None:
            self.check()
            each()

        handle = denoiser.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()
