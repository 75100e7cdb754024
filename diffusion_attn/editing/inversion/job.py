"""An optimisation along the latents of an inversion, as null-text inversion and dynamic prompts both are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.editing.inversion.ddim_path import DdimPath
from diffusion_attn.editing.inversion.record import Inversion
from diffusion_attn.editing.inversion.stage import progress, stage
from diffusion_attn.editing.network import Network, frozen
from diffusion_attn.editing.text import Conditioning, encode, encode_negative

LOSS_SCALE = 2.0**14
"""Lifts gradients over the smallest half-precision numbers; a power of two changes no digit in float32."""


class Job:
    """An optimisation along the latents of an inversion, step after step from the noisiest, that can be continued.

    Args:
        pipe, inversion: as in `null_text`.
        name: of the stage.
        options: it is called with.
        negative_prompt_embeds: to start from.
    """

    def __init__(
        self, pipe: Any, inversion: Inversion, name: str, options: dict[str, Any], negative: torch.Tensor | None = None
    ) -> None:
        if options["null_start"] not in ("previous", "empty"):
            raise ValueError(f"null_start is {options['null_start']!r}; give 'previous' or 'empty'.")
        if inversion.prompt_embeds is None or not inversion.steps:
            raise ValueError("the inversion is empty; make one with ddim_invert(pipe, latents, prompt).")
        unfinished = not inversion.finished
        if unfinished and inversion.settings.get(name) != options:
            raise DiffusionAttnError(
                f"this inversion was begun by {inversion.settings} and is not finished; call the same function with "
                f"the same options, not {name} with {options}, or begin with a new inversion."
            )
        replace(inversion, null_embeds=None).check(pipe)
        self.pipe, self.options, self.name = pipe, options, name
        self.prompt = inversion.prompt or ""
        self.path = DdimPath(pipe.scheduler, timesteps=inversion.timesteps)
        self.network = Network(pipe, inversion.size)
        device = self.network.device
        self.pivots = inversion.latents.to(device).flip(0)
        self.latents = self.pivots[0]
        empty = encode_negative(pipe, None)
        self.empty = Conditioning(empty.embeds if negative is None else negative.to(device), empty.pooled)
        pooled = None if empty.pooled is None else encode(pipe, [self.prompt]).pooled
        self.text = Conditioning(inversion.prompt_embeds.to(device), pooled)
        self.size, self.words = inversion.size, inversion.words if unfinished else ()
        self.history = list(inversion.history) if unfinished else []
        self._base = inversion
        self._null: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []
        if unfinished and inversion.null_embeds is not None and inversion.reconstruction is not None:
            self._null = list(inversion.null_embeds[:, None].to(device))
            self.latents = inversion.reconstruction.to(device)
            self._rows = [] if inversion.word_embeds is None else list(inversion.word_embeds.to(device))

    @property
    def rows(self) -> torch.Tensor | None:
        """The embeddings of words after the last step."""
        return self._rows[-1] if self._rows else None

    @property
    def result(self) -> Inversion:
        """The inversion with what has been learned so far."""
        return replace(
            self._base,
            null_embeds=torch.cat(self._null) if self._null else None,
            words=self.words or self._base.words,
            word_embeds=torch.stack(self._rows) if self._rows else self._base.word_embeds,
            reconstruction=self.latents,
            history=self.history or self._base.history,
            settings={**self._base.settings, self.name: self.options},
        )

    @contextmanager
    def running(self, checkpoint: str | os.PathLike[str] | None) -> Iterator[None]:
        """Freeze the weights, and measure."""
        modules = [m for m in (self.pipe.unet, self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None)) if m]
        self._checkpoint = checkpoint
        with frozen(*modules), stage(self.network) as cost:
            yield
        self._base = self._base.with_cost(self.name, **cost)

    def steps(self) -> Iterator[int]:
        """The steps that are left; each has to call `fit_null`."""
        done = len(self._null)
        with progress(self.pipe, len(self.path), self.name.replace("_", " "), done) as bar:
            for step in range(done, len(self.path)):
                yield step
                if self._checkpoint is not None and step + 1 < len(self.path):
                    self.result.save(self._checkpoint)
                bar.update()

    def fit_null(self, step: int, predicted: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Learn the unconditional embedding of ``step``, and go on to the next latents.

        Args:
            step: of the path.
            predicted: the network's output for the prompt.
            rows: the embeddings that its words have at this step.
        """
        options, pivot = self.options, self.pivots[step + 1]
        start = self._null[-1] if self._null and options["null_start"] == "previous" else self.empty.embeds
        null = start.detach().float().clone()
        optimizer = torch.optim.Adam([null], lr=1e-2 * (1 - step / 100))
        for _ in range(options["num_null_steps"]):
            with torch.enable_grad():
                loss = F.mse_loss(self._down(step, null.requires_grad_(), predicted), pivot)
                (gradient,) = torch.autograd.grad(loss * LOSS_SCALE, null)
            null.grad = gradient / LOSS_SCALE
            optimizer.step()
            tolerance = options["null_tolerance"]
            if tolerance is not None and float(loss) < tolerance + 2e-5 * step:
                break
        null = null.detach()
        self.latents = self._down(step, null, predicted)
        self._null.append(null)
        if rows is not None:
            self._rows.append(rows)

    def _down(self, step: int, null: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        text = Conditioning(null, self.empty.pooled)
        unconditional = self.network(self.latents, self.path.timesteps[step], text)
        guided = unconditional + self.options["guidance_scale"] * (predicted - unconditional)
        return self.path.down(step, guided, self.latents)
