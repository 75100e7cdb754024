"""FLUX teachers and CLEAR students: the same trainer, by flow matching, on tokens."""

import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

import diffusion_attn as da
from diffusion_attn.distill import ConfigError, DistillConfig, losses, trainer
from diffusion_attn.distill.cache import make_cache
from diffusion_attn.distill.config import DataConfig, MethodConfig
from diffusion_attn.distill.draws import Draws
from diffusion_attn.distill.encoding import Encoded
from diffusion_attn.distill.families import family_of
from diffusion_attn.distill.make_data import make_data
from diffusion_attn.distill.teacher import NoiseSchedule, check_teacher, training_size
from diffusion_attn.distill.trainer import denoiser_inputs
from tests import tiny
from tests.distill.test_trainer import state_of

WEIGHTS = "clear_local_3.safetensors"
TOKENS = 16


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tiny FLUX pipeline."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.flux().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux()


@pytest.fixture
def recipe(recipe):
    """That of the other teachers, with a disc of radius 3 in 6 x 6 tokens."""
    recipe["method"] = {"name": "clear", "radius": 3}
    recipe["data"] |= {"size": 48, "text_tokens": TOKENS}
    return recipe


def assert_same(one, other):
    (ours, state), (theirs, other_state) = state_of(one), state_of(other)
    assert state == other_state
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


# ---- what the transformer is given


@pytest.mark.parametrize("options", [{"shift": 3.0, "use_dynamic_shifting": True}, {"shift": 3.0}])
def test_noise_and_targets_are_the_schedulers_own(options):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    ours, places = NoiseSchedule(scheduler), torch.tensor([0, 500, 999])
    clean, noise = tiny.noise(3, 4, 5, 6), tiny.noise(3, 4, 5, 6, seed=1)
    signal, sigma = ours.at(places)
    torch.testing.assert_close(
        losses.add_noise(clean, noise, signal, sigma),
        scheduler.scale_noise(clean, scheduler.timesteps[999 - places], noise),
    )
    assert ours.prediction_type == "flow" and len(ours) == 1000
    if options.get("use_dynamic_shifting"):
        torch.testing.assert_close(ours.sigmas, torch.arange(1, 1001) / 1000)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler()])
def test_a_shift_above_one_is_more_noise(scheduler):
    schedule = NoiseSchedule(scheduler)
    means = []
    for shift in (0.25, 1.0, 4.0):
        draws = Draws.of(0, 0, 1000, (1, 1, 1), len(schedule), 0.0, sampled=False, shift=shift)
        signal, sigma = schedule.at(draws.timesteps)
        means.append((sigma.mean(), -signal.mean()))
    assert means == sorted(means) and means[0] < means[1] < means[2]


@pytest.mark.parametrize("embedded", [True, False])
def test_the_transformer_is_called_as_its_pipeline_calls_it(embedded):
    pipe = tiny.flux(guidance_embeds=embedded)
    pipe.vae.register_to_config(shift_factor=0.3)
    text = {"encoder_hidden_states": tiny.noise(2, 5, 12), "pooled_projections": tiny.noise(2, 12)}
    empty = {name: torch.zeros_like(x[:1]) for name, x in text.items()}
    encoded = Encoded(tiny.noise(2, 4, 4, 6), torch.zeros(2, 4, 4, 6), text)
    draws = Draws(
        torch.tensor([999, 249]), tiny.noise(2, 4, 4, 6, seed=1), torch.zeros(2, 4, 4, 6), torch.tensor([0, 1]) > 0
    )
    call, target = denoiser_inputs(pipe, NoiseSchedule(pipe.scheduler), encoded, empty, draws, 2.0)
    seen = {}
    with pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True):
        pipe(tiny.PROMPT, height=16, width=24, num_inference_steps=1, max_sequence_length=5, output_type="latent")
    expected = {name: x for name, x in seen.items() if torch.is_tensor(x)}
    assert call.keys() == expected.keys()
    for name in ("txt_ids", "img_ids"):
        assert torch.equal(call[name], expected[name])
    assert all(call[name].shape[1:] == expected[name].shape[1:] for name in call)
    assert call["timestep"].tolist() == [1.0, 0.25] and ("guidance" in call) == embedded
    assert call.get("guidance", torch.full((2,), 2.0)).tolist() == [2.0, 2.0]
    assert call["encoder_hidden_states"][1].eq(0).all() and not call["pooled_projections"][0].eq(0).any()
    clean = (encoded.mean - 0.3) * pipe.vae.config.scaling_factor
    unpacked = pipe._unpack_latents(target, 16, 24, pipe.vae_scale_factor)
    torch.testing.assert_close(unpacked, draws.noise - clean)
    noisy = pipe._unpack_latents(call["hidden_states"], 16, 24, pipe.vae_scale_factor)
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * draws.noise[1])


def test_what_is_not_asked_for_is_the_models_own():
    pipe = tiny.flux()
    assert training_size(pipe, None) == 64
    assert family_of(pipe).text_tokens(None) == 512
    pipe.tokenizer_2.model_max_length = 20
    assert family_of(pipe).text_tokens(None) == 20 and family_of(pipe).text_tokens(16) == 16
    sigma, text = torch.ones(1), {"encoder_hidden_states": tiny.noise(1, 5, 12)}
    call = family_of(pipe).inputs(tiny.noise(1, 4, 4, 4), torch.zeros(1), sigma, text, None)
    assert call["guidance"].tolist() == [3.5]


# ---- runs


def test_a_run_lowers_the_loss_and_its_folder_loads(distil, pipe):
    optim = {"batch_size": 4, "micro_batch": 4, "lr": 3e-3}
    # Against the teacher alone: its weights are drawn, and it is no model of the pictures.
    run = {"steps": 40, "save_every": 40, "save_dtype": "float32"}
    distiller = distil(optim=optim, loss={"target": 0.0}, run=run)
    found = [entry["loss"] for entry in distiller.history]
    assert len(found) == 40 and sum(found[-5:]) < 0.8 * sum(found[:5])
    assert sorted(path.name for path in distiller.output.iterdir()) == sorted(
        ["checkpoints", "distill.yaml", "history.json", WEIGHTS]
    )
    shutil.rmtree(distiller.output / "checkpoints")
    with pytest.raises(ConfigError, match="holds a run already"):
        distil()
    clear = da.Clear.from_pretrained(distiller.output)
    assert clear.radius == 3 and clear.down_factor == 1
    size = {"size": 48, "steps": 3}
    teacher_says = tiny.run(pipe, **size)
    with da.using(pipe, da.Clear(3)):
        before = tiny.run(pipe, **size)
    with da.using(pipe, clear):
        after = tiny.run(pipe, **size)
    assert (after - teacher_says).square().mean() < (before - teacher_says).square().mean()


def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(distil, tmp_path):
    distil()

    def stop(self, step, values, norm):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Distiller, "_check_finite", stop)
        distil(run={"output": str(tmp_path / "other")})
    assert not (tmp_path / "other" / WEIGHTS).exists()
    distil(run={"output": str(tmp_path / "other"), "resume": True})
    assert_same(tmp_path / "run", tmp_path / "other")


def test_training_from_a_float32_cache_is_training_without_one(distil, pipe, tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        Image.effect_noise((48, 48), 40 + index).convert("RGB").save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(f"a red star, {index}")
    data = {"source": "folder", "path": str(tmp_path / "pictures")}
    plain = distil(data=data)
    config = DataConfig(path=data["path"], size=48, text_tokens=TOKENS)
    make_cache(pipe, config, tmp_path / "cache", dtype=torch.float32, batch=1)
    cache = {"source": "cache", "path": str(tmp_path / "cache")}
    cached = distil(data=cache, run={"output": str(tmp_path / "cached")})
    assert cached.history == plain.history
    assert (cached.output / WEIGHTS).read_bytes() == (plain.output / WEIGHTS).read_bytes()
    with pytest.raises(da.DiffusionAttnError, match="another text_tokens"):
        distil(data={**cache, "text_tokens": 12}, run={"output": str(tmp_path / "longer")})


def test_gradient_checkpointing_changes_nothing(distil, tmp_path):
    plain = distil(run={"steps": 3})
    again = distil(run={"output": str(tmp_path / "again"), "gradient_checkpointing": True, "steps": 3})
    for one, other in zip(plain.history, again.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_pooled_students_in_bfloat16_go_on_from_their_weights(distil, tmp_path):
    method, run = {"down_factor": 2}, {"mixed_precision": "bf16", "steps": 2}
    first = distil(method=method, run=run)
    tensors, _ = state_of(first.output)
    assert all(x.dtype == torch.float32 for x in tensors.values())
    second = distil(method={"radius": None, "weights": str(first.output)}, run={**run, "output": str(tmp_path / "on")})
    assert (second.student.radius, second.student.down_factor) == (3, 2)
    assert (second.output / "clear_local_3_down_2.safetensors").exists()


# ---- pictures


@pytest.mark.parametrize("embedded", [True, False])
def test_validation_draws_what_the_pipeline_draws(distil, tmp_path, embedded):
    pipe = tiny.flux(guidance_embeds=embedded)
    pipe.save_pretrained(tmp_path / "model")
    drawn = {"validation_prompts": [tiny.PROMPT], "validation_every": 1, "validation_steps": 2}
    distiller = distil(
        model={"name": str(tmp_path / "model")},
        run={**drawn, "validation_guidance": 2.0, "steps": 1},
    )
    grid = np.asarray(Image.open(distiller.output / "pictures" / "step-000001.png"))
    guided = {"guidance_scale": 2.0} if embedded else {"negative_prompt": "", "true_cfg_scale": 2.0}
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": TOKENS, **guided}
    [image] = pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(0), **call).images
    assert grid.shape == (128, 64, 3) and np.array_equal(np.asarray(image), grid[:64])


def test_the_teacher_draws_its_own_data(pipe, tmp_path):
    make_data(pipe, [tiny.PROMPT], 2, tmp_path / "data", (48, 32), steps=1, guidance=2.0, batch=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = pipe(
        [tiny.PROMPT] * 2, height=32, width=48, num_inference_steps=1, guidance_scale=2.0, generator=generators
    ).images
    for number, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "data" / f"{number:07d}.png")), np.asarray(image))


# ---- what is refused


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("method", {"radius": 4}, r"method.radius=4: expected method.name 'clear'.*not 'linfusion'"),
        ("method", {"down_factor": 4}, r"method.down_factor=4.*'clear'"),
        ("method", {"name": "clear", "mid_divisor": 16}, r"method.mid_divisor=16.*'linfusion'"),
        ("method", {"name": "clear", "radius": 0}, r"method.radius=0: expected 1 or more"),
        ("data", {"text_tokens": 513}, r"data.text_tokens=513: expected 1 to 512"),
        ("model", {"guidance": -1.0}, r"model.guidance=-1.0"),
    ],
)
def test_what_a_configuration_cannot_say(tmp_path, section, values, expected):
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=expected):
        DistillConfig.load(tmp_path / "recipe.yaml", {section: values})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"size": 44}}, r"data.size=44: expected a multiple of 8"),
        ({"method": {"name": "linfusion", "radius": None}}, r"FluxTransformer2DModel"),
        ({"loss": {"layers": "blocks.9"}}, r"loss.layers='blocks.9'.*transformer_blocks.0.attn"),
    ],
)
def test_what_only_the_model_can_tell(distil, changes, expected):
    with pytest.raises(da.DiffusionAttnError, match=expected):
        distil(**changes)


def test_unets_know_no_such_options(distil, tmp_path):
    tiny.sd().save_pretrained(tmp_path / "sd")
    model, linfusion = {"name": str(tmp_path / "sd")}, {"name": "linfusion", "radius": None}
    with pytest.raises(
        ConfigError, match=r"data.text_tokens=16.*StableDiffusionPipeline.*leave --data.text_tokens out"
    ):
        distil(model=model, method=linfusion, data={"size": 32})
    with pytest.raises(da.UnsupportedModelError, match="Clear serves the transformers"):
        distil(model=model, data={"size": 32, "text_tokens": None})


def test_variants_with_further_channels_are_refused():
    with pytest.raises(da.UnsupportedModelError, match=r"model.name='fill' is a FluxPipeline"):
        check_teacher(tiny.flux(in_channels=32, out_channels=16), "fill")


def test_the_layers_of_the_recipe_are_a_fourth_of_all():
    """Single-stream layers whose place among all of them is a multiple of four."""
    layers = DistillConfig.load("clear-flux").loss.layers
    names = [f"transformer_blocks.{i}.attn" for i in range(19)]
    names += [f"single_transformer_blocks.{i}.attn" for i in range(38)]
    chosen = [name for place, name in enumerate(names) if place >= 19 and place % 4 == 0]
    assert [name for name in names if re.search(layers, name)] == chosen and len(chosen) == 10


def test_the_student_is_pinned_and_starts_from_the_teacher(pipe):
    student = trainer.build_student(MethodConfig("clear", radius=4), pipe.transformer)
    own = dict(pipe.transformer.state_dict())
    assert student.dtype == torch.float32 and student.radius == 4
    assert all(torch.equal(tensor, own[name]) for name, tensor in student.state_dict().items())
