"""Whole runs on tiny models: they learn, go on where they stopped, and end well or with a sentence."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import diffusion_attn as da
from diffusion_attn.distill import ConfigError, DistillConfig, DivergedError, trainer
from tests import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


def state_of(folder):
    last = sorted((folder / "checkpoints").iterdir())[-1]
    return load_file(last / "state.safetensors"), json.loads((last / "state.json").read_text())


def assert_same(one, other):
    (ours, state), (theirs, other_state) = state_of(one), state_of(other)
    assert state == other_state
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_a_run_lowers_the_loss_and_its_folder_loads(distil, recipe, teacher):
    optim = {"batch_size": 4, "micro_batch": 4, "lr": 3e-3}
    distiller = distil(optim=optim, run={"steps": 40, "save_every": 40, "save_dtype": "float32"})
    losses = [entry["attention"] for entry in distiller.history]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert sorted(path.name for path in distiller.output.iterdir()) == sorted(
        ["checkpoints", "config.json", "distill.yaml", "history.json", WEIGHTS]
    )
    assert json.loads((distiller.output / "history.json").read_text()) == distiller.history
    pipe = DiffusionPipeline.from_pretrained(teacher)
    tiny.quiet(pipe)
    linfusion = da.LinFusion.from_pretrained(distiller.output)
    start, teacher_says = da.LinFusion.for_model(pipe.unet), tiny.run(pipe)
    with da.using(pipe, start):
        before = tiny.run(pipe)
    with da.using(pipe, linfusion):
        after = tiny.run(pipe)
    assert (after - teacher_says).square().mean() < (before - teacher_says).square().mean()
    assert DistillConfig.load(distiller.output / "distill.yaml") == distiller.config


def test_what_is_saved_are_the_averages_in_16_bit(distil):
    distiller = distil()
    saved = load_file(distiller.output / WEIGHTS)
    tensors, _ = state_of(distiller.output)
    assert {value.dtype for value in saved.values()} == {torch.float16}
    averaged = [tensors[f"ema/{index}"] for index in range(len(saved))]
    live = dict(zip(distiller.student.state_dict(), averaged, strict=True))
    assert all(torch.equal(saved[name], value.half()) for name, value in live.items())


def test_the_last_checkpoints_stay(distil, tmp_path):
    distil(run={"keep": 2})
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-000000004", "step-000000006"]


@pytest.mark.parametrize(
    "optim", [{}, {"schedule": "cosine", "warmup_steps": 2, "ema_decay": None}, {"name": "prodigy", "lr": 1.0}]
)
def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(distil, tmp_path, optim):
    if optim.get("name") == "prodigy":
        pytest.importorskip("prodigyopt")
    distil(optim=optim)

    def stop(self, step, values, norm):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Distiller, "_check_finite", stop)
        distil(optim=optim, run={"output": str(tmp_path / "other")})
    assert not (tmp_path / "other" / WEIGHTS).exists()
    distil(optim=optim, run={"output": str(tmp_path / "other"), "resume": True})
    assert_same(tmp_path / "run", tmp_path / "other")


def test_resuming_a_finished_run_writes_it_again(distil, tmp_path):
    distil()
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    (tmp_path / "run" / WEIGHTS).unlink()
    distil(run={"resume": True})
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before


def test_a_run_goes_on_only_with_what_it_was_begun_with(distil):
    distil()
    with pytest.raises(ConfigError, match="add --resume"):
        distil()
    with pytest.raises(ConfigError, match=r"optim.lr=0.5.*0.001"):
        distil(run={"resume": True}, optim={"lr": 0.5})


def test_noise_levels_follow_the_shift(distil, tmp_path):
    def first(name, shift):
        run = distil(loss={"shift": shift}, run={"output": str(tmp_path / name), "steps": 1})
        return run.history[0]["target"]

    even, low, high = first("even", 1.0), first("low", 1e-9), first("high", 1e9)
    assert len({even, low, high}) == 3


def test_a_guided_run_predicts_every_picture_with_its_caption_and_without(distil, tmp_path):
    def first(name, dropout, **loss):
        data, run = {"caption_dropout": dropout}, {"output": str(tmp_path / name), "steps": 1}
        return distil(data=data, loss=loss, run=run).history[0]

    captioned, empty = first("captioned", 0.0)["prediction"], first("empty", 1 - 1e-9)["prediction"]
    both = first("guided", 0.0, guided=0.1, guidance_scale=4.0)
    assert both["prediction"] == pytest.approx((captioned + empty) / 2, rel=1e-4)
    assert both["loss"] == pytest.approx(
        both["target"] + 0.5 * both["prediction"] + 0.1 * both["guided"] + 0.5 * both["attention"], rel=1e-5
    )
    # The error of 4 c - 3 u, by the triangle inequality.
    least, most = (abs(4 * captioned**0.5 + sign * 3 * empty**0.5) for sign in (-1, 1))
    assert least**2 < both["guided"] < most**2


def test_what_changes_rounding_only_may_change(distil):
    distil()
    distil(run={"resume": True, "steps": 8}, optim={"micro_batch": 2})


def test_a_run_goes_on_with_the_same_pictures_only(distil, tmp_path):
    for name in ("one", "same", "more"):
        for index in range(4 if name == "more" else 3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
            (tmp_path / name / f"{index}.txt").write_text(f"number {index}")
    distil(data={"source": "folder", "path": str(tmp_path / "one")})
    distil(data={"source": "folder", "path": str(tmp_path / "same")}, run={"resume": True, "steps": 8})
    with pytest.raises(ConfigError, match=r"contents\.data"):
        distil(data={"source": "folder", "path": str(tmp_path / "more")}, run={"resume": True, "steps": 8})


def test_files_of_others_among_the_checkpoints_are_left_alone(distil, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000000001-best").mkdir(parents=True)
    (folder / ".DS_Store").write_text("")
    distil(run={"resume": True})
    assert (folder / ".DS_Store").exists() and (folder / "step-000000001-best").exists()


def test_weights_of_another_model_are_told_before_the_first_step(distil, tmp_path):
    da.LinFusion.for_model(tiny.sdxl().unet).save_pretrained(tmp_path / "other")
    with pytest.raises(da.CheckpointFormatError, match="weights are for"):
        distil(method={"weights": str(tmp_path / "other")})


def test_no_checkpoint_is_half_there(distil, tmp_path):
    """What a run leaves that is killed while it writes is swept up, and never resumed from."""
    part = tmp_path / "run" / "checkpoints" / ".part-step-000000009"
    part.mkdir(parents=True)
    (part / "state.json").write_text('{"st')
    distil(run={"resume": True})
    assert not part.exists()


@pytest.mark.parametrize(
    ("error", "told", "expected"),
    [
        (
            OSError(28, "No space left on device"),
            da.DiffusionAttnError,
            r"step-000000004' cannot be written .*No space left",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_a_full_disk_or_an_interrupt_keeps_the_checkpoint_before(distil, tmp_path, monkeypatch, error, told, expected):
    save_file, calls = safetensors.torch.save_file, []

    def stops(tensors, path, *metadata):
        calls.append(path)
        save_file(tensors, path, *metadata)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr("safetensors.torch.save_file", stops)
    with pytest.raises(told, match=expected):
        distil()
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-000000002"]


def test_a_damaged_checkpoint_is_told(distil, tmp_path):
    distil()
    file = tmp_path / "run" / "checkpoints" / "step-000000006" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(da.CheckpointFormatError, match=r"state.safetensors in 'step-000000006' cannot be read"):
        distil(run={"resume": True, "steps": 8})


def test_an_optimiser_that_is_not_installed(distil, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install prodigyopt"):
        distil(optim={"name": "prodigy", "lr": 1.0}, model={"name": "nowhere"})


def test_accumulation_is_the_whole_batch(distil, tmp_path):
    whole = distil(optim={"micro_batch": 2})
    parts = distil(run={"output": str(tmp_path / "parts")})
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(distil, tmp_path):
    plain = distil()
    again = distil(run={"output": str(tmp_path / "again"), "gradient_checkpointing": True})
    for one, other in zip(plain.history, again.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    tensors, others = state_of(plain.output)[0], state_of(again.output)[0]
    for key in tensors:
        torch.testing.assert_close(tensors[key], others[key], atol=1e-5, rtol=1e-4)


def test_in_bfloat16_the_weights_in_training_stay_in_float32(distil):
    distiller = distil(run={"mixed_precision": "bf16", "steps": 2})
    tensors, _ = state_of(distiller.output)
    assert all(x.dtype == torch.float32 for x in tensors.values())
    weights = [x for name, x in tensors.items() if name.startswith("weights/")]
    assert any(not torch.equal(x, x.bfloat16().float()) for x in weights)


def test_sdxl_is_distilled_with_its_conditions(distil, tmp_path):
    tiny.sdxl().save_pretrained(tmp_path / "sdxl")
    distiller = distil(model={"name": str(tmp_path / "sdxl")}, method={"mid_divisor": 4}, run={"steps": 2})
    linfusion = da.LinFusion.from_pretrained(distiller.output)
    assert {layer.projection_mid_dim for layer in linfusion.layers} == {4, 6}


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(distil, tmp_path, monkeypatch):
    mse, calls = trainer.losses.mse, []

    def breaks(predicted, target):
        calls.append(1)
        return mse(predicted, target) * (float("nan") if len(calls) > 8 else 1)

    monkeypatch.setattr(trainer.losses, "mse", breaks)
    with pytest.raises(DivergedError, match=r"step 3 diverged .*step-000000002' is the last good"):
        distil(loss={"attention": 0.0})
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-000000002"]


def test_validation_pictures_are_drawn_and_change_nothing(distil, tmp_path, teacher):
    plain = distil()
    drawn = {"validation_prompts": [tiny.PROMPT, "a blue ring on a black background"], "validation_every": 4}
    validated = distil(run={"output": str(tmp_path / "drawn"), "validation_steps": 2, **drawn})
    assert validated.history == plain.history
    (ours, _), (theirs, _) = state_of(validated.output), state_of(plain.output)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    files = sorted((validated.output / "pictures").iterdir())
    assert [file.name for file in files] == ["step-000004.png", "step-000006.png"]
    grids = [np.asarray(Image.open(file)) for file in files]
    assert grids[0].shape == (2 * 64, 2 * 64, 3)
    assert np.array_equal(grids[0][:64], grids[1][:64]) and not np.array_equal(grids[0][64:], grids[1][64:])
    pipe = DiffusionPipeline.from_pretrained(teacher)
    tiny.quiet(pipe)
    [image] = pipe(tiny.PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(np.asarray(image), grids[0][:64, :64])


def test_tensorboard_is_told_every_term(distil, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distil(run={"trackers": ["tensorboard"]})
    told = EventAccumulator(str(tmp_path / "run" / "distill")).Reload()
    assert {"loss", "target", "prediction", "attention", "lr", "pictures/s"} <= set(told.Tags()["scalars"])
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    steps = [event.step for event in told.Scalars("target")]
    assert steps == [entry["step"] for entry in history]
    assert [event.value for event in told.Scalars("target")] == pytest.approx([entry["target"] for entry in history])


def test_other_ways_of_distributing_are_refused_before_anything_is_loaded(distil, monkeypatch):
    monkeypatch.setattr(trainer.Accelerator, "distributed_type", trainer.DistributedType.FSDP)
    with pytest.raises(ConfigError, match=r"FSDP.*--multi_gpu"):
        distil(model={"name": "nowhere"})


# ---- in processes of their own


def command(recipe, folder, *launcher):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return [sys.executable, *launcher, "-m", "diffusion_attn.distill", str(file), "--quiet", "--data.workers", "0"]


# As many threads as here: sums of another order are other sums.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_killed_and_resumed(distil, recipe, tmp_path):
    killed = {**recipe, "run": {**recipe["run"], "output": str(tmp_path / "killed"), "steps": 100000}}
    process = subprocess.Popen(command(killed, tmp_path), env=ENVIRONMENT)
    checkpoints, deadline = tmp_path / "killed" / "checkpoints", time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = json.loads((sorted(checkpoints.glob("step-*"))[-1] / "state.json").read_text())["step"]
    steps = step + 4
    distil(run={"steps": steps})
    distil(run={"steps": steps, "output": str(tmp_path / "killed"), "resume": True})
    assert_same(tmp_path / "run", tmp_path / "killed")


def test_two_processes_are_one_with_the_same_batch(distil, recipe, tmp_path):
    one = distil()
    two = {**recipe, "run": {**recipe["run"], "output": str(tmp_path / "two")}}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(command(two, tmp_path, *launch), env=ENVIRONMENT, check=True, timeout=200)
    tensors, others = state_of(one.output)[0], state_of(tmp_path / "two")[0]
    history = json.loads((tmp_path / "two" / "history.json").read_text())
    assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in one.history], rel=1e-4)
    for key in (key for key in tensors if key.startswith(("weights", "ema"))):
        torch.testing.assert_close(others[key], tensors[key], atol=1e-5, rtol=1e-4)
