"""The steps of a run, kept so that they can be taken again with another method and nothing else around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.enable import resolve
from diffusion_attn.core.session import bind_call

_PLACES = ("_step_index", "counter")
"""Where schedulers say how far they are, which methods ask them."""


@dataclass(frozen=True)
class Steps:
    """The calls of a denoiser in one run, each with where the scheduler stood."""

    denoiser: Any
    scheduler: Any
    calls: tuple[tuple[tuple, dict[str, Any], dict[str, Any]], ...]

    @classmethod
    def record(cls, pipe: Any, **call: Any) -> Steps:
        """Run ``pipe(**call)`` and keep what its denoiser is called with; decoding is left out."""
        denoiser: Any = resolve(pipe)[1]
        calls: list[tuple[tuple, dict[str, Any], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            places = {name: getattr(pipe.scheduler, name) for name in _PLACES if hasattr(pipe.scheduler, name)}
            calls.append((args, dict(kwargs), places))

        handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
        try:
            pipe(**call, output_type="latent")
        finally:
            handle.remove()
        return cls(denoiser, pipe.scheduler, tuple(calls))

    def take(self, index: int) -> torch.Tensor:
        """What the denoiser makes of one of the calls now."""
        args, kwargs, places = self.calls[index]
        vars(self.scheduler).update(places)
        with torch.no_grad():
            return self.denoiser(*args, **kwargs)[0]

    def take_all(self) -> None:
        """All calls, one after the other."""
        for index in range(len(self.calls)):
            self.take(index)

    @property
    def batch(self) -> int:
        """Rows of each call: pictures times guidance branches."""
        return len(self._first("sample", "hidden_states"))

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt."""
        return self._first("encoder_hidden_states").shape[1]

    def _first(self, *names: str) -> torch.Tensor:
        args, kwargs, _ = self.calls[0]
        call = bind_call(self.denoiser, args, kwargs)
        return next(call[name] for name in names if name in call)
