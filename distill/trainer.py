"""The trainer: teacher and student are one frozen denoiser, with the student's method off and on."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from tqdm import tqdm

from diffusion_attn.core.enable import using
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.distill import losses
from diffusion_attn.distill.checkpoints import Checkpoints, TrainState
from diffusion_attn.distill.config import ConfigError, DistillConfig, OptimConfig
from diffusion_attn.distill.data import Sample, load_batches, open_data
from diffusion_attn.distill.draws import Draws
from diffusion_attn.distill.features import Features
from diffusion_attn.distill.student import Student, StudentModel, build_student
from diffusion_attn.distill.teacher import (
    NoiseSchedule,
    encode_captions,
    encode_pictures,
    load_teacher,
    native_size,
)

logger = logging.getLogger(__name__)

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
            DivergedError: the loss is no longer a number; the last checkpoint is kept.
            DataError: too many pictures cannot be read.
            DiffusionAttnError: the model cannot be loaded or distilled.
        """
        config, run, optim = self.config, self.config.run, self.config.optim
        accelerator = self._accelerator()
        main, device = accelerator.is_main_process, accelerator.device

        pipe = load_teacher(config.model.name)
        student = build_student(config.method, pipe.unet).to(device)
        self._freeze(pipe, device)
        size = config.data.size or native_size(pipe)
        cells = _latent_cells(pipe, size)
        noise_schedule = NoiseSchedule(pipe.scheduler)
        layers = self._layers(student, pipe.unet)
        data = open_data(config.data, size, run.seed)

        parameters = list(student.parameters())
        optimizer = build_optimizer(parameters, optim)
        state = TrainState(
            config.identity(),
            parameters,
            optimizer,
            build_schedule(optimizer, optim, run.steps),
            build_ema(parameters, optim.ema_decay),
            accelerator.scaler,
        )
        if run.resume and (last := self.checkpoints.last()):
            state.load(last)
        self.history = state.history
        model, stepper = accelerator.prepare(StudentModel(pipe.unet, student), optimizer)

        shares = _shares(optim, accelerator)
        positions = (
            range(step * optim.batch_size + start, step * optim.batch_size + start + optim.micro_batch)
            for step in range(state.step, run.steps)
            for start in shares
        )
        batches = load_batches(data, positions, config.data.workers)
        broken: dict[str, str] = {}
        bar = tqdm(total=run.steps, initial=state.step, desc="distill", unit="step", disable=self.quiet or not main)
        with bar:
            while state.step < run.steps:
                draws = Draws.of(
                    run.seed, state.step, optim.batch_size, cells, len(noise_schedule), config.data.caption_dropout
                )
                sums: dict[str, torch.Tensor] = {}
                for start, samples in zip(shares, islice(batches, len(shares)), strict=True):
                    self._report_broken(samples, broken)
                    data.check_broken(len(broken))
                    share = draws.share(start, optim.micro_batch).to(device)
                    call, target = _inputs(pipe, noise_schedule, samples, share, device)
                    taught, expected = self._teach(accelerator, pipe.unet, layers, call)
                    # Through the backward pass as well: gradient checkpointing runs the student there again.
                    with accelerator.accumulate(model), using(pipe.unet, student):
                        with accelerator.autocast(), Features(layers) as features:
                            predicted = model(**call)
                        terms = self._terms(predicted, target, taught, features.outputs, expected)
                        accelerator.backward(terms["loss"])
                    for name, value in terms.items():
                        sums[name] = sums.get(name, 0) + value.detach() / len(shares)

                norm = accelerator.clip_grad_norm_(parameters, optim.max_grad_norm or float("inf"))
                values = dict(
                    zip(sums, accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist(), strict=True)
                )
                self._check_finite(state.step + 1, values, None if accelerator.scaler else float(norm))
                stepper.step()
                stepper.zero_grad()
                state.schedule.step()
                if state.ema is not None:
                    state.ema.step(parameters)
                state.step += 1

                values["lr"] = state.schedule.get_last_lr()[0]
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                bar.update()
                if state.step % run.log_every == 0 or state.step == run.steps:
                    state.history.append({"step": state.step, **values})
                    accelerator.log(values, state.step)
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
        if config.optim.batch_size % (config.optim.micro_batch * processes):
            raise ConfigError(
                f"optim.batch_size={config.optim.batch_size}: expected a multiple of optim.micro_batch times "
                f"processes, {config.optim.micro_batch} x {processes}; change one of them."
            )
        open_data(config.data, config.data.size or 64, run.seed)
        if not run.resume and (self.checkpoints.last() or (self.output / "config.json").exists()):
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

        run, optim = self.config.run, self.config.optim
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
        )
        accelerator.gradient_accumulation_steps = optim.batch_size // (optim.micro_batch * accelerator.num_processes)
        if run.trackers:
            flat = {f"{part}.{k}": str(v) for part, values in asdict(self.config).items() for k, v in values.items()}
            accelerator.init_trackers("distill", flat)
        return accelerator

    def _freeze(self, pipe: Any, device: torch.device) -> None:
        """Everything but the student onto ``device``, without gradients; the autoencoder stays in float32."""
        dtype = DTYPES[self.config.run.mixed_precision]
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval().to(device)
                if name != "vae" and dtype != torch.float32:  # SDXL's autoencoder overflows in half precision
                    part.to(dtype)
        if self.config.run.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()

    def _layers(self, student: Student, unet: nn.Module) -> list[nn.Module]:
        """The modules whose outputs are compared, none if that term has no weight."""
        loss = self.config.loss
        found = [module for name, module in student.attentions(unet) if re.search(loss.layers, name)]
        if loss.attention and not found:
            names = ", ".join(name for name, _ in student.attentions(unet)[:3])
            raise ConfigError(f"loss.layers={loss.layers!r} is found in no layer's name; there are {names}, ...")
        return found if loss.attention else []

    # ---- a step

    def _teach(
        self, accelerator: Accelerator, unet: Any, layers: list[nn.Module], call: dict[str, Any]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The teacher's prediction and attention outputs."""
        if not (self.config.loss.prediction or layers):
            return None, []
        with torch.no_grad(), accelerator.autocast(), Features(layers) as features:
            return unet(**call, return_dict=False)[0], features.outputs

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
                f"step {step} diverged ({told}); {kept}; lower optim.lr, set optim.max_grad_norm, or use "
                "run.mixed_precision bf16 or no."
            )

    def _report_broken(self, samples: list[Sample], broken: dict[str, str]) -> None:
        for path, reason in (entry for sample in samples for entry in sample.broken):
            if path not in broken:
                logger.warning("%s cannot be read and is skipped: %s", path, reason)
            broken[path] = reason

    # ---- after

    def _save(self, student: Student) -> None:
        self.config.save(self.output / "distill.yaml")
        (self.output / "history.json").write_text(json.dumps(self.history, indent=1) + "\n", encoding="utf-8")
        student.save_pretrained(self.output)


def build_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of ``config``.

    Raises:
        ConfigError: it is not installed.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ConfigError("optim.name='prodigy' is not installed; pip install prodigyopt, or use 'adamw'.") from error
    return Prodigy(parameters, **options)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Any:
    """The learning-rate schedule of ``config`` over ``steps`` optimiser steps."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def build_ema(parameters: list[nn.Parameter], decay: float | None) -> Any:
    """Diffusers' averages of ``parameters``, or ``None`` without a ``decay``."""
    from diffusers.training_utils import EMAModel

    return None if decay is None else EMAModel(parameters, decay=decay)


def _shares(optim: OptimConfig, accelerator: Accelerator) -> range:
    """Where this process's micro-batches begin in the batch of a step."""
    stride = optim.micro_batch * accelerator.num_processes
    return range(accelerator.process_index * optim.micro_batch, optim.batch_size, stride)


def _latent_cells(pipe: Any, size: int) -> tuple[int, int, int]:
    """Channels, height and width of the latents of pictures of ``size`` pixels."""
    halvings = len(pipe.unet.config.block_out_channels) - 1
    step = pipe.vae_scale_factor * 2**halvings
    if size % step:
        raise ConfigError(
            f"data.size={size}: expected a multiple of {step} pixels with this model; change --data.size."
        )
    return pipe.vae.config.latent_channels, size // pipe.vae_scale_factor, size // pipe.vae_scale_factor


@torch.no_grad()
def _inputs(
    pipe: Any, schedule: NoiseSchedule, samples: list[Sample], draws: Draws, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor]:
    """The arguments of the denoiser for a micro-batch, and what it should predict."""
    pixels = torch.stack([sample.pixels for sample in samples]).to(device)
    clean = encode_pictures(pipe.vae, pixels, draws.posterior)
    signal, sigma = schedule.at(draws.timesteps)
    noisy = losses.add_noise(clean, draws.noise, signal, sigma).to(pipe.unet.dtype)
    target = losses.denoising_target(schedule.prediction_type, clean, draws.noise, signal, sigma)
    conditions = encode_captions(pipe, samples, draws.dropped, device)
    return {"sample": noisy, "timestep": draws.timesteps, **conditions}, target
