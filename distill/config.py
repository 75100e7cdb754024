"""What a distillation run is: a tree of frozen dataclasses, read from YAML, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.files import save_text
from diffusion_attn.core.reading import read_yaml
from diffusion_attn.methods import METHODS

RECIPES = Path(__file__).parent / "recipes"
"""The recipes that come with the package."""

SEEDS = 2**32
"""Seeds are below this."""


class ConfigError(DiffusionAttnError, ValueError):
    """A recipe or an override says something that cannot be done."""


@dataclass(frozen=True)
class ModelConfig:
    """The teacher, which is the student's frozen base as well.

    Args:
        name: an embedded model, a local diffusers folder, or a Hub id of a Stable Diffusion, SDXL or FLUX.1 pipeline.
        guidance: what teacher and student are given where guidance is an input of the model (FLUX.1-dev), of no effect
            elsewhere; by default the pipeline's own.
    """

    name: str = "shapes-sd"
    guidance: float | None = None

    def __post_init__(self) -> None:
        _check(bool(self.name.strip()), "model.name", self.name, "an embedded model, a folder or a Hub id")
        _check(self.guidance is None or self.guidance >= 0, "model.guidance", self.guidance, "0 or more, or null")


@dataclass(frozen=True)
class MethodConfig:
    """The student: the method whose weights are trained.

    Args:
        name: the method's name.
        weights: folder or Hub id of weights to start from; without, they start from the teacher's own.
        mid_divisor: of LinFusion, the inner width of the projections is the layer's width divided by this (1 for SD, 16
            for SDXL); only without ``weights``, which have theirs.
        radius: of Clear, in image tokens; by default that of the method, or of ``weights``.
        down_factor: of Clear, the side of the cells that are pooled; by default as ``radius``.
    """

    name: str = "linfusion"
    weights: str | None = None
    mid_divisor: int = 1
    radius: int | None = None
    down_factor: int | None = None

    def __post_init__(self) -> None:
        trainable = [name for name, method in METHODS.items() if hasattr(method, "for_model")]
        _check(self.name in trainable, "method.name", self.name, f"a method with weights: {', '.join(trainable)}")
        for name, owner, default in (
            ("mid_divisor", "linfusion", 1),
            ("radius", "clear", None),
            ("down_factor", "clear", None),
        ):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"method.{name}", value, "1 or more")
            fits = value == default or self.name == owner
            _check(fits, f"method.{name}", value, f"method.name {owner!r}, whose it is, and not {self.name!r}")


@dataclass(frozen=True)
class DataConfig:
    """Pictures with captions.

    Args:
        source: ``"folder"``, pictures with captions in files; ``"webdataset"``, tar files; ``"hub"``, a dataset of the
            Hugging Face Hub or one in their format; ``"cache"``, what ``diffusion-attn distill cache`` made; or
            ``"shapes"``, scenes drawn by code.
        path: the folder; a tar file, a folder of them, or a pattern such as ``train-*.tar``; or the dataset's id.
        split: of a dataset of source ``"hub"``.
        image_column: of a dataset of source ``"hub"``.
        caption_column: of a dataset, of ``metadata.jsonl`` and ``captions.csv``, or of the JSON in a tar file.
        size: side of the training pictures in pixels; by default the model's own.
        text_tokens: length of captions, of FLUX, 512 at most; by default what pictures are drawn with.
        fit: how a picture becomes a square: ``"squash"`` (bicubic) or ``"crop"`` (shorter side to size, centre); or
            ``"bucket"``: it does not, but is cropped to the nearest of several shapes with about as many pixels.
        max_aspect: longer side by shorter side of the longest bucket.
        caption_dropout: share of captions that are replaced by the empty one.
        latent: of the autoencoder's posterior, ``"sample"`` (what large models are trained on) or ``"mean"``.
        max_broken: share of the pictures that may turn out to be unreadable before the run stops.
        workers: processes that load pictures beside the training.
    """

    source: Literal["folder", "webdataset", "hub", "cache", "shapes"] = "folder"
    path: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    size: int | None = None
    text_tokens: int | None = None
    fit: Literal["squash", "crop", "bucket"] = "squash"
    max_aspect: float = 2.0
    caption_dropout: float = 0.0
    latent: Literal["sample", "mean"] = "sample"
    max_broken: float = 0.01
    workers: int = 0

    def __post_init__(self) -> None:
        _check(self.size is None or self.size >= 8, "data.size", self.size, "8 pixels or more, or null")
        tokens = self.text_tokens
        _check(tokens is None or 1 <= tokens <= 512, "data.text_tokens", tokens, "1 to 512, or null")
        _check(1 <= self.max_aspect <= 8, "data.max_aspect", self.max_aspect, "a ratio, 1 to 8")
        _check(0 <= self.caption_dropout < 1, "data.caption_dropout", self.caption_dropout, "a share, 0 to below 1")
        _check(0 <= self.max_broken <= 1, "data.max_broken", self.max_broken, "a share, 0 to 1")
        _check(self.workers >= 0, "data.workers", self.workers, "0 or more")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss; a term of weight 0 is not computed.

    Args:
        target: error against what the denoiser should predict: noise or velocity, as the model does.
        prediction: error against the teacher's prediction.
        guided: error against the teacher's prediction under guidance. Every picture is then predicted with its caption
            and without, at the same noise, and all terms count both: a step costs twice.
        guidance_scale: of ``guided``.
        attention: error against the outputs of the teacher's attention, the mean over layers.
        layers: a regular expression; ``attention`` takes only layers whose name it is found in.
        shift: every noise level is as likely at 1; above, high ones are likelier, as a scheduler's shift has them.
    """

    target: float = 1.0
    prediction: float = 0.5
    guided: float = 0.0
    guidance_scale: float = 3.0
    attention: float = 0.5
    layers: str = ""
    shift: float = 1.0

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("target", "prediction", "guided", "attention")}
        for name, weight in weights.items():
            _check(weight >= 0, f"loss.{name}", weight, "a weight, 0 or more")
        _check(any(weights.values()), "loss", weights, "one weight above 0 at least")
        scale = self.guidance_scale
        _check(1 < scale < float("inf"), "loss.guidance_scale", scale, "a scale above 1, such as 3")
        _check(0 < self.shift < float("inf"), "loss.shift", self.shift, "a number above 0, such as 3")
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ConfigError(f"loss.layers={self.layers!r}: expected a regular expression; {error}.") from error


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its batches.

    Args:
        name: ``"adamw"``, or ``"prodigy"`` (pip install prodigyopt), which finds its own rate: give it lr 1.
        lr: learning rate.
        weight_decay: of the optimiser.
        betas: of the optimiser.
        schedule: of the learning rate over the run's steps, one of diffusers' schedules.
        warmup_steps: steps in which the rate rises from 0, where the schedule has a warm-up.
        max_grad_norm: gradients are scaled down to this norm; null: never.
        ema_decay: weights are averaged over steps with this decay at most, and the averages saved; null: no averaging.
        batch_size: pictures of one optimiser step, over all processes.
        micro_batch: pictures of one forward pass of one process; the rest of ``batch_size`` is accumulated.
    """

    name: Literal["adamw", "prodigy"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        "constant"
    )
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    batch_size: int = 8
    micro_batch: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        _check(self.lr > 0, "optim.lr", self.lr, "a rate above 0, such as 1e-4")
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers, 0 to below 1")
        _check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        norm, decay = self.max_grad_norm, self.ema_decay
        _check(norm is None or norm > 0, "optim.max_grad_norm", norm, "a norm above 0, or null for no clipping")
        _check(decay is None or 0 < decay < 1, "optim.ema_decay", decay, "a decay between 0 and 1, or null")
        _check(self.micro_batch >= 1, "optim.micro_batch", self.micro_batch, "1 or more")
        fits = self.batch_size >= 1 and self.batch_size % self.micro_batch == 0
        _check(fits, "optim.batch_size", self.batch_size, f"a multiple of optim.micro_batch={self.micro_batch}")


@dataclass(frozen=True)
class RunConfig:
    """How long, where, and what is kept.

    Args:
        output: folder for the weights, this configuration, the losses, and checkpoints.
        steps: optimiser steps of the whole run.
        seed: decides samples, timesteps and noise of every step.
        mixed_precision: ``"no"``, ``"fp16"`` (GPUs) or ``"bf16"``: what is computed in, and the frozen parts are
            kept in; the weights in training stay in float32.
        gradient_checkpointing: compute activations twice rather than keep them.
        save_every: steps between checkpoints.
        keep: how many of the last checkpoints are kept.
        resume: go on from the last checkpoint in ``output``, if there is one.
        log_every: steps between entries of the losses that are kept and go to ``trackers``.
        trackers: accelerate's trackers, for example ``["tensorboard"]``.
        validation_prompts: drawn by teacher and student, with the same seeds, into ``output/pictures``.
        validation_every: steps between these pictures; null: none are drawn.
        validation_steps: denoising steps of these pictures.
        validation_guidance: guidance scale of these pictures; by default the pipeline's own.
        save_dtype: of the saved weights; published ones have 16 bit.
    """

    output: str = "distilled"
    steps: int = 1000
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    save_every: int = 500
    keep: int = 2
    resume: bool = False
    log_every: int = 10
    trackers: list[str] = field(default_factory=list)
    validation_prompts: list[str] = field(default_factory=list)
    validation_every: int | None = None
    validation_steps: int = 20
    validation_guidance: float | None = None
    save_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        _check(bool(self.output.strip()), "run.output", self.output, "a folder")
        for name in ("steps", "save_every", "keep", "log_every", "validation_steps"):
            _check(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "1 or more")
        every, guidance = self.validation_every, self.validation_guidance
        _check(every is None or every >= 1, "run.validation_every", every, "1 or more, or null")
        _check(guidance is None or guidance >= 0, "run.validation_guidance", guidance, "0 or more, or null")
        drawn = every is None or bool(self.validation_prompts)
        _check(drawn, "run.validation_prompts", self.validation_prompts, "one or more with run.validation_every")
        _check(0 <= self.seed < SEEDS, "run.seed", self.seed, f"0 to {SEEDS - 1}")


@dataclass(frozen=True)
class DistillConfig:
    """A distillation run.

    Args:
        model: the teacher.
        method: the student.
        data: pictures with captions.
        loss: weights of the terms of the loss.
        optim: the optimiser and its batches.
        run: how long, where, and what is kept.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check(
            not (self.loss.guided and self.data.caption_dropout),
            "data.caption_dropout",
            self.data.caption_dropout,
            "0 where loss.guided has a weight, since every picture is then predicted with its caption and without",
        )

    @classmethod
    def load(cls, recipe: str | Path, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> DistillConfig:
        """Read a recipe.

        Args:
            recipe: a YAML file, or the name of a recipe that comes with the package.
            overrides: values by section and name, which come before the recipe's.

        Raises:
            ConfigError: there is no such file, it is not YAML, or a name or value is not what it should be.
        """
        from jsonargparse import ArgumentParser

        path = find_recipe(recipe)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            settings = parser.parse_object(_sections(read_yaml(path)))
            settings = parser.parse_object({name: dict(part) for name, part in (overrides or {}).items()}, settings)
            return cls(**vars(parser.instantiate(settings)))
        except ConfigError:
            raise
        except Exception as error:  # jsonargparse tells by ArgumentError, TypeError or the YAML reader's own
            message = " ".join(str(error).split()).replace('Parser key "', 'key "')
            raise ConfigError(
                f"recipe {str(recipe)!r}: {message.rstrip('.')}; correct the recipe or option."
            ) from error

    def save(self, path: Path) -> None:
        """Write the configuration as YAML that `load` reads."""
        import yaml

        plain = asdict(self)
        plain["optim"]["betas"] = list(self.optim.betas)
        save_text(path, yaml.safe_dump(plain, sort_keys=False))

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on: everything but how long, where, and what is kept.

        Nor where the data are, how many may be broken, and how a batch is divided, which changes rounding only.
        """
        plain = asdict(self)
        plain["run"] = {"seed": self.run.seed, "mixed_precision": self.run.mixed_precision}
        for name in ("workers", "path", "max_broken"):
            del plain["data"][name]
        del plain["optim"]["micro_batch"]
        return plain


def _sections(content: Any) -> dict[str, dict[str, Any]]:
    """What a recipe says, by section and name: jsonargparse would take other things for classes and files to load.

    Raises:
        ValueError: it says something else.
    """
    sections = {section.name: section.default_factory for section in fields(DistillConfig)}
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"it says {content!r:.100}; expected sections ({', '.join(sections)}) of names and values")
    for section, values in content.items():
        if section not in sections:
            raise ValueError(f"there is no section {section!r}; there are {', '.join(sections)}")
        if not isinstance(values, dict):
            raise ValueError(f"{section} is {values!r:.100}; expected names and values")
        names = [setting.name for setting in fields(sections[section])]  # type: ignore[arg-type]
        for name in values:
            if name not in names:
                raise ValueError(f"{section} has no {name!r}; there are {', '.join(names)}")
    return content


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a shipped one, with or without ``recipes/`` and ``.yaml``.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    shipped = RECIPES / path.with_suffix(".yaml").name
    if path.parent in (Path("."), Path("recipes")) and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    raise ConfigError(f"recipe {str(recipe)!r} is no file here; give one, or one that comes with the package: {names}.")


def _check(right: bool, key: str, value: Any, expected: str) -> None:
    if not right:
        raise ConfigError(f"{key}={value!r}: expected {expected}; set --{key} or correct the recipe.")
