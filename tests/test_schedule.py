"""The step is looked up in the run's own timesteps, whatever the scheduler, the pipeline or an interruption does."""

import diffusers
import pytest
import torch
from PIL import Image

import diffusion_attn as da
from diffusion_attn.core.context import Schedule, ScheduleError
from diffusion_attn.core.session import Session
from tests import tiny


@pytest.fixture(scope="module")
def sd():
    pipe = tiny.sd()
    da.enable(pipe, da.HiDiffusion(min_size=0))
    return pipe


@pytest.fixture(scope="module")
def sdxl():
    pipe = tiny.sdxl()
    da.enable(pipe, da.HiDiffusion(min_size=0))
    return pipe


def steps_of(pipe, run):
    """``(step, steps)`` at each call of the denoiser during ``run()``."""
    seen = []

    def look(unet, args, kwargs):
        context = Session.of(unet).context()
        seen.append((context.step, context.steps))

    handle = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen


def counted(n):
    return [(step, n) for step in range(n)]


SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}, 6),
    "ddpm": ("DDPMScheduler", {}, 6),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, 7),
    "pndm with Runge-Kutta steps": ("PNDMScheduler", {}, 6 + 9),
    "euler": ("EulerDiscreteScheduler", {}, 6),
    "euler, karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 6),
    "euler, trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 6),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 6),
    "dpm++": ("DPMSolverMultistepScheduler", {}, 6),
    "dpm++, karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 6),
    "dpm++ sde, karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        6,
    ),
    "unipc": ("UniPCMultistepScheduler", {}, 6),
    "deis": ("DEISMultistepScheduler", {}, 6),
    "heun": ("HeunDiscreteScheduler", {}, 11),
    "dpm2": ("KDPM2DiscreteScheduler", {}, 11),
    "dpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, 11),
    "lcm": ("LCMScheduler", {}, 6),
    "tcd": ("TCDScheduler", {}, 6),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(sd, name):
    cls, options, evaluations = SCHEDULERS[name]
    sd.scheduler = getattr(diffusers, cls).from_config({**tiny.SCHEDULE, **options})
    assert steps_of(sd, lambda: tiny.run(sd, 64, 6)) == counted(evaluations)


def test_many_rounded_steps_still_have_places_of_their_own(sd):
    sd.scheduler = diffusers.DPMSolverMultistepScheduler(**SCHEDULE_OF_DPM, use_karras_sigmas=True)
    sd.scheduler.set_timesteps(60)
    assert len(set(sd.scheduler.timesteps.tolist())) < 60
    assert steps_of(sd, lambda: tiny.run(sd, 64, 60)) == counted(60)


SCHEDULE_OF_DPM = {key: tiny.SCHEDULE[key] for key in ("beta_start", "beta_end", "beta_schedule")}


def picture(size=64):
    return Image.effect_mandelbrot((size, size), (-2, -1.5, 1, 1.5), 20).convert("RGB")


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpm++, karras", "heun", "lcm"])
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image_counts_what_it_runs(sd, name, strength):
    cls, options, _ = SCHEDULERS[name]
    sd.scheduler = getattr(diffusers, cls).from_config({**tiny.SCHEDULE, **options})
    pipe = tiny.quiet(diffusers.AutoPipelineForImage2Image.from_pipe(sd))
    seen = steps_of(pipe, lambda: tiny.run(pipe, 64, 10, image=picture(), strength=strength))
    assert seen == counted(len(seen))
    assert abs(len(seen) - 10 * strength * sd.scheduler.order) <= 1


def test_user_timesteps(sdxl, monkeypatch):
    monkeypatch.setattr(sdxl, "scheduler", diffusers.EulerDiscreteScheduler.from_config(tiny.SCHEDULE))
    assert steps_of(sdxl, lambda: tiny.run(sdxl, 64, None, timesteps=[900, 500, 420, 7])) == counted(4)


def test_two_stages_on_one_denoiser(sdxl):
    refine = tiny.quiet(diffusers.AutoPipelineForImage2Image.from_pipe(sdxl))
    latents = []

    def base():
        latents.append(tiny.run(sdxl, 64, 10, denoising_end=0.7))

    def rest():
        tiny.run(refine, 64, 10, image=latents[0], denoising_start=0.7)

    assert steps_of(sdxl, base) == counted(7)
    assert steps_of(sdxl, rest) == counted(3)
    assert steps_of(sdxl, lambda: tiny.run(sdxl, 64, 10)) == counted(10)


def test_an_interrupted_run_does_not_shift_the_next(sd):
    sd.scheduler = diffusers.HeunDiscreteScheduler.from_config(tiny.SCHEDULE)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= 1
        return kwargs

    def fail(pipe, step, timestep, kwargs):
        raise InterruptedError

    steps_of(sd, lambda: tiny.run(sd, 64, 6, callback_on_step_end=stop))
    assert steps_of(sd, lambda: tiny.run(sd, 64, 5)) == counted(9)
    with pytest.raises(InterruptedError):
        tiny.run(sd, 64, 6, callback_on_step_end=fail)
    assert steps_of(sd, lambda: tiny.run(sd, 64, 5)) == counted(9)


def test_one_call_per_guidance_branch_shares_the_step(sd):
    sd.scheduler = diffusers.PNDMScheduler.from_config({**tiny.SCHEDULE, "skip_prk_steps": True})
    sd.scheduler.set_timesteps(4)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 12)

    def loop():
        sample = x
        for t in sd.scheduler.timesteps:
            noise = sum(sd.unet(sample, t, text).sample for _ in range(2))
            sample = sd.scheduler.step(noise, t, sample).prev_sample

    with torch.no_grad():
        assert steps_of(sd, loop) == [place for place in counted(5) for _ in range(2)]


def test_two_pipelines_with_a_scheduler_each(sd):
    sd.scheduler = diffusers.DDIMScheduler(**tiny.SCHEDULE)
    parts = {**sd.components, "scheduler": diffusers.DDIMScheduler(**tiny.SCHEDULE)}
    other = tiny.quiet(type(sd)(**parts, requires_safety_checker=False))
    tiny.run(sd, 64, 5)
    with pytest.raises(ScheduleError, match="enable through the pipeline that runs"):
        tiny.run(other, 64, 6)
    da.enable(other, *da.enabled(other))
    assert steps_of(other, lambda: tiny.run(other, 64, 6)) == counted(6)


def test_fixed_timesteps():
    schedule = Schedule(timesteps=torch.tensor([900.0, 500.25, 500.25, 3.0]))
    assert schedule.locate(900)[:2] == (0, 4)
    assert schedule.locate(torch.tensor([3, 3]))[:2] == (3, 4)
    assert schedule.locate(torch.tensor(500.25, dtype=torch.float16))[:2] == (1, 4)
    with pytest.raises(ScheduleError, match=r"timestep 700 is not one of the run's 4"):
        schedule.locate(700)


def test_a_scheduler_without_timesteps():
    pipe = tiny.sd()
    pipe.scheduler.timesteps = None
    da.enable(pipe, da.HiDiffusion())
    with pytest.raises(ScheduleError, match="set_timesteps"):
        pipe.unet(torch.randn(1, 4, 32, 32), 5, torch.randn(1, 5, 12))


def test_a_rounded_timestep_without_a_hint_is_the_nearest_place():
    """DDIM keeps no index, and in bfloat16 several of many steps are within the rounding."""
    pipe = tiny.sd()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(500)
    schedule, timesteps = Schedule(pipe), pipe.scheduler.timesteps
    schedule.locate(timesteps[0])
    for timestep in timesteps[10::70]:
        rounded = timestep.to(torch.bfloat16)
        step, *_ = schedule.locate(rounded)
        distances = (timesteps - rounded.float()).abs()
        assert distances[step] == distances.min()
