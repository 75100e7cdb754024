"""What an inversion knows of a picture, and the file it lives in."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from diffusion_attn.core.errors import CheckpointFormatError, DiffusionAttnError
from diffusion_attn.core.files import written
from diffusion_attn.core.reading import parse_json
from diffusion_attn.core.tensors import open_tensors, read_tensors
from diffusion_attn.editing.attention import AttentionControl, MapRecorder
from diffusion_attn.editing.maps import AttentionMaps, Text
from diffusion_attn.editing.network import Network
from diffusion_attn.editing.text import LearnedWords, encode, text_encoders
from diffusion_attn.version import __version__

_FORMAT = "diffusion-attn inversion 1"
_DIMENSIONS = {
    "latents": 5,
    "timesteps": 1,
    "prompt_embeds": 3,
    "null_embeds": 3,
    "word_embeds": 3,
    "background": 2,
    "reconstruction": 4,
}
_KINDS: dict[str, Any] = {
    "prompt": (str, type(None)),
    "direct": bool,
    "history": list,
    "settings": dict,
    "cost": dict,
}


@dataclass(kw_only=True)
class Inversion:
    """A picture as latents along a schedule, with what was learned to come back to it.

    Attributes:
        latents: ``(N + 1, 1, C, h, w)`` float32, from the picture ``[0]`` to the noisiest ``[N]``.
        timesteps: ``(N,)`` long, noisiest first.
        prompt: that describes the picture.
        prompt_embeds: ``(1, L, D)``.
        null_embeds: ``(N, L, D)``, unconditional embeddings learned for each step; fewer while that is not finished.
        words: whose embeddings were learned.
        word_embeds: ``(N, K, D)``, their input embeddings at each step, one for each of their tokens.
        background: ``(H, W)`` bool, where the words were found not to be.
        reconstruction: ``(1, C, h, w)``, where sampling with what was learned ends.
        direct: the source is put back on ``latents`` after each step of sampling.
        history: one entry for each evaluation of the losses of words.
        settings: of each stage, as it was called.
        cost: of each stage: calls of the UNet, seconds, peak memory in bytes.
        model: numbers that tell the pipeline it belongs to from others.
    """

    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    timesteps: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    prompt: str | None = None
    prompt_embeds: torch.Tensor | None = None
    null_embeds: torch.Tensor | None = None
    words: tuple[str, ...] = ()
    word_embeds: torch.Tensor | None = None
    background: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    direct: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    model: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        """``N``."""
        return len(self.timesteps)

    @property
    def size(self) -> tuple[int, int]:
        """``(h, w)`` of the latents."""
        return self.latents.shape[-2], self.latents.shape[-1]

    @property
    def finished(self) -> bool:
        """Whether something was learned for every step, or nothing for any."""
        return self.null_embeds is None or len(self.null_embeds) == self.steps

    def learned(self, step: int) -> LearnedWords | None:
        """The embeddings of its words at ``step``."""
        return None if self.word_embeds is None else LearnedWords(self.words, self.word_embeds[step], self.prompt or "")

    def check(self, pipe: Any) -> None:
        """Make sure that it can be used with ``pipe``.

        Raises:
            DiffusionAttnError: it is of another model, or not finished.
        """
        if self.null_embeds is not None and not self.finished:
            raise DiffusionAttnError(
                f"this inversion ends at step {len(self.null_embeds)} of {self.steps}; finish it by calling the "
                "function that began it again, with the same options."
            )
        numbers, known = torch.tensor(fingerprint(pipe)), torch.tensor(self.model)
        if len(numbers) and len(known) and not torch.allclose(numbers, known, rtol=2e-2, atol=1e-4):
            raise DiffusionAttnError(
                f"this inversion of {self.prompt!r} was made with other weights than those of this "
                f"{type(pipe).__name__}; load that model, or invert the picture again."
            )

    @torch.no_grad()
    def attention_maps(self, pipe: Any) -> AttentionMaps:
        """What each word of the prompt attends to along the inverted latents, with the embeddings that were learned.

        Args:
            pipe: the pipeline that it was made with.

        Raises:
            DiffusionAttnError: it is of another model, or not finished.
            ValueError: it has no prompt.
        """
        self.check(pipe)
        if self.prompt is None:
            raise ValueError("the inversion has no prompt, in which words could be found.")
        maps = AttentionMaps([Text(text_encoders(pipe)[0][0])])
        maps.prompts = [self.prompt]
        recorder, network = MapRecorder("cross"), Network(pipe, self.size)
        text = encode(pipe, [self.prompt])
        with AttentionControl(self.size, recorders=[recorder]).on(pipe.unet):
            for step, timestep in enumerate(self.timesteps.tolist()):
                if (learned := self.learned(step)) is not None:
                    text = encode(pipe, [self.prompt], learned)
                network(self.latents[self.steps - step], timestep, text)
                maps.add(recorder.take())
        return maps

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all: tensors, and the rest as JSON in its metadata."""
        from safetensors.torch import save_file

        tensors, rest = {}, {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, torch.Tensor):
                tensors[each.name] = value.detach().cpu().clone().contiguous()
            else:
                rest[each.name] = value
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": _FORMAT, "version": __version__, "inversion": json.dumps(rest)}
        with written(path) as part:
            save_file(tensors, part, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Inversion:
        """Read what `save` has written.

        Raises:
            CheckpointFormatError: it is another kind of file.
        """
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise CheckpointFormatError(
                f"{os.fspath(path)!r} is not an inversion ({metadata.get('format', 'no format named')!r} where "
                f"{_FORMAT!r} is expected); give a file that Inversion.save has written."
            )
        try:
            rest = parse_json(metadata.get("inversion", ""))
            for name in ("words", "model"):
                rest[name] = tuple(rest[name])
            inversion = cls(**{**rest, **read_tensors(path)})
            inversion._check_parts()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointFormatError(
                f"{os.fspath(path)!r} is a damaged inversion ({error}); invert the picture again."
            ) from error
        return inversion

    def _check_parts(self) -> None:
        """Make sure that parts are of the types and shapes that the class tells of.

        Raises:
            ValueError: names one that is not.
        """
        for name, right in (
            *((name, _is_tensor(getattr(self, name), ndim)) for name, ndim in _DIMENSIONS.items()),
            *((name, isinstance(getattr(self, name), kind)) for name, kind in _KINDS.items()),
            ("latents", len(self.latents) == self.steps + 1),
            ("null_embeds", self.null_embeds is None or len(self.null_embeds) <= self.steps),
            ("word_embeds", self.word_embeds is None or not self.finished or len(self.word_embeds) == self.steps),
            ("words", all(isinstance(word, str) for word in self.words)),
            ("model", all(isinstance(number, (int, float)) for number in self.model)),
            ("history", all(isinstance(each, dict) for each in self.history)),
            ("settings", all(isinstance(each, dict) for each in self.settings.values())),
            ("cost", all(isinstance(each, dict) for each in self.cost.values())),
        ):
            if not right:
                raise ValueError(f"{name} is not what it should be")

    def with_cost(self, stage: str, **cost: float) -> Inversion:
        """The same with what one more stage has cost."""
        return replace(self, cost={**self.cost, stage: cost})


def _is_tensor(x: Any, ndim: int) -> bool:
    """Whether ``x`` is a tensor of so many dimensions, or ``None``."""
    return x is None or (isinstance(x, torch.Tensor) and x.ndim == ndim)


def fingerprint(pipe: Any) -> tuple[float, ...]:
    """A few numbers of the UNet and of the text encoder, the same in every precision to within 1 %."""
    sources = [pipe.unet.conv_in.weight, pipe.unet.time_embedding.linear_1.weight, pipe.unet.conv_out.weight]
    sources.append(pipe.text_encoder.get_input_embeddings().weight)
    if any(x.is_meta for x in sources):  # offloaded one by one: there is nothing to read
        return ()
    return tuple(float(value) for x in sources for value in x.detach().flatten()[:4].float())
