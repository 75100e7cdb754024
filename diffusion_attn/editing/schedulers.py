"""Schedulers that edit: the source's path ends at its picture exactly, and noise is added only where a mask says so."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers looks here for the kind of thing that a saved pipeline's scheduler is.
__all__ = ["EditDDIMScheduler", "EditDPMSolverMultistepScheduler", "SchedulerMixin"]


class EditDDIMScheduler(DDIMScheduler):
    """DDIM for pairs of a source and a target, with noise in space.

    Source: ViMAEdit, section 3 (arXiv 2410.10496), on the consistency of InfEdit (arXiv 2312.04965).

    Args:
        eta: share of the noise that is added where the mask is, of the posterior deviation or the marginal variance.
        variance: ``"posterior"``, that of ancestral DDIM, or ``"marginal"``, all the noise of the next timestep: with
            ``eta`` of 1 InfEdit's denoising consistency model, for networks that were distilled to few steps. There a
            missing mask is everywhere.
        clip_sample, steps_offset: as in `DDIMScheduler`, whose other arguments are taken too; ``False`` and 1 here.
    """

    config: Any
    num_inference_steps: Any

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 1,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        eta: float = 1.0,
        variance: Literal["posterior", "marginal"] = "posterior",
    ) -> None:
        if variance not in ("posterior", "marginal"):
            raise ValueError(f"variance is {variance!r}; give 'posterior' or 'marginal'.")
        # By name: what is given by place is taken for a default, and lost when another is made of this configuration.
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._after: dict[int, int] = {}  # the next timestep, where the user has chosen them

    def set_timesteps(
        self, num_inference_steps: int = 0, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """As in `DDIMScheduler`, or to whole numbers ``timesteps`` of your own, noisiest first.

        Raises:
            ValueError: ``timesteps`` do not fall, or are none of the training's.
        """
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            self._after.clear()
            return
        ends = [self.config.num_train_timesteps, *timesteps, -1]
        if not timesteps or any(after >= before for before, after in pairwise(ends)):
            raise ValueError(
                f"timesteps are {list(timesteps)}; give falling ones below {self.config.num_train_timesteps}."
            )
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.tensor(timesteps, device=device)
        self._after = dict(zip(timesteps, [*timesteps[1:], -1], strict=True))

    def edit_step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        source_latents: torch.Tensor | None,
        variance_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
    ) -> SchedulerOutput:
        """One step of ``P`` pairs.

        Args:
            model_output: ``(2P, C, h, w)``, guided.
            timestep: of the step.
            sample: ``(2P, C, h, w)``, all sources, then all targets.
            source_latents: ``(P, C, h, w)``, where the sources have to end; ``None``: no pairs, any batch.
            variance_mask: ``(1 or P, 1, h, w)``, where noise is added; ``None`` is the same as nowhere, or everywhere
                if it is the marginal variance.
            generator: draws the noise.
            variance_noise: ``(1 or P, C, h, w)``, the noise, one for source and target.

        Returns:
            ``prev_sample``, like ``sample``.

        Raises:
            ValueError: the shapes do not make pairs.
        """
        _check(sample, source_latents)
        step = int(timestep)
        previous = self._after.get(step, step - self.config.num_train_timesteps // self.num_inference_steps)
        now = self.alphas_cumprod[step].to(sample.device)
        after = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        after = after.to(sample.device)
        clean = consistent(_clean(self.config.prediction_type, model_output, sample, now), source_latents)
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if self.config.variance == "marginal":
            full = (self.config.eta * (1 - after)).sqrt()
        else:
            variance = (1 - after) / (1 - now) * (1 - now / after)
            full = self.config.eta * variance.clamp(min=0).sqrt()
        if variance_mask is not None:
            deviation = _paired(variance_mask.to(sample), sample) * full
        else:
            deviation = full if self.config.variance == "marginal" else torch.zeros_like(full)
        kept = ((1 - after - deviation**2) / (1 - now)).clamp(min=0).sqrt()
        moved = (after.sqrt() - now.sqrt() * kept) * clean + kept * sample
        if bool(deviation.any()):
            moved = moved + deviation * _noise(sample, source_latents, generator, variance_noise)
        return SchedulerOutput(prev_sample=_ended(moved, source_latents, bool(after == 1)).to(sample.dtype))


class EditDPMSolverMultistepScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ for pairs: its deterministic update outside of the mask, its stochastic one inside.

    Takes the arguments of `DPMSolverMultistepScheduler`. Source: ViMAEdit, supplement; arXiv 2410.10496.
    """

    config: Any
    _step_index: Any

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As in `DPMSolverMultistepScheduler`.

        Raises:
            ValueError: the algorithm predicts noise.
        """
        if not self.config.algorithm_type.endswith("dpmsolver++"):
            raise ValueError(
                f"algorithm_type is {self.config.algorithm_type!r}, which does not predict the picture; give "
                "'dpmsolver++'."
            )
        super().set_timesteps(num_inference_steps, device, mu, timesteps)
        # Each is a stock scheduler with a history of its own, of what the network says the picture is.
        self._solvers = {}
        for kind in ("dpmsolver++", "sde-dpmsolver++"):
            solver = DPMSolverMultistepScheduler.from_config(
                self.config, algorithm_type=kind, prediction_type="sample", thresholding=False
            )
            solver.set_timesteps(num_inference_steps, device, mu, timesteps)
            self._solvers[kind] = solver

    def edit_step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        source_latents: torch.Tensor | None,
        variance_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
    ) -> SchedulerOutput:
        """As `EditDDIMScheduler.edit_step`.

        Raises:
            ValueError: the shapes do not make pairs, or there is a mask and the order is 3.
        """
        _check(sample, source_latents)
        if variance_mask is not None and self.config.solver_order > 2:
            raise ValueError(
                f"solver_order is {self.config.solver_order}, whose stochastic update has no published form; give 1 or "
                "2, or no variance_mask."
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        clean = consistent(self.convert_model_output(model_output, sample=sample), source_latents)
        noise = torch.zeros_like(sample)
        if variance_mask is not None:
            noise = _noise(sample, source_latents, generator, variance_noise).expand_as(sample)
        moved = self._solvers["dpmsolver++"].step(clean, timestep, sample).prev_sample
        if self.config.solver_order < 3:  # asked without a mask too, for its history
            noisy = self._solvers["sde-dpmsolver++"].step(clean, timestep, sample, variance_noise=noise).prev_sample
            if variance_mask is not None:
                mask = _paired(variance_mask.to(sample), sample)
                moved = mask * noisy + (1 - mask) * moved
        self._step_index += 1
        last = self.step_index == len(self.timesteps) and self.config.final_sigmas_type == "zero"
        return SchedulerOutput(prev_sample=_ended(moved, source_latents, last).to(sample.dtype))


def consistent(clean: torch.Tensor, source_latents: torch.Tensor | None) -> torch.Tensor:
    """What the network takes for the pictures, shifted so that the sources are what they should be.

    Args:
        clean: ``(2P, C, h, w)``, all sources, then all targets.
        source_latents: ``(P, C, h, w)``; ``None``: nothing is shifted.
    """
    if source_latents is None:
        return clean
    source, target = clean.chunk(2)
    known = source_latents.to(clean)
    return torch.cat([known, known + (target - source)])


def _clean(prediction: str, output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return alpha.sqrt() * sample - (1 - alpha).sqrt() * output
    return (sample - (1 - alpha).sqrt() * output) / alpha.sqrt()


def _ended(moved: torch.Tensor, source_latents: torch.Tensor | None, last: bool) -> torch.Tensor:
    """After the last step sources are their latents to the bit, not to rounding."""
    if source_latents is None or not last:
        return moved
    return torch.cat([source_latents.to(moved), moved[len(moved) // 2 :]])


def _paired(x: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """What there is one of for all pairs, or one of for each, beside ``(2P, C, h, w)``."""
    return x if len(x) == 1 or len(x) == len(sample) else torch.cat([x, x])


def _noise(
    sample: torch.Tensor, source_latents: torch.Tensor | None, generator: Any, noise: torch.Tensor | None
) -> torch.Tensor:
    """One noise for source and target of each pair, beside ``sample``."""
    if noise is None:
        rows = len(sample) if source_latents is None else len(sample) // 2
        noise = randn_tensor((rows, *sample.shape[1:]), generator, sample.device, torch.float32)
    return _paired(noise.to(sample), sample)


def _check(sample: torch.Tensor, source_latents: torch.Tensor | None) -> None:
    if source_latents is not None and (len(sample) != 2 * len(source_latents)):
        raise ValueError(
            f"sample has {len(sample)} rows and source_latents {len(source_latents)}; give a source and a target for "
            "each of these, or source_latents=None."
        )
