"""The terms of the loss and the collected features, against the official numbers and on their own."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

import diffusion_attn as da
from diffusion_attn.distill import losses
from diffusion_attn.distill.draws import Draws
from diffusion_attn.distill.encoding import Encoded
from diffusion_attn.distill.features import Features
from diffusion_attn.distill.teacher import NoiseSchedule
from tests import tiny
from tests.test_linfusion_golden import CASES, check, inputs_of, named, seeded_linfusion, seeded_unet


@named("distillation_step")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_distillation_step_is_the_official_one(name, checkpointing):
    """Teacher and student are one UNet, with the method off and on; features count once when blocks are recomputed."""
    case = CASES[name]
    unet = seeded_unet(case).requires_grad_(False)
    linfusion = seeded_linfusion(case, unet)
    if checkpointing:
        unet.train().enable_gradient_checkpointing()
    layers = [module for _, module in linfusion.attentions(unet)]
    inputs = inputs_of(case)
    target = inputs.pop("target")
    with torch.no_grad(), Features(layers) as expected:
        taught = unet(**inputs).sample
    with da.using(unet, linfusion):
        with Features(layers) as features:
            predicted = unet(**inputs).sample
        terms = [
            losses.mse(predicted, target),
            losses.mse(predicted, taught),
            losses.attention_mse(features.outputs, expected.outputs),
        ]
        total = terms[0] + 0.5 * terms[1] + 0.5 * terms[2]
        total.backward()
    check(case, "losses", torch.stack([*terms, total]).detach())
    gradients = {name: parameter.grad for name, parameter in linfusion.weights.named_parameters()}
    check(case, "grad_norms", torch.stack([gradients[key].norm() for key in case["gradient_norms_of"]]))
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(not module._forward_hooks for module in layers)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", [tiny.SCHEDULE, {"rescale_betas_zero_snr": True}])
def test_noise_and_targets_are_the_schedulers_own(kind, schedule):
    scheduler = DDPMScheduler(**{k: v for k, v in schedule.items() if k != "set_alpha_to_one"}, prediction_type=kind)
    ours = NoiseSchedule(scheduler)
    clean, noise, timesteps = tiny.noise(3, 4, 5, 6), tiny.noise(3, 4, 5, 6, seed=1), torch.tensor([0, 500, 999])
    signal, sigma = ours.at(timesteps)
    torch.testing.assert_close(
        losses.add_noise(clean, noise, signal, sigma), scheduler.add_noise(clean, noise, timesteps)
    )
    expected = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(losses.denoising_target(kind, clean, noise, signal, sigma), expected)
    assert ours.prediction_type == kind and len(ours) == 1000


@given(st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_the_flow_target_leads_from_clean_to_noise(sigma, seed):
    clean, noise = tiny.noise(2, 4, 3, 3, seed=seed), tiny.noise(2, 4, 3, 3, seed=seed + 1)
    share = torch.full((2,), sigma)
    noisy = losses.add_noise(clean, noise, 1 - share, share)
    velocity = losses.denoising_target("flow", clean, noise, 1 - share, share)
    torch.testing.assert_close(noisy - sigma * velocity, clean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(noisy + (1 - sigma) * velocity, noise, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.5, 7.0])
def test_guidance_is_the_pipelines_own(scale, monkeypatch):
    pipe, seen = tiny.sd(), {}
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda x, *rest, **names: seen.update(x=x) or step(x, *rest, **names))
    with pipe.unet.register_forward_hook(lambda module, args, output: seen.update(both=output[0])):
        tiny.run(pipe, guidance_scale=scale)
    empty, captioned = seen["both"].chunk(2)
    torch.testing.assert_close(losses.guided(torch.cat([captioned, empty]), scale), seen["x"])
    assert losses.guided(seen["both"].half(), scale).dtype == torch.float32


def test_losses_are_float32_whatever_they_are_given():
    half = torch.full((2, 3), 300.0, dtype=torch.float16)
    assert losses.mse(half, -half).dtype == torch.float32 and losses.mse(half, -half) == 360000  # beyond float16
    assert losses.attention_mse([half, half], [-half, half]) == 180000


def test_what_cannot_be_compared_is_refused():
    one = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="1 layers of the student against 2"):
        losses.attention_mse([one], [one, one])
    with pytest.raises(ValueError, match="0 layers"):
        losses.attention_mse([], [])
    with pytest.raises(ValueError, match=r"'sample'.*epsilon"):
        losses.denoising_target("sample", one, one, torch.ones(1), torch.zeros(1))


def test_features_are_in_the_order_asked_for_and_from_one_pass():
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    with Features([second, first]) as features:
        second(first(torch.ones(1, 2)))
        assert [x.shape[-1] for x in features.outputs] == [4, 3]
        with pytest.raises(RuntimeError, match="ran twice"):
            first(torch.ones(1, 2))
    first(torch.ones(1, 2))
    with Features([first, second]) as features:
        first(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="1 of 2 modules did not run"):
        _ = features.outputs


def test_draws_depend_on_seed_and_step_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (Draws.of(0, step, 6, (4, 3, 3), 1000, 0.5, sampled=True) for step in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.noise, same.noise) and not torch.equal(one.noise, other.noise)
    share = one.share(2, 2)
    assert torch.equal(share.noise, one.noise[2:4]) and share.noise.is_contiguous()
    assert not torch.equal(one.noise, Draws.of(1, 7, 6, (4, 3, 3), 1000, 0.5, sampled=True).noise)
    mean = Draws.of(0, 7, 6, (4, 3, 3), 1000, 0.5, sampled=False)
    assert not mean.posterior.any() and one.posterior.any() and torch.equal(mean.noise, one.noise)
    assert torch.equal(mean.dropped, one.dropped)


def test_a_pair_is_the_same_picture_with_its_caption_and_without():
    draws = Draws.of(0, 0, 3, (4, 2, 2), 1000, 0.5, sampled=True)
    text = {"encoder_hidden_states": tiny.noise(3, 5, 8), "text_embeds": tiny.noise(3, 6), "time_ids": tiny.noise(3, 6)}
    empty = {name: torch.zeros_like(text[name][:1]) for name in ("encoder_hidden_states", "text_embeds")}
    encoded = Encoded(tiny.noise(3, 4, 2, 2, seed=1), tiny.noise(3, 4, 2, 2, seed=2), text)
    pair, both = draws.paired(), encoded.paired()
    for name in ("timesteps", "noise", "posterior"):
        assert torch.equal(getattr(pair, name), getattr(draws, name).repeat(2, *(1,) * (getattr(draws, name).ndim - 1)))
    assert torch.equal(both.latents(pair.posterior, 0.5), encoded.latents(draws.posterior, 0.5).repeat(2, 1, 1, 1))
    given = both.arguments(pair.dropped, empty)
    time_ids = given["added_cond_kwargs"]["time_ids"]
    assert torch.equal(time_ids, text["time_ids"].repeat(2, 1))
    for name, x in (("encoder_hidden_states", given["encoder_hidden_states"]), *given["added_cond_kwargs"].items()):
        assert torch.equal(x[:3], text[name]) and (name == "time_ids" or not x[3:].any())


def test_a_shift_moves_the_timesteps_and_nothing_else():
    plain, up, down = (Draws.of(0, 0, 4000, (1, 1, 1), 1000, 0.5, sampled=True, shift=s) for s in (1.0, 4.0, 0.25))
    late = plain.timesteps >= 500
    assert torch.equal(late, up.timesteps >= 800) and torch.equal(late, down.timesteps >= 200)
    assert late.float().mean() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(plain.noise, up.noise) and torch.equal(plain.dropped, up.dropped)


@given(shift=st.floats(1e-9, 1e9), timesteps=st.integers(1, 1000))
def test_timesteps_are_those_of_the_schedule_whatever_the_shift(shift, timesteps):
    drawn = Draws.of(0, 0, 100, (1, 1, 1), timesteps, 0.0, sampled=False, shift=shift).timesteps
    assert drawn.dtype == torch.long and drawn.min() >= 0 and drawn.max() < timesteps
