"""Silence for ``--quiet``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def silence(active: bool = True) -> Iterator[None]:
    """No log lines, warnings and progress bars of the libraries inside the block, if ``active``.

    The standard streams are left alone: log handlers that are made inside would keep what they were redirected to.
    """
    if not active:
        yield
        return
    with ExitStack() as after:
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        after.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")

        from diffusers.utils import logging as diffusers_logging
        from huggingface_hub import utils as hub
        from transformers.utils import logging as transformers_logging

        if not hub.are_progress_bars_disabled():
            hub.disable_progress_bars()
            after.callback(hub.enable_progress_bars)
        for library in (diffusers_logging, transformers_logging):
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                after.callback(library.enable_progress_bar)
        yield
