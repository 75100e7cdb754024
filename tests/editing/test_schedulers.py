"""Editing steps: the official numbers, and what must hold for any."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusion_attn.editing.schedulers import EditDDIMScheduler, EditDPMSolverMultistepScheduler
from tests.editing.golden import VIMAEDIT
from tests.golden.seeded import seeded_tensor
from tests.tiny import noise

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OWN = ("num_train_timesteps", "clip_sample", "steps_offset", "set_alpha_to_one", "eta", "solver_order", "solver_type")
OWN += ("timestep_spacing", "final_sigmas_type", "lower_order_final")


def made(cls, params, **changes):
    scheduler = cls(**BETAS, **{name: params[name] for name in OWN if name in params}, **changes)
    scheduler.set_timesteps(params["num_inference_steps"])
    return scheduler


def tensor(case, name, step=None):
    entry = case["inputs"][name]
    return seeded_tensor(entry["seeded_tensor"].replace("<i>", str(step)), entry["shape"])


@VIMAEDIT.named("eddim_pub")
def test_official_steps(name):
    case = VIMAEDIT.cases[name]
    params = case["parameters"]
    masks = {
        "none": lambda: None,
        "half": lambda: tensor(case, "editing_mask") > 0,
        "zero": lambda: torch.zeros(1, 1, 6, 6),
        "one": lambda: torch.ones(1, 1, 6, 6),
    }
    output = made(EditDDIMScheduler, params).edit_step(
        tensor(case, "model_output"),
        params["timestep"],
        tensor(case, "sample"),
        tensor(case, "source_latent") if params["use_source"] else None,
        variance_mask=masks[params["mask"]](),
        variance_noise=tensor(case, "variance_noise"),
    )
    VIMAEDIT.close(output.prev_sample, name, "prev_sample")


@pytest.mark.parametrize("name", [name for name in VIMAEDIT.cases if "_traj_" in name])
def test_official_trajectories(name):
    case = VIMAEDIT.cases[name]
    params = case["parameters"]
    scheduler = made(EditDDIMScheduler if name.startswith("eddim") else EditDPMSolverMultistepScheduler, params)
    assert scheduler.timesteps.tolist() == params["timesteps"]
    source = tensor(case, "source_latent")
    x = scheduler.add_noise(source, tensor(case, "init_noise"), scheduler.timesteps[:1]).expand(2, -1, -1, -1)
    latents = [x]
    for step, timestep in enumerate(scheduler.timesteps):
        mask = (tensor(case, "editing_mask", step) > 0.3).float() if step >= params["mask_from"] else None
        x = scheduler.edit_step(
            tensor(case, "model_output", step),
            timestep,
            x,
            source,
            variance_mask=mask,
            variance_noise=tensor(case, "variance_noise", step),
        ).prev_sample
        latents.append(x)
    VIMAEDIT.close(torch.stack(latents), name, "latents")
    assert torch.equal(x[:1], source)


@VIMAEDIT.named("ddcm_pub")
def test_official_virtual_inversion(name):
    """Step by step, since the published source row carries the target's direction, and ours its own.

    The published loop adds noise after its last step too; its result is what the last step takes for the picture.
    """
    case = VIMAEDIT.cases[name]
    params = case["parameters"]
    scheduler = EditDDIMScheduler(**BETAS, variance="marginal", eta=params["eta"])
    scheduler.set_timesteps(timesteps=params["timesteps"])
    source = tensor(case, "source_latent")
    sources, targets, clean = (VIMAEDIT.expected(name, key) for key in ("source", "target", "predicted_target"))
    x = tensor(case, "init_noise").expand(2, -1, -1, -1)
    tolerance = {"atol": case["tolerance"] * float(targets.abs().max()), "rtol": 0}
    for step, timestep in enumerate(scheduler.timesteps):
        output = torch.cat([tensor(case, "eps_source", step), tensor(case, "eps_target", step)])
        moved = scheduler.edit_step(output, timestep, x, source, variance_noise=tensor(case, "noise", step)).prev_sample
        if step == len(scheduler.timesteps) - 1:
            torch.testing.assert_close(moved, torch.stack([source[0], clean[step]]), **tolerance)
        else:
            torch.testing.assert_close(moved[1], targets[step], **tolerance)
        if params["eta"] == 1 and step < len(scheduler.timesteps) - 1:
            torch.testing.assert_close(moved[0], sources[step], **tolerance)
        x = torch.stack([sources[step], targets[step]])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_without_source_and_mask_it_is_the_stock_step(prediction):
    params = {"num_inference_steps": 20, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
    edit = made(EditDDIMScheduler, params, prediction_type=prediction)
    stock = made(DDIMScheduler, params, prediction_type=prediction)
    x, output = noise(3, 4, 6, 6), noise(3, 4, 6, 6, seed=1)
    for timestep in (951, 501, 1):
        expected = stock.step(output, timestep, x, eta=0.0).prev_sample
        torch.testing.assert_close(edit.edit_step(output, timestep, x, None).prev_sample, expected)
        shared = noise(1, 4, 6, 6, seed=2)
        expected = stock.step(output, timestep, x, 1.0, True, variance_noise=shared.expand_as(x)).prev_sample
        masked = edit.edit_step(output, timestep, x, None, torch.ones(1, 1, 6, 6), variance_noise=shared)
        torch.testing.assert_close(masked.prev_sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_two_updates_are_the_stock_ones(kind, order):
    if kind.startswith("sde") and order == 3:
        pytest.skip("there is no such update with a mask")
    edit, stock = (
        cls(**BETAS, solver_order=order, **({} if cls is EditDPMSolverMultistepScheduler else {"algorithm_type": kind}))
        for cls in (EditDPMSolverMultistepScheduler, DPMSolverMultistepScheduler)
    )
    for scheduler in (edit, stock):
        scheduler.set_timesteps(16)
    x = y = noise(2, 4, 6, 6)
    mask = torch.ones(1, 1, 6, 6) if kind.startswith("sde") else None
    for step, timestep in enumerate(stock.timesteps):
        output, shared = noise(2, 4, 6, 6, seed=step + 1), noise(1, 4, 6, 6, seed=step + 100)
        x = edit.edit_step(output, timestep, x, None, mask, variance_noise=shared).prev_sample
        y = stock.step(output, timestep, y, variance_noise=shared.expand_as(y)).prev_sample
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", [EditDDIMScheduler, EditDPMSolverMultistepScheduler])
@pytest.mark.parametrize("pairs", [1, 3])
def test_pairs(cls, pairs):
    """Noise is shared inside a pair, no mask is a zero mask, and pairs do not know each other."""
    source = noise(pairs, 4, 6, 6)
    mask = (noise(pairs, 1, 6, 6, seed=9) > 0).float()

    def run(rows, masks=mask):
        scheduler = cls(**BETAS)
        scheduler.set_timesteps(8)
        both = [*rows, *(row + pairs for row in rows)]
        x = noise(pairs, 4, 6, 6, seed=1)[rows].repeat(2, 1, 1, 1)
        for step, timestep in enumerate(scheduler.timesteps):
            output = noise(2 * pairs, 4, 6, 6, seed=step + 10)[both]
            shared = noise(pairs, 4, 6, 6, seed=step + 50)[rows]
            chosen = None if masks is None else masks[rows]
            x = scheduler.edit_step(output, timestep, x, source[rows], chosen, variance_noise=shared).prev_sample
        return x

    whole = run(list(range(pairs)))
    assert torch.equal(whole[:pairs], source)
    for row in range(pairs):
        torch.testing.assert_close(run([row]), whole[[row, row + pairs]])
    torch.testing.assert_close(run(list(range(pairs)), torch.zeros_like(mask)), run(list(range(pairs)), None))


def test_noise_is_drawn_from_the_generator():
    scheduler = EditDDIMScheduler(**BETAS)
    scheduler.set_timesteps(10)
    call = (noise(2, 4, 6, 6), 501, noise(2, 4, 6, 6, seed=1), noise(1, 4, 6, 6, seed=2), torch.ones(1, 1, 6, 6))
    first, again = (scheduler.edit_step(*call, torch.Generator().manual_seed(5)).prev_sample for _ in range(2))
    assert torch.equal(first, again)
    given = scheduler.edit_step(*call, variance_noise=noise(1, 4, 6, 6, seed=5)).prev_sample
    torch.testing.assert_close(first, given)


def test_configurations_travel():
    stock = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, prediction_type="v_prediction")
    edit = EditDDIMScheduler.from_config(stock.config, eta=0.5)
    assert edit.config.prediction_type == "v_prediction" and edit.config.eta == 0.5
    again = EditDDIMScheduler.from_config(edit.config, eta=0.2)
    assert {**edit.config, "eta": 0.2, "_use_default_values": 0} == {**again.config, "_use_default_values": 0}
    torch.testing.assert_close(again.alphas_cumprod, stock.alphas_cumprod)
    assert not EditDDIMScheduler().config.clip_sample and EditDDIMScheduler().config.steps_offset == 1


def test_bad_arguments():
    scheduler = EditDPMSolverMultistepScheduler(**BETAS, solver_order=3)
    scheduler.set_timesteps(4)
    x = noise(2, 4, 6, 6)
    with pytest.raises(ValueError, match="solver_order is 3"):
        scheduler.edit_step(x, 999, x, None, torch.ones(1, 1, 6, 6))
    for timesteps in ([], [500, 700], [1000, 500]):
        with pytest.raises(ValueError, match="give falling ones"):
            EditDDIMScheduler(**BETAS).set_timesteps(timesteps=timesteps)
    params = {"num_inference_steps": 4}
    with pytest.raises(ValueError, match="algorithm_type is 'dpmsolver'"):
        made(EditDPMSolverMultistepScheduler, params, algorithm_type="dpmsolver", final_sigmas_type="sigma_min")
    with pytest.raises(ValueError, match="variance is 'all'"):
        EditDDIMScheduler(**BETAS, variance="all")
    with pytest.raises(ValueError, match="sample has 2 rows and source_latents 2"):
        scheduler.edit_step(x, 999, x, x)
