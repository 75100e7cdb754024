"""What all visitors of a page share: one model in memory, a folder of results, limits, and who is at work."""

from __future__ import annotations

import gc
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from diffusion_attn.cli import models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.models import Size
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import pick_device, pick_dtype
from diffusion_attn.shapes.models import available
from diffusion_attn.ui.jobs import Cancelled, Job


def is_given(value: Any) -> bool:
    """Whether a field says something: it is not empty, and no box that is not ticked."""
    return value is not None and value is not False and value not in ("", [])


class Studio:
    """The state of a running page.

    Args:
        output: the folder of results, one folder in it for each run.
        folders: diffusers folders that may be loaded; others are refused, whoever can reach the page.
        device, dtype: as the command line takes them; ``None``: the best there is.
        max_side: pixels of the longer side of a picture, at most.
        max_steps: of a run, at most.
    """

    def __init__(
        self,
        output: Path,
        folders: Sequence[str] = (),
        device: str | None = None,
        dtype: str | None = None,
        max_side: int = 2048,
        max_steps: int = 100,
    ) -> None:
        self.output, self.folders = output.expanduser().resolve(), list(folders)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self._where = {"device": device, "dtype": dtype}
        self.max_side, self.max_steps = max_side, max_steps
        self._loaded: tuple[str, Any] | None = None
        self._turn = threading.Lock()
        self._jobs: dict[tuple[str | None, str], Job] = {}

    @property
    def models(self) -> list[str]:
        """What the page offers: the embedded models, and the folders."""
        return [*sorted(available(), key=lambda name: name != "shapes-sd"), *self.folders]

    def check_model(self, name: str) -> None:
        """Refuse what may not be loaded.

        Raises:
            CommandError: ``name`` is none that the page was started with, and no Hub id; it does not tell whether
                there is such a folder.
        """
        if name not in self.models and (not models.is_hub_id(str(name)) or Path(name).exists()):
            raise CommandError(
                f"the model {name!r} is none of this page, which has {', '.join(self.models)}; give one of these, or a "
                "Hub id of the form owner/name. A folder has to be named when the page is started, with --folder."
            )

    def load(self, name: str) -> Any:
        """The pipeline called ``name``; the one before it is dropped.

        Raises:
            DiffusionAttnError: it may not, or cannot, be loaded.
        """
        self.check_model(name)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            gc.collect()
            with silence():
                pipe = models.load_model(name, self.dtype, self.device, "the model")
            pipe.set_progress_bar_config(disable=True)
            self._loaded = name, pipe
        return self._loaded[1]

    def check_limits(self, size: Size | None, steps: int | None) -> None:
        """Refuse what would keep the machine from everyone else.

        Raises:
            CommandError: names the limit.
        """
        if size is not None and max(size) > self.max_side:
            raise CommandError(
                f"the size {size[0]}x{size[1]} is beyond this page's limit of {self.max_side} pixels a side; ask for "
                "less, or start the page with a larger --max-side."
            )
        if steps is not None and steps > self.max_steps:
            raise CommandError(
                f"{steps} steps are beyond this page's limit of {self.max_steps}; ask for fewer, or start the page "
                "with a larger --max-steps."
            )

    def check_run(self, pipe: Any, args: Any, size: Size | None) -> None:
        """Refuse a run of ``pipe`` beyond the limits, with what it takes where ``args`` and ``size`` say nothing.

        Raises:
            CommandError: names the limit.
        """
        self.check_limits(size or models.native_size(pipe), args.steps or models.default_steps(pipe, args.model))

    def new_folder(self) -> Path:
        """A folder, not made yet, for the files of one run."""
        return self.output / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"

    def arguments(self, command: Any, /, **given: Any) -> Any:
        """The arguments of a command as if they had been typed, checked and with defaults; empty ones are not given.

        Raises:
            CommandError: the model is none that this page may load.
            argparse.ArgumentError: one has the wrong type.
        """
        self.check_model(given["model"])
        parser = ArgumentParser(exit_on_error=False)
        command.add_arguments(parser)
        given |= {"output": str(self.new_folder()), **self._where}
        return parser.parse_object({name: value for name, value in given.items() if is_given(value)})

    # ---- jobs

    def ask(self, visitor: str | None, tab: str) -> None:
        """Note that a visitor waits for a job, so that it can be cancelled before it begins.

        Raises:
            CommandError: one of the same tab waits or runs already.
        """
        if (visitor, tab) in self._jobs:
            raise CommandError("the run before is not over; wait for it, or cancel it.")
        self._jobs[visitor, tab] = Job(self._turn)

    def drop(self, visitor: str | None, tab: str) -> bool:
        """Forget a job that has not begun; whether there was one."""
        job = self._jobs.get((visitor, tab))
        if job is None or job.begun:
            return False
        del self._jobs[visitor, tab]
        return True

    def cancel(self, visitor: str | None, tab: str) -> bool:
        """Stop a visitor's job, or keep it from beginning; whether it had not begun."""
        job = self._jobs.get((visitor, tab))
        if job is not None:
            job.cancel()
        return job is not None and not job.begun

    def leave(self, visitor: str | None) -> None:
        """A visitor has closed the page: stop what runs for them."""
        for asked in [key for key in self._jobs if key[0] == visitor]:
            self.cancel(*asked)
            self.drop(*asked)

    @contextmanager
    def job(self, visitor: str | None, tab: str) -> Iterator[Job]:
        """The job that a visitor waits for.

        Raises:
            Cancelled: nobody does, since the visitor has left.
        """
        job = self._jobs.get((visitor, tab))
        if job is None:
            raise Cancelled
        job.begun = True
        try:
            yield job
        finally:
            self._jobs.pop((visitor, tab), None)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
