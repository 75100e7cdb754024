"""Pictures far larger than a model was trained for: a ladder of stock pipelines, with any method on its rungs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from diffusion_attn.core.enable import using
from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.method import Method
from diffusion_attn.core.sizes import Size, native_size, size_multiple
from diffusion_attn.methods import LowMemory
from diffusion_attn.pipelines.autoencoder import tiled
from diffusion_attn.pipelines.climb import Climb, Run, StageResult, parameters_of
from diffusion_attn.pipelines.demofusion import DemoFusion
from diffusion_attn.pipelines.ladder import Ladder, Stage
from diffusion_attn.pipelines.stage_files import StageFiles, digest

_OURS = ("image", "latents", "output_type", "return_dict", "num_images_per_prompt")
"""Arguments of stock pipelines that a stage makes itself."""


@dataclass
class HighResolutionOutput:
    """Pictures of the size that was asked for, one for each prompt, and all stages on the way to them."""

    images: list[Image.Image]
    stages: list[StageResult]


class HighResolutionPipeline:
    """Draws small, enlarges and draws anew, until the picture is as large as it is asked for.

    The first stage is a stock text-to-image pipeline at the model's native size, each further one its image-to-image
    sibling on the enlarged picture. Nothing of the given pipeline is copied or changed: what is loaded, offloaded or
    enabled there counts here.

    Args:
        text2image, image2image: pipelines that share their components; see `from_pipe`.
        methods: in force above the base, for example ``[LinFusion.for_pipeline(pipe)]``.
        base_methods: in force at the base, for example ``[HiDiffusion()]`` with ``Ladder(base_scale=2)``.
    """

    def __init__(
        self,
        text2image: Any,
        image2image: Any,
        methods: Sequence[Method] = (),
        base_methods: Sequence[Method] = (),
    ) -> None:
        self.text2image = text2image
        self.image2image = image2image
        self.methods = tuple(methods)
        self.base_methods = tuple(base_methods)
        self.finished: list[StageResult] = []
        """The stages of the last run that were finished, also where it broke off."""
        self._bar: dict[str, Any] = {}
        if not isinstance(image2image.vae, AutoencoderKL):
            raise UnsupportedModelError(
                f"the autoencoder is an {type(image2image.vae).__name__}, and an AutoencoderKL is what encodes and "
                "decodes here; give the pipeline the one that it was published with."
            )
        for chosen in (self.methods, self.base_methods):
            if chosen:
                with using(self.image2image, *chosen):
                    pass  # what does not serve this model says so before anything is drawn

    @classmethod
    def from_pipe(
        cls, pipeline: Any, methods: Sequence[Method] = (), base_methods: Sequence[Method] = ()
    ) -> HighResolutionPipeline:
        """The ladder of a stock pipeline, text-to-image or image-to-image, that has a sibling of the other kind.

        Raises:
            UnsupportedModelError: it has none, or works with a ControlNet.
        """
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image  # they load all that there are

        if getattr(pipeline, "controlnet", None) is not None:
            raise UnsupportedModelError(
                f"{type(pipeline).__name__} has a ControlNet, whose picture is of one size; give a pipeline without."
            )
        try:
            text2image = AutoPipelineForText2Image.from_pipe(pipeline)
            image2image = AutoPipelineForImage2Image.from_pipe(pipeline)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{type(pipeline).__name__} has no text-to-image and image-to-image siblings in diffusers; give a "
                "pipeline of Stable Diffusion 1, 2, XL or 3, or FLUX."
            ) from error
        for made in (text2image, image2image):
            made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return cls(text2image, image2image, methods, base_methods)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the bars over stages and steps, such as ``disable=True``."""
        self._bar = options
        for pipe in (self.text2image, self.image2image):
            pipe.set_progress_bar_config(**options)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int,
        width: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        refine_guidance_scale: float | None = None,
        ladder: str | Ladder | Sequence[Stage] | None = None,
        refine: str | DemoFusion | None = None,
        memory: str | LowMemory | None = None,
        vae_tile: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_dir: str | Path | None = None,
        resume: bool = False,
        callback_on_stage_end: Callable[[StageResult], None] | None = None,
        **kwargs: Any,
    ) -> HighResolutionOutput:
        """Draw a picture of ``height`` and ``width`` pixels for each prompt.

        Args:
            prompt: one or several, one picture each.
            height, width: of the result; where the model cannot draw it exactly, it is cut from the next larger size.
            num_inference_steps: of the schedule, of which stages above the base run their ``strength``; ``None``: the
                pipeline's default.
            guidance_scale: ``None``: the pipeline's default.
            refine_guidance_scale: above the base; ``None``: the ladder's embedded one, or else ``guidance_scale``.
            ladder: a preset (``"auto"``, ``"linfusion"``, ``"clear"``, ``"demofusion"``), a `Ladder`, or the stages
                themselves, the first without strength; ``None``: the one that belongs to ``refine``, or ``"auto"``.
            refine: ``"demofusion"`` (or its options, a `DemoFusion`): SDXL's stages above the base by DemoFusion's
                loop instead of image-to-image.
            memory: ``"low"`` or a `LowMemory` in force at all stages; ``"low"`` also tiles the autoencoder.
            vae_tile: side in pixels of the tiles in which the autoencoder works on larger pictures; ``None``: as it is
                set, or ``LOW_TILE`` times its training size with ``memory="low"``.
            generator: of all noise, one for each prompt; every stage starts from the state it has now.
            output_dir: where each stage's pictures are written as soon as they are finished.
            resume: go on after the stages that ``output_dir`` has of a run with the same settings.
            callback_on_stage_end: called with each finished stage.
            kwargs: for the stock pipelines: ``negative_prompt`` (one, or one for each prompt), ``ip_adapter_image``,
                ``callback_on_step_end``, ...

        Raises:
            ValueError, TypeError: an argument is not what it should be; nothing is drawn then.
            UnsupportedModelError: ``refine`` does not serve the model.
            DiffusionAttnError: memory or the disk is full; names the stage and what to try. Finished stages are in
                ``finished`` and in ``output_dir``.
        """
        refine = _refinement(refine)
        rule = _rule(ladder, refine)
        target = (height, width)
        if min(target) < 1:
            raise ValueError(f"height={height}, width={width}: expected pixels, 1 or more.")
        if isinstance(rule, Ladder):
            stages = rule.stages(target, self._native(), size_multiple(self.text2image))
        else:
            rule, stages = Ladder(), _checked(rule, target)
        return self._climb(
            None,
            prompt,
            target,
            stages,
            rule,
            refine,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            refine_guidance_scale=refine_guidance_scale,
            memory=memory,
            vae_tile=vae_tile,
            generator=generator,
            output_dir=output_dir,
            resume=resume,
            callback_on_stage_end=callback_on_stage_end,
            **kwargs,
        )

    def upscale(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str],
        *,
        scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float | None = None,
        ladder: str | Ladder | None = None,
        refine: str | DemoFusion | None = None,
        **options: Any,
    ) -> HighResolutionOutput:
        """Enlarge pictures and draw them anew: the stages above the base, with pictures in its place.

        Args:
            image: one for each prompt, all of one size.
            prompt: what the pictures show.
            scale: the result's sides by the pictures'; or give ``height`` and ``width`` in pixels.
            strength: of all stages; ``None``: the ladder's.
            ladder, refine, options: as in `__call__`.

        Raises:
            ValueError: the pictures or the size are not what they should be; others as `__call__`.
        """
        images = [image] if isinstance(image, Image.Image) else list(image)
        if len({picture.size for picture in images}) != 1:
            raise ValueError(f"image holds {len(images)} pictures, not all of one size; give them one by one.")
        start = images[0].size[::-1]
        if (scale is None) == (height is None or width is None):
            raise ValueError(f"scale={scale}, height={height}, width={width}: give either scale, or both sides.")
        target = (height or 0, width or 0) if scale is None else (round(start[0] * scale), round(start[1] * scale))
        if min(target) < 1:
            raise ValueError(f"the result would have {target[0]}x{target[1]} pixels; give a larger scale.")
        refine = _refinement(refine)
        rule = _rule(ladder, refine)
        if not isinstance(rule, Ladder):
            raise ValueError("ladder holds stages, of which upscale has no use for the first; give a Ladder.")
        stages = rule.above(start, target, size_multiple(self.image2image))
        if strength is not None:
            stages = [Stage(stage.height, stage.width, strength) for stage in stages]
        return self._climb(images, prompt, target, stages, rule, refine, **options)

    # ---- one run

    def _climb(
        self,
        images: list[Image.Image] | None,
        prompt: str | Sequence[str],
        target: Size,
        stages: list[Stage],
        rule: Ladder,
        refine: DemoFusion | None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        refine_guidance_scale: float | None = None,
        memory: str | LowMemory | None = None,
        vae_tile: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_dir: str | Path | None = None,
        resume: bool = False,
        callback_on_stage_end: Callable[[StageResult], None] | None = None,
        **kwargs: Any,
    ) -> HighResolutionOutput:
        transformer = getattr(self.text2image, "transformer", None)
        if refine_guidance_scale is None and transformer is not None and transformer.config.get("guidance_embeds"):
            refine_guidance_scale = rule.embedded_guidance
        run = Run(
            prompts=[prompt] if isinstance(prompt, str) else list(prompt),
            upscales=images is not None,
            methods=self.methods,
            base_methods=self.base_methods,
            target=target,
            stages=stages,
            rule=rule,
            steps=num_inference_steps,
            guidance=guidance_scale,
            refine_guidance=refine_guidance_scale,
            refine=refine,
            memory=memory,
            vae_tile=vae_tile,
            generator=generator,
            kwargs=kwargs,
        )
        self._check(run, images, resume and output_dir is None)
        images = images and [image.convert("RGB") for image in images]
        files = None
        if output_dir is not None:
            files = StageFiles(Path(output_dir).expanduser(), self._settings(run, images), resume)
        climb = Climb(run, self.text2image, self.image2image, files)
        states = [generator and generator.get_state() for generator in run.generators]
        self.finished = []
        bar = tqdm(stages, desc="stages", unit="stage", **{"leave": False, **self._bar})

        def rewind() -> None:
            for each, state in zip(run.generators, states, strict=True):
                if each is not None:
                    each.set_state(state)

        try:
            for number, stage in enumerate(bar, 1):
                bar.set_postfix_str(stage.name)
                result = climb.resumed(number, stage) if files is not None else None
                if result is None:
                    rewind()
                    result = climb.draw(number, stage, images)
                images = result.images
                self.finished.append(result)
                if callback_on_stage_end is not None:
                    callback_on_stage_end(result)
        except BaseException:
            rewind()  # so that the same call, with resume=True, is the same run
            raise
        assert images is not None
        return HighResolutionOutput([_cut(image, target) for image in images], self.finished)

    def _check(self, run: Run, images: list[Image.Image] | None, nowhere: bool) -> None:
        if nowhere:
            raise ValueError("resume=True needs the output_dir of the run that is to go on; give it.")
        if not run.prompts or (images is not None and len(images) != len(run.prompts)):
            count = "" if images is None else f" for {len(images)} pictures"
            raise ValueError(f"prompt holds {len(run.prompts)} prompts{count}; give one for each picture.")
        if isinstance(run.generator, torch.Generator) and len(run.prompts) > 1:
            raise ValueError(
                f"generator is one for {len(run.prompts)} prompts; give a list with one for each, so that each picture "
                "can be drawn again by itself."
            )
        if len(run.generators) != len(run.prompts):
            raise ValueError(f"generator holds {len(run.generators)}; give one for each of {len(run.prompts)} prompts.")
        run.kwargs = {name: list(x) if isinstance(x, tuple) and _all_text(x) else x for name, x in run.kwargs.items()}
        for name in run.texts:
            given = run.kwargs[name]
            if isinstance(given, list) and len(given) != len(run.prompts):
                raise ValueError(f"{name} holds {len(given)}; give one, or one for each prompt.")
        takes = {name for pipe in (self.text2image, self.image2image) for name in parameters_of(pipe)}
        for name in run.kwargs:
            if name == "strength":
                raise TypeError("'strength' differs from stage to stage; give ladder=Ladder(strength=...), or stages.")
            if name not in takes or name in _OURS:
                raise TypeError(f"{name!r} is no argument of a run on {type(self.text2image).__name__}; leave it out.")
            if run.refine is not None and name != "negative_prompt":
                raise TypeError(f"{name!r} is no argument of DemoFusion's loop; leave it out, or leave refine out.")
        if not (run.memory in (None, "low") or isinstance(run.memory, LowMemory)):
            raise ValueError(f"memory={run.memory!r}: expected 'low', a LowMemory, or None.")
        with tiled(self.image2image.vae, run.tile(self.image2image.vae)):
            pass
        if run.refine is not None:  # it rounds steps up
            run.refine.check(self.image2image)
            return
        steps = run.steps or parameters_of(self.image2image)["num_inference_steps"].default
        if hasattr(self.image2image, "transformer"):  # flow matching rounds up, too
            return
        for stage in run.stages:
            if stage.strength is not None and int(steps * stage.strength) < 1:
                raise ValueError(
                    f"num_inference_steps={steps} with strength={stage.strength} leaves no step at {stage.name}; give "
                    f"{math.ceil(1 / stage.strength)} or more."
                )

    def _native(self) -> Size:
        size = native_size(self.text2image)
        if size is None:
            raise ValueError(
                f"{type(self.text2image).__name__} does not record the size it was trained at; give ladder= as a list "
                "of stages."
            )
        return size

    def _settings(self, run: Run, images: list[Image.Image] | None) -> dict[str, Any]:
        """What makes the pictures of a run what they are, as far as it can be told."""
        return {
            "model": str(getattr(self.text2image.config, "_name_or_path", "") or type(self.text2image).__name__),
            "prompts": run.prompts,
            "size": list(run.target),
            "stages": [[stage.height, stage.width, stage.strength] for stage in run.stages],
            "steps": run.steps,
            "guidance": [run.guidance, run.guidance_above],
            "methods": [_described(self.base_methods), _described(self.methods)],
            "refine": str(run.refine) if run.refine else None,
            "generators": [digest(generator) for generator in run.generators],
            "from": None if images is None else [sha256(image.tobytes()).hexdigest()[:16] for image in images],
            "static_shift": run.rule.static_shift,
            "scheduler": type(self.text2image.scheduler).__name__,
            "dtype": str(self.text2image.dtype),
            "options": {name: told for name in sorted(run.kwargs) if (told := _told(run.kwargs[name])) is not None},
        }


def _rule(ladder: str | Ladder | Sequence[Stage] | None, refine: DemoFusion | None) -> Ladder | list[Stage]:
    if ladder is None:
        ladder = "demofusion" if refine is not None else "auto"
    if isinstance(ladder, str):
        if ladder not in Ladder.PRESETS:
            raise ValueError(f"ladder={ladder!r}: expected one of {', '.join(Ladder.PRESETS)}, a Ladder, or stages.")
        return Ladder.PRESETS[ladder]
    return ladder if isinstance(ladder, Ladder) else list(ladder)


def _refinement(refine: str | DemoFusion | None) -> DemoFusion | None:
    if refine is None or isinstance(refine, DemoFusion):
        return refine
    if refine != "demofusion":
        raise ValueError(f"refine={refine!r}: expected 'demofusion', a DemoFusion, or None.")
    return DemoFusion()


def _checked(stages: list[Stage], target: Size) -> list[Stage]:
    if not stages or stages[0].strength is not None or any(stage.strength is None for stage in stages[1:]):
        raise ValueError("ladder holds stages: expected the first without strength and all others with one.")
    last = stages[-1]
    if last.height < target[0] or last.width < target[1]:
        raise ValueError(f"ladder ends at {last.name}, below height={target[0]}, width={target[1]}; add a stage.")
    return stages


def _cut(image: Image.Image, target: Size) -> Image.Image:
    """The middle of a picture that is larger than the target by what the model needs."""
    if image.size == target[::-1]:
        return image
    left, top = (image.width - target[1]) // 2, (image.height - target[0]) // 2
    return image.crop((left, top, left + target[1], top + target[0]))


def _described(methods: Sequence[Method]) -> list[str]:
    """Methods with their options, without what their own text leaves out: weights."""
    return [
        f"{m.name}({', '.join(f'{f.name}={getattr(m, f.name)!r}' for f in fields(m) if f.repr)})"  # type: ignore[arg-type]
        for m in methods
    ]


def _all_text(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _told(value: Any) -> Any:
    """An option as JSON tells it: plain values as they are, pictures and tensors by a digest, others not at all."""
    if isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_told(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _told(each) for name, each in value.items()}
    if isinstance(value, Image.Image):
        return sha256(value.tobytes()).hexdigest()[:16]
    if isinstance(value, torch.Tensor):
        return sha256(value.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]
    return None
