"""A run of `HighResolutionPipeline` in progress: one stage after the other, each by a stock pipeline."""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.enable import using
from diffusion_attn.core.errors import DiffusionAttnError, is_out_of_memory
from diffusion_attn.core.method import Method
from diffusion_attn.core.sizes import Size, native_size
from diffusion_attn.methods import LowMemory
from diffusion_attn.metrics.cost import measure
from diffusion_attn.pipelines.autoencoder import decode, encode, tiled
from diffusion_attn.pipelines.demofusion import DemoFusion
from diffusion_attn.pipelines.ladder import Ladder, Stage
from diffusion_attn.pipelines.pictures import to_picture, to_pixels
from diffusion_attn.pipelines.stage_files import StageFiles

LOW_TILE = 2
"""With ``memory="low"``, pictures are encoded and decoded in tiles of so many times the autoencoder's training size."""


@dataclass
class StageResult:
    """A finished stage.

    Attributes:
        stage: its size and strength.
        images: a PIL picture for each prompt.
        methods: names of what was enabled.
        seconds: it took.
        peak_memory_bytes: it needed above what was in use before, see `metrics.cost`.
        files: where the pictures are, if they were written.
    """

    stage: Stage
    images: list[Image.Image]
    methods: list[str]
    seconds: float
    peak_memory_bytes: int
    files: list[Path] = field(default_factory=list)


@dataclass
class Run:
    """The arguments of a call, with the stages that they come to."""

    prompts: list[str]
    upscales: bool
    methods: tuple[Method, ...]
    base_methods: tuple[Method, ...]
    target: Size
    stages: list[Stage]
    rule: Ladder
    steps: int | None
    guidance: float | None
    refine_guidance: float | None
    refine: DemoFusion | None
    memory: str | LowMemory | None
    vae_tile: int | None
    generator: Any
    kwargs: dict[str, Any]

    @property
    def generators(self) -> list[torch.Generator | None]:
        """One for each prompt."""
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return [self.generator] * len(self.prompts)
        return list(self.generator)

    @property
    def guidance_above(self) -> float | None:
        """The guidance scale of stages above the base."""
        return self.guidance if self.refine_guidance is None else self.refine_guidance

    def methods_of(self, base: bool) -> tuple[Method, ...]:
        """What is in force at the base, or above it; ``memory`` takes the place of a `LowMemory` among the methods."""
        methods = self.base_methods if base else self.methods
        if self.memory is None:
            return methods
        low = LowMemory() if isinstance(self.memory, str) else self.memory
        return (*(method for method in methods if not isinstance(method, LowMemory)), low)

    @property
    def texts(self) -> list[str]:
        """The arguments that are a text, or one for each picture."""
        return [
            name
            for name, value in self.kwargs.items()
            if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
        ]

    def text_of(self, name: str, index: int) -> str | None:
        """The text ``name``, such as ``"negative_prompt"``, of picture ``index``, if there is one."""
        given = self.kwargs.get(name)
        return given[index] if isinstance(given, list) else given

    def tile(self, vae: Any) -> int | None:
        """Side in pixels of the autoencoder's tiles; ``None``: as it is set."""
        if self.vae_tile is None and self.memory == "low":
            return LOW_TILE * vae.config.sample_size
        return self.vae_tile


class Climb:
    """A run in progress."""

    def __init__(self, run: Run, text2image: Any, image2image: Any, files: StageFiles | None) -> None:
        self.run, self.text2image, self.image2image, self.files = run, text2image, image2image, files
        self.anchors: list[torch.Tensor] = []

    def resumed(self, number: int, stage: Stage) -> StageResult | None:
        """A stage that an earlier run has finished."""
        assert self.files is not None
        found = self.files.load(number, stage, len(self.run.prompts))
        if found is None or (self._anchors_needed(stage) and not self._load_anchors()):
            return None
        images, record = found
        paths = [self.files.path(number, stage, index) for index in range(len(images))]
        return StageResult(stage, images, **record, files=paths)

    def draw(self, number: int, stage: Stage, images: list[Image.Image] | None) -> StageResult:
        """Draw a stage from noise, or from the pictures of the stage before."""
        base = stage.strength is None
        pipe = self.text2image if base else self.image2image
        methods = self.run.methods_of(base)
        try:
            with ExitStack() as stack, measure(pipe._execution_device) as cost:
                if methods:
                    stack.enter_context(using(pipe, *methods))
                stack.enter_context(tiled(pipe.vae, self.run.tile(pipe.vae)))
                drawn = [
                    self._base(stage, index) if images is None or base else self._above(stage, index, images[index])
                    for index in range(len(self.run.prompts))
                ]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DiffusionAttnError(self._remedy(number, stage)) from error
        record: dict[str, Any] = {
            "methods": [method.name for method in methods],
            "seconds": round(cost.seconds, 3),
            "peak_memory_bytes": cost.peak_bytes,
        }
        paths = []
        if self.files is not None:
            latents = torch.cat(self.anchors) if self._anchors_needed(stage) else None
            paths = self.files.save(number, stage, drawn, record, latents)
        return StageResult(stage, drawn, **record, files=paths)

    def _base(self, stage: Stage, index: int) -> Image.Image:
        pipe = self.text2image
        call = self._call(pipe, index, self.run.guidance) | {"height": stage.height, "width": stage.width}
        if self.run.refine is not None:  # DemoFusion tells the UNet of the final size from the first stage on
            final = (self.run.stages[-1].height, self.run.stages[-1].width)
            call |= {"original_size": final, "target_size": final}
        latents = pipe(**call, output_type="latent").images
        if self.run.refine is not None:
            self.anchors.append(latents.float())
        return self._decoded(pipe, latents, stage)

    def _above(self, stage: Stage, index: int, image: Image.Image) -> Image.Image:
        pipe = self.image2image
        pixels = to_pixels(image.resize((stage.width, stage.height)))
        call = self._call(pipe, index, self.run.guidance_above)
        latents = encode(pipe, pixels, call["generator"])
        refined = (self._refined if self.run.refine is not None else self._redrawn)(stage, index, latents, call)
        return self._decoded(pipe, refined, stage)

    def _decoded(self, pipe: Any, latents: torch.Tensor, stage: Stage) -> Image.Image:
        picture = to_picture(decode(pipe, latents, (stage.height, stage.width))[0])
        pipe.maybe_free_model_hooks()
        return picture

    def _redrawn(self, stage: Stage, index: int, latents: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
        pipe = self.image2image
        if "height" in parameters_of(pipe):
            call |= {"height": stage.height, "width": stage.width}
        scheduler = pipe.scheduler
        if self.run.rule.static_shift is not None and scheduler.config.get("use_dynamic_shifting"):
            shift = self.run.rule.static_shift
            pipe.scheduler = scheduler.from_config(scheduler.config, use_dynamic_shifting=False, shift=shift)
        try:
            return pipe(image=latents, strength=stage.strength, **call, output_type="latent").images
        finally:
            pipe.scheduler = scheduler

    def _refined(self, stage: Stage, index: int, latents: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
        pipe, run = self.image2image, self.run
        assert run.refine is not None
        native = native_size(pipe) or run.target
        return run.refine.refine(
            pipe,
            latents,
            ratio=max(2, math.ceil(max(stage.height, stage.width) / max(native) - 0.05)),
            strength=stage.strength or 1.0,
            num_inference_steps=call["num_inference_steps"],
            guidance_scale=call.get("guidance_scale", parameters_of(pipe)["guidance_scale"].default),
            prompt=run.prompts[index],
            negative_prompt=run.text_of("negative_prompt", index),
            anchor=None if run.upscales else self.anchors[index],
            generator=call["generator"],
            size=(run.stages[-1].height, run.stages[-1].width),
            unscaled_start=not run.upscales,
        )

    def _call(self, pipe: Any, index: int, guidance: float | None) -> dict[str, Any]:
        """The arguments of a stock pipeline for one picture."""
        takes = parameters_of(pipe)
        default = takes["num_inference_steps"].default
        own = {name: value for name, value in self.run.kwargs.items() if name in takes}
        own |= {name: [self.run.text_of(name, index)] for name in self.run.texts if name in own}
        return {
            **call_arguments(pipe, [self.run.prompts[index]], guidance),
            "num_inference_steps": self.run.steps or default,
            "generator": self.run.generators[index],
            **own,
        }

    def _anchors_needed(self, stage: Stage) -> bool:
        return self.run.refine is not None and stage.strength is None

    def _load_anchors(self) -> bool:
        assert self.files is not None
        latents = self.files.load_latents()
        self.anchors = [] if latents is None else list(latents.to(self.text2image._execution_device).split(1))
        return latents is not None

    def _remedy(self, number: int, stage: Stage) -> str:
        tries = [] if self.run.memory is not None else ["memory='low'"]
        tile = self.run.tile(self.image2image.vae)
        tries.append("vae_tile=512" if tile is None else f"vae_tile={max(tile // 128 * 64, 64)}")
        if not self.run.methods:
            tries.append("a method that is linear in pixels, such as LinFusion or CLEAR,")
        done = f"{number - 1} of {len(self.run.stages)} stages are finished"
        kept = f" and in {self.files.folder}, from where resume=True goes on" if self.files is not None else ""
        where = f"stage {number} ({stage.name})"
        return f"memory ran out in {where}; try {' or '.join(tries)} or a smaller size. {done}{kept}."


def parameters_of(pipe: Any) -> Any:
    """What a pipeline's call takes."""
    return inspect.signature(pipe.__call__).parameters
