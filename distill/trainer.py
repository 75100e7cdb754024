"""The trainer: teacher and student are one frozen denoiser, with the student's method off and on."""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from torch import nn
from tqdm import tqdm

from diffusion_attn.core.enable import using
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.files import save_json
from diffusion_attn.distill import losses
from diffusion_attn.distill.cache import CachedData
from diffusion_attn.distill.checkpoints import Checkpoints, TrainState
from diffusion_attn.distill.config import ConfigError, DistillConfig, OptimConfig
from diffusion_attn.distill.data import PictureData, ShapesData, load_batches
from diffusion_attn.distill.draws import Draws
from diffusion_attn.distill.encoding import Encoded, encode, encode_nothing
from diffusion_attn.distill.families import denoiser_of, family_of
from diffusion_attn.distill.features import Features
from diffusion_attn.distill.sources import digest, find_pictures
from diffusion_attn.distill.student import Student, StudentModel, build_student
from diffusion_attn.distill.teacher import NoiseSchedule, load_teacher, size_step, training_size
from diffusion_attn.distill.validation import Validation

logger = logging.getLogger(__name__)

_MOST_SKIPPED = 100  # a scale of 2^16 has long gone to 1 by then
_REFUSED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class DivergedError(DiffusionAttnError):
    """The loss or its gradient is no longer a number."""


class Distiller:
    """One distillation run, in one process or in as many as ``accelerate launch`` starts.

    Args:
        config: what to do.
        quiet: show no progress.

    Raises:
        ConfigError: the configuration does not fit this machine, the output folder, or the number of processes.
        DataError: the training pictures are not there.
    """

    def __init__(self, config: DistillConfig, quiet: bool = False) -> None:
        self.config, self.quiet = config, quiet
        self.output = Path(config.run.output).expanduser()
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.run.keep)
        self.history: list[dict[str, float]] = []
        self._check()

    def train(self) -> Student:
        """Run to the last step and write the weights to ``run.output`` in the published format.

        Returns:
            The student, ready to be enabled.

        Raises:
            DivergedError: the loss is no longer a number, or nothing is learned; the last checkpoint is kept.
            ConfigError: the configuration does not fit the model, the data, or the run to go on with.
            DataError: too many pictures cannot be read.
            DiffusionAttnError: the model cannot be loaded or distilled.
        """
        config, run, optim = self.config, self.config.run, self.config.optim
        accelerator = self._accelerator()
        main, device = accelerator.is_main_process, accelerator.device

        pipe = load_teacher(config.model.name)
        denoiser = denoiser_of(pipe)
        family_of(pipe).text_tokens(config.data.text_tokens)  # refused now, if it is
        student = build_student(config.method, denoiser).to(device)
        with using(pipe, student):
            pass  # weights of another model are told now, not at the first step
        data, contents = self._open_data(pipe)
        self._freeze(pipe, device)
        empty = self._empty_conditions(pipe, data)
        noise_schedule = NoiseSchedule(pipe.scheduler)
        layers = self._layers(student, denoiser)
        validation = Validation(run, self.output / "pictures", config.data.text_tokens)

        parameters = list(student.parameters())
        optimizer = build_optimizer(parameters, optim)
        state = TrainState(
            {**config.identity(), "contents": {"data": contents}},
            parameters,
            optimizer,
            build_schedule(optimizer, optim, run.steps),
            build_ema(parameters, optim.ema_decay),
            accelerator.scaler,
        )
        model, stepper = accelerator.prepare(StudentModel(denoiser, student), optimizer)
        if run.resume and (last := self.checkpoints.last()):
            state.load(last)
        self.history = state.history

        shares = _shares(optim, accelerator)
        positions = (
            range(step * optim.batch_size + start, step * optim.batch_size + start + optim.micro_batch)
            for step in range(state.step, run.steps)
            for start in shares
        )
        batches = load_batches(data, positions, config.data.workers)
        broken: set[str] = set()
        skipped = 0  # steps in a row, of gradients that overflowed fp16
        bar = tqdm(total=run.steps, initial=state.step, desc="distill", unit="step", disable=self.quiet or not main)
        with bar:
            while state.step < run.steps:
                began = time.perf_counter()
                draws: Draws | None = None
                sums: dict[str, torch.Tensor] = {}
                for start, samples in zip(shares, islice(batches, len(shares)), strict=True):
                    self._report_broken(samples, broken)
                    encoded = self._encode(pipe, samples, device)
                    draws = draws or Draws.of(
                        run.seed,
                        state.step,
                        optim.batch_size,
                        encoded.mean.shape[1:],
                        len(noise_schedule),
                        config.data.caption_dropout,
                        sampled=config.data.latent == "sample",
                        shift=config.loss.shift,
                    )
                    share = draws.share(start, optim.micro_batch).to(device)
                    if config.loss.guided:
                        encoded, share = encoded.paired(), share.paired()
                    call, target = denoiser_inputs(pipe, noise_schedule, encoded, empty, share, config.model.guidance)
                    taught, expected = self._teach(accelerator, denoiser, layers, call)
                    # Through the backward pass as well: gradient checkpointing runs the student there again.
                    with accelerator.accumulate(model), using(denoiser, student):
                        with accelerator.autocast(), Features(layers) as features:
                            predicted = model(**call)
                        terms = self._terms(predicted, target, taught, features.outputs, expected)
                        accelerator.backward(terms["loss"])
                    for name, value in terms.items():
                        sums[name] = sums.get(name, 0) + value.detach() / len(shares)

                norm = accelerator.clip_grad_norm_(parameters, optim.max_grad_norm or float("inf"))
                found = torch.tensor(float(len(broken)), device=device)
                means = accelerator.reduce(torch.stack([*sums.values(), found]), "mean").tolist()
                values = dict(zip(sums, means, strict=False))
                # Together, or the processes that find fewer would wait for those that stop.
                data.check_broken(round(means[-1] * accelerator.num_processes))
                self._check_finite(state.step + 1, values, None if accelerator.scaler else float(norm))
                stepper.step()
                stepper.zero_grad()
                skipped = skipped + 1 if stepper.step_was_skipped else 0
                self._check_skipped(state.step + 1, skipped)
                state.schedule.step()
                if state.ema is not None and not skipped:
                    state.ema.step(parameters)
                state.step += 1

                values["lr"] = state.schedule.get_last_lr()[0]
                speed = {"pictures/s": optim.batch_size / (time.perf_counter() - began)}
                bar.set_postfix({name: f"{value:.3g}" for name, value in (values | speed).items()}, refresh=False)
                bar.update()
                if state.step % run.log_every == 0 or state.step == run.steps:
                    state.history.append({"step": state.step, **values})
                    accelerator.log(values | speed, state.step)
                if run.validation_every and (state.step % run.validation_every == 0 or state.step == run.steps):
                    if main:
                        with _averaged(state.ema, parameters):
                            validation.draw(pipe, student, state.step)
                    accelerator.wait_for_everyone()
                if state.step % run.save_every == 0 or state.step == run.steps:
                    if main:
                        self.checkpoints.save(state)
                    accelerator.wait_for_everyone()

        if state.ema is not None:
            state.ema.copy_to(parameters)
        student = replace(student.to(getattr(torch, run.save_dtype)), dtype=None)
        if main:
            self._save(student)
        accelerator.end_training()
        return student

    # ---- before

    def _check(self) -> None:
        """Everything that can be known before anything is loaded."""
        config, run = self.config, self.config.run
        if run.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ConfigError("run.mixed_precision='fp16' needs a GPU, and there is none; use 'bf16' or 'no'.")
        processes = PartialState(cpu=not torch.cuda.is_available()).num_processes
        if config.optim.name == "prodigy" and find_spec("prodigyopt") is None:
            raise ConfigError("optim.name='prodigy' is not installed; pip install prodigyopt, or use 'adamw'.")
        if config.optim.batch_size % (config.optim.micro_batch * processes):
            raise ConfigError(
                f"optim.batch_size={config.optim.batch_size}: expected a multiple of optim.micro_batch times "
                f"processes, {config.optim.micro_batch} x {processes}; change one of them."
            )
        if config.data.source == "cache":
            CachedData(config.data.path)
        self.pictures = None if config.data.source in ("cache", "shapes") else find_pictures(config.data)
        if not run.resume and (self.checkpoints.last() or list(self.output.glob("*.safetensors"))):
            raise ConfigError(
                f"run.output={run.output!r} holds a run already: expected an empty folder; add --resume to go on "
                "with it, or choose another."
            )
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output).close()
        except OSError as error:
            raise ConfigError(
                f"run.output={run.output!r} cannot be written ({error.strerror}); choose another folder."
            ) from error

    def _accelerator(self) -> Accelerator:
        from accelerate.tracking import get_available_trackers

        run, optim, loss = self.config.run, self.config.optim, self.config.loss
        known = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
        for name in run.trackers:
            if name not in known:
                raise ConfigError(
                    f"run.trackers={run.trackers!r}: expected some of those installed, {known or 'none'}; install "
                    f"{name}, or leave it out."
                )
        # Without cpu=True, several processes without GPUs would be as many separate runs.
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=run.mixed_precision,
            log_with=run.trackers or None,
            project_dir=self.output,
            # Attention outputs alone leave the layers after them without gradients.
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    find_unused_parameters=not (loss.target or loss.prediction or loss.guided)
                )
            ],
        )
        if accelerator.distributed_type in _REFUSED:
            raise ConfigError(
                f"accelerate is set up for {accelerator.distributed_type.value}: expected one process or "
                "data-parallel ones, since the weights in training are few and the rest is frozen; launch with "
                "accelerate launch --multi_gpu."
            )
        accelerator.gradient_accumulation_steps = optim.batch_size // (optim.micro_batch * accelerator.num_processes)
        if run.trackers:
            flat = {f"{part}.{k}": str(v) for part, values in asdict(self.config).items() for k, v in values.items()}
            accelerator.init_trackers("distill", flat)
        return accelerator

    def _freeze(self, pipe: Any, device: torch.device) -> None:
        """Everything that is needed but the student onto ``device``, without gradients.

        The autoencoder stays in float32: SDXL's overflows in half precision.
        """
        dtype = DTYPES[self.config.run.mixed_precision]
        denoiser = denoiser_of(pipe)
        encodes = self.config.data.source != "cache" or self.config.run.validation_every is not None
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
                if part is denoiser or (encodes and name.startswith(("vae", "text_encoder"))):
                    part.to(device, torch.float32 if name == "vae" else dtype)
        if self.config.run.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()

    def _layers(self, student: Student, denoiser: nn.Module) -> list[nn.Module]:
        """The modules whose outputs are compared, none if that term has no weight."""
        loss = self.config.loss
        found = [module for name, module in student.attentions(denoiser) if re.search(loss.layers, name)]
        if loss.attention and not found:
            names = ", ".join(name for name, _ in student.attentions(denoiser)[:3])
            raise ConfigError(f"loss.layers={loss.layers!r} is found in no layer's name; there are {names}, ...")
        return found if loss.attention else []

    def _open_data(self, pipe: Any) -> tuple[Any, str]:
        """The data at the size that the configuration or the model asks for, and a short hash of what they are."""
        data, seed, batch = self.config.data, self.config.run.seed, self.config.optim.batch_size
        size = training_size(pipe, data.size)
        if data.source == "cache":
            cached = CachedData(data.path, batch, seed)
            cached.check(pipe, data, size)
            return cached, cached.digest()
        if self.pictures is None:
            return ShapesData(size, seed), "shapes"
        pictures = PictureData(self.pictures, data, size, size_step(pipe), batch, seed, quiet=self.quiet)
        return pictures, digest(self.pictures)

    def _empty_conditions(self, pipe: Any, data: Any) -> dict[str, torch.Tensor]:
        """The conditions of the empty caption, ``(1, ...)`` each, on the denoiser's device."""
        denoiser, text_tokens = denoiser_of(pipe), self.config.data.text_tokens
        device, dtype = denoiser.device, denoiser.dtype
        with torch.no_grad():
            found = data.empty() if isinstance(data, CachedData) else encode_nothing(pipe, device, text_tokens)
        return {name: x.to(device, dtype) for name, x in found.items()}

    # ---- a step

    @torch.no_grad()
    def _encode(self, pipe: Any, samples: list[Any], device: torch.device) -> Encoded:
        """A micro-batch of pictures, or of what a cache has of them."""
        if isinstance(samples[0], Encoded):
            encoded = Encoded.stack(samples)
        else:
            encoded = encode(pipe, samples, device, self.config.data.text_tokens)
        return encoded.to(device, denoiser_of(pipe).dtype)

    def _teach(
        self, accelerator: Accelerator, denoiser: Any, layers: list[nn.Module], call: dict[str, Any]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The teacher's prediction and attention outputs."""
        loss = self.config.loss
        if not (loss.prediction or loss.guided or layers):
            return None, []
        with torch.no_grad(), accelerator.autocast(), Features(layers) as features:
            return denoiser(**call, return_dict=False)[0], features.outputs

    def _terms(
        self,
        predicted: torch.Tensor,
        target: torch.Tensor,
        taught: torch.Tensor | None,
        features: list[torch.Tensor],
        expected: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The terms of the loss that have a weight, and ``loss``, their weighted sum."""
        weights, terms = self.config.loss, {}
        if weights.target:
            terms["target"] = losses.mse(predicted, target)
        if weights.prediction and taught is not None:
            terms["prediction"] = losses.mse(predicted, taught)
        if weights.guided and taught is not None:
            scale = weights.guidance_scale
            terms["guided"] = losses.mse(losses.guided(predicted, scale), losses.guided(taught, scale))
        if features:
            terms["attention"] = losses.attention_mse(features, expected)
        total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
        return {"loss": total, **terms}

    def _check_finite(self, step: int, values: dict[str, float], norm: float | None) -> None:
        numbers = {**values, **({} if norm is None else {"gradient norm": norm})}
        if not torch.tensor(list(numbers.values())).isfinite().all():
            told = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            last = self.checkpoints.last()
            kept = f"{str(last)!r} is the last good checkpoint" if last else "there is no checkpoint yet"
            raise DivergedError(
                f"step {step} diverged ({told}); {kept}; begin again in another --output with a lower optim.lr, "
                "with optim.max_grad_norm, or with run.mixed_precision bf16 or no."
            )

    def _check_skipped(self, step: int, skipped: int) -> None:
        if skipped >= _MOST_SKIPPED:
            raise DivergedError(
                f"step {step} is the last of {skipped} whose gradients overflowed fp16: nothing is learned; begin "
                "again in another --output with run.mixed_precision bf16 or no."
            )

    def _report_broken(self, samples: list[Any], broken: set[str]) -> None:
        for name, reason in (entry for sample in samples for entry in sample.broken):
            if name not in broken:
                logger.warning("%s cannot be read and is skipped: %s", name, reason)
            broken.add(name)

    # ---- after

    def _save(self, student: Student) -> None:
        self.config.save(self.output / "distill.yaml")
        save_json(self.output / "history.json", self.history)
        student.save_pretrained(self.output)


def build_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of ``config``, which has to be installed."""
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    from prodigyopt import Prodigy

    # Both on, as in CLEAR's training and diffusers' own scripts.
    return Prodigy(parameters, **options, use_bias_correction=True, safeguard_warmup=True)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Any:
    """The learning-rate schedule of ``config`` over ``steps`` optimiser steps."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def build_ema(parameters: list[nn.Parameter], decay: float | None) -> Any:
    """Diffusers' averages of ``parameters``, or ``None`` without a ``decay``."""
    from diffusers.training_utils import EMAModel

    return None if decay is None else EMAModel(parameters, decay=decay)


@contextmanager
def _averaged(ema: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The averages in place of ``parameters``, which come back after it."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _shares(optim: OptimConfig, accelerator: Accelerator) -> range:
    """Where this process's micro-batches begin in the batch of a step."""
    stride = optim.micro_batch * accelerator.num_processes
    return range(accelerator.process_index * optim.micro_batch, optim.batch_size, stride)


@torch.no_grad()
def denoiser_inputs(
    pipe: Any,
    schedule: NoiseSchedule,
    encoded: Encoded,
    empty: dict[str, torch.Tensor],
    draws: Draws,
    guidance: float | None = None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """The arguments of the denoiser for a micro-batch, and what it should predict.

    Args:
        pipe: the teacher.
        schedule: its noise schedule.
        encoded: the micro-batch.
        empty: conditions of the empty caption, ``(1, ...)`` each.
        draws: the random part of the micro-batch.
        guidance: see `ModelConfig`.
    """
    family, autoencoder = family_of(pipe), pipe.vae.config
    clean = encoded.latents(draws.posterior, autoencoder.scaling_factor, autoencoder.get("shift_factor"))
    signal, sigma = schedule.at(draws.timesteps)
    noisy = losses.add_noise(clean, draws.noise, signal, sigma).to(denoiser_of(pipe).dtype)
    target = losses.denoising_target(schedule.prediction_type, clean, draws.noise, signal, sigma)
    conditions = encoded.arguments(draws.dropped, empty)
    return family.inputs(noisy, draws.timesteps, sigma, conditions, guidance), family.pack(target)
