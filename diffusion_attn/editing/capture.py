"""Looking at attention: what each word of a prompt attends to while any pipeline draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from diffusion_attn.core.context import Schedule
from diffusion_attn.core.enable import resolve
from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.joint_layout import read_grid
from diffusion_attn.core.session import FLUX_UNIT, bind_call
from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.attention import MapRecorder, mean_map
from diffusion_attn.editing.layers import AttentionLayer, attention_layers, grid_of
from diffusion_attn.editing.maps import AttentionMaps, Text
from diffusion_attn.editing.processors import Fused, controlled


@contextmanager
def record(
    pipe: Any,
    words: Sequence[str] | None = None,
    *,
    prompt: str | Sequence[str] | None = None,
    finest: int = 1,
    levels: bool = False,
) -> Iterator[AttentionMaps]:
    """Record what each word attends to while ``pipe`` draws inside the block; the picture does not change.

    Serves UNet pipelines (Stable Diffusion, XL, with ControlNet, adapters, LoRA) and, through the text columns of their
    joint attention, FLUX and SD3. Cross-attention of all levels is averaged, brought to the size of the finest. Of
    several runs in the block the last one counts.

    Args:
        pipe: a text-to-image pipeline.
        words: of which every step is kept too, and that have to be in the prompt; ``None``: any word can be asked for.
        prompt: only needed when the pipeline is called with embeddings.
        finest: leave out levels whose sides are less than ``finest`` times smaller than the latent's.
        levels: keep the maps of each level by itself too, in `AttentionMaps.levels`.

    Raises:
        UnsupportedModelError: the pipeline has no attention that can be read.
        MethodConflictError: a method in force computes it.
        ValueError: a word is not in the prompt (raised when the pipeline is called).
    """
    pipeline, denoiser = resolve(pipe)
    if pipeline is None:
        raise UnsupportedModelError(f"record() takes a pipeline, whose prompt it reads, not a {type(pipe).__name__}.")
    layers = [x for x in attention_layers(denoiser) if x.kind in ("cross", "joint") and x.factor >= finest]
    if not layers:
        raise UnsupportedModelError(
            f"{type(denoiser).__name__} has no cross-attention that is {finest} times smaller than its latent or more; "
            "record() reads UNets with cross-attention, FLUX and SD3."
        )
    texts = _texts(pipeline)
    maps = AttentionMaps(texts, words, [layer.factor for layer in layers] if levels else ())
    reader = _Reader(pipeline, maps, [prompt] if isinstance(prompt, str) else list(prompt or ()))
    with ExitStack() as stack:
        stack.enter_context(controlled(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, layers, reader))
        encoder = texts[0].encoder
        if encoder is not None:
            stack.callback(encoder.register_forward_pre_hook(reader.read_prompt, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_pre_hook(reader.enter, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_hook(reader.leave).remove)
        yield maps


def _texts(pipe: Any) -> list[Text]:
    part = lambda name: getattr(pipe, name, None)  # noqa: E731
    if part("tokenizer_3") is not None or part("text_encoder_3") is not None:
        first = Text(pipe.tokenizer, pipe.text_encoder)
        if part("tokenizer_3") is None:
            return [first]
        return [first, Text(pipe.tokenizer_3, pipe.text_encoder_3, pipe.tokenizer.model_max_length)]
    if part("transformer") is not None:
        return [Text(pipe.tokenizer_2, pipe.text_encoder_2)]
    if part("tokenizer") is not None:
        return [Text(pipe.tokenizer, pipe.text_encoder)]
    return [Text(pipe.tokenizer_2, pipe.text_encoder_2)]  # the refiner of SDXL


class _Reader:
    """Reads the maps of each forward pass of a denoiser, and knows the prompts from their tokens."""

    def __init__(self, pipe: Any, maps: AttentionMaps, prompts: list[str]) -> None:
        self.pipe, self.maps, self.given = pipe, maps, prompts
        self.tokenizer = maps.texts[0].tokenizer
        self.schedule = Schedule(pipe)
        self.prompts: list[str] = []
        self.size: Size = (0, 0)
        self.text = 0
        self.step = -1  # the last one that was recorded
        self.timesteps: Any = None  # of the run
        self.reading = False
        self.recorder = MapRecorder("cross")
        self.of_levels = {factor: MapRecorder("cross") for factor in maps.levels}

    def read_prompt(self, encoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """The first text that is encoded for a run is the prompt; negative ones come after it."""
        if self.prompts:
            return
        ids = args[0] if args else kwargs["input_ids"]
        self.prompts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def enter(self, denoiser: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward pass: where it stands, and how its tokens lie."""
        call = bind_call(denoiser, args, kwargs)
        flux = "img_ids" in call
        step, _, _ = self.schedule.locate(call["timestep"], FLUX_UNIT if flux else 1)
        # Further calls at a step are of other branches of the guidance.
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        fresh, self.timesteps = timesteps is not self.timesteps, timesteps  # every run sets its own
        self.reading = fresh or step > self.step
        if not self.reading:
            return
        for recorder in (self.recorder, *self.of_levels.values()):
            recorder.begin()
        self.step = step
        prompts, self.prompts = self.prompts, []
        if fresh:
            self.maps.begin(self.given or prompts)
            self.maps.check_words()
        self.text = call["encoder_hidden_states"].shape[1]
        if flux:
            self.size, _ = read_grid(call["img_ids"])
        elif "sample" in call:
            self.size = tuple(call["sample"].shape[-2:])
        else:
            patch = denoiser.config.patch_size
            height, width = call["hidden_states"].shape[-2:]
            self.size = height // patch, width // patch

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        fused: Fused,
    ) -> torch.Tensor:
        """The fused attention, while its map is added to the others."""
        out = fused(query, key, value, mask)
        if self.reading and layer.kind != "image":
            first = len(query) // 2 if getattr(self.pipe, "do_classifier_free_guidance", False) else 0
            picture = query[first:, self.text :] if layer.kind == "joint" else query[first:]
            if mask is not None:
                mask = mask[first:].expand(-1, -1, query.shape[1], -1)[:, :, -picture.shape[1] :]
            mean = mean_map(picture, key[first:], mask, keys=self.text)
            grid = grid_of(picture.shape[1], self.size)
            self.recorder.add(mean, grid)
            if layer.factor in self.of_levels:
                self.of_levels[layer.factor].add(mean, grid)
        return out

    def leave(self, denoiser: Any, args: tuple, output: Any) -> None:
        """After a forward pass: one map of all its layers."""
        if self.reading:
            self.maps.add(self.recorder.take())
            for factor, recorder in self.of_levels.items():
                self.maps.levels[factor].add(recorder.take())
