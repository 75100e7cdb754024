"""Inversions on a tiny pipeline: records that last, weights that stay, and what is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import diffusion_attn as da
from diffusion_attn.editing.inversion import (
    Inversion,
    ddim_invert,
    direct_inversion,
    dynamic_prompts,
    localised_prompts,
    null_text,
)
from diffusion_attn.editing.inversion.ddim_path import DdimPath
from diffusion_attn.pipelines import DPLPipeline, PromptToPromptPipeline
from tests import tiny
from tests.golden.seeded import seed_parameters
from tests.test_matrix import add_lora, offload_as_a_whole, offload_sequentially
from tests.tiny import PROMPT, noise

WORDS = ("star", "ring")
SHORT = {"num_word_steps": 2, "num_null_steps": 2}


def inverted(pipe, steps=3, size=(16, 16)):
    return ddim_invert(pipe, 0.5 * noise(1, 4, *size), PROMPT, num_inference_steps=steps)


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_up_undoes_a_step_down(pipe, prediction):
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    path = DdimPath(scheduler, 10)
    clean, error = noise(1, 4, 8, 8).double(), noise(1, 4, 8, 8, seed=1).double()
    for step in range(10):
        a = path._levels[step]
        x = a**0.5 * clean + (1 - a) ** 0.5 * error
        output = {"epsilon": error, "v_prediction": a**0.5 * error - (1 - a) ** 0.5 * clean, "sample": clean}[
            prediction
        ]
        below = path._levels[step + 1]
        expected = below**0.5 * clean + (1 - below) ** 0.5 * error
        torch.testing.assert_close(path.down(step, output, x), expected)


def test_steps_are_the_schedulers_own(pipe):
    path = DdimPath(pipe.scheduler, 10)
    x, output = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        expected = pipe.scheduler.step(output, timestep, x).prev_sample
        torch.testing.assert_close(path.down(step, output, x), expected, atol=1e-5, rtol=1e-5)


def test_null_text_comes_closer_than_plain_inversion(pipe):
    inversion = inverted(pipe)
    plain = null_text(pipe, inversion, num_null_steps=0).reconstruction
    learned = null_text(pipe, inversion, num_null_steps=5, null_tolerance=None).reconstruction
    error = [float((x - inversion.latents[0]).square().mean()) for x in (plain, learned)]
    assert error[1] < 0.9 * error[0]


def test_pipeline_ends_where_the_inversion_says(pipe):
    inversion = dynamic_prompts(pipe, inverted(pipe), WORDS, guidance_scale=4.0, **SHORT)
    p2p = PromptToPromptPipeline.from_pipe(pipe)
    output = p2p(target_prompt=PROMPT, inversion=inversion, guidance_scale=4.0, output_type="latent")
    torch.testing.assert_close(output.source, inversion.reconstruction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.images, output.source, atol=1e-4, rtol=1e-4)


def test_direct_inversion_ends_at_the_picture(pipe):
    inversion = direct_inversion(pipe, inverted(pipe))
    p2p = PromptToPromptPipeline.from_pipe(pipe)
    output = p2p(target_prompt=PROMPT.replace("red", "green"), inversion=inversion, output_type="latent")
    assert torch.equal(output.source, inversion.latents[0])


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_saved_and_loaded(make, tmp_path):
    pipe = make()
    inversion = dynamic_prompts(pipe, inverted(pipe), WORDS, background=torch.ones(4, 4), **SHORT)
    inversion.save(tmp_path / "a.safetensors")
    loaded = Inversion.load(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    for name, value in vars(inversion).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(loaded, name), value.cpu()), name
        else:
            assert getattr(loaded, name) == value, name
    p2p = PromptToPromptPipeline.from_pipe(pipe)
    outputs = [p2p(target_prompt=PROMPT, inversion=x, output_type="latent").images for x in (inversion, loaded)]
    assert torch.equal(*outputs)


def test_other_models_and_prompts_are_refused(pipe):
    inversion = inverted(pipe)
    other = tiny.sd()
    seed_parameters(other.unet, 0.5)
    with pytest.raises(da.DiffusionAttnError, match="was made with other weights"):
        null_text(other, inversion)
    with pytest.raises(da.DiffusionAttnError, match="leave source_prompt out"):
        PromptToPromptPipeline.from_pipe(pipe)("a green star", PROMPT, inversion=inversion)
    null_text(pipe.to(torch.bfloat16), inversion, num_null_steps=1)  # the same model, rounded
    pipe.to(torch.float32)


def test_files_of_other_kinds_are_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("weights", "text"):
        with pytest.raises(da.CheckpointFormatError, match=r"that Inversion.save has written|as safetensors"):
            Inversion.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("function", [null_text, dynamic_prompts])
def test_an_interrupted_run_goes_on_where_it_stopped(pipe, tmp_path, function):
    options = {"num_null_steps": 2} if function is null_text else {"words": WORDS, **SHORT}
    whole = function(pipe, inverted(pipe, 4), **options)

    class Stopped(Exception):
        pass

    calls = []

    def stop(*args):
        calls.append(1)
        if len(calls) > whole.cost[function.__name__]["unet_calls"] * 0.6:
            raise Stopped

    hook = pipe.unet.register_forward_pre_hook(stop)
    path = tmp_path / "inversion.safetensors"
    with pytest.raises(Stopped):
        function(pipe, inverted(pipe, 4), checkpoint=path, **options)
    hook.remove()
    part = Inversion.load(path)
    assert not part.finished and 0 < len(part.null_embeds) < 4
    with pytest.raises(da.DiffusionAttnError, match=r"ends at step \d of 4"):
        direct_inversion(pipe, part)
    with pytest.raises(da.DiffusionAttnError, match="the same options"):
        function(pipe, part, **{**options, "num_null_steps": 3})
    rest = function(pipe, part, checkpoint=path, **options)
    for name in ("null_embeds", "word_embeds", "reconstruction"):
        if getattr(whole, name) is not None:
            torch.testing.assert_close(getattr(rest, name), getattr(whole, name))
    assert rest.history == whole.history


def test_the_pipeline_is_left_as_it_was():
    pipe = tiny.sd()
    for index, parameter in enumerate(pipe.unet.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    trace = [(p.requires_grad, p.grad, p.clone()) for p in pipe.unet.parameters()]
    processors = dict(pipe.unet.attn_processors)
    dynamic_prompts(pipe, inverted(pipe), WORDS, **SHORT)
    with pytest.raises(da.UnsupportedModelError, match=r"map_size is \(5, 5\).*give one of these"):
        dynamic_prompts(pipe, inverted(pipe), WORDS, map_size=5, **SHORT)
    for parameter, (flag, grad, value) in zip(pipe.unet.parameters(), trace, strict=True):
        assert parameter.requires_grad == flag and parameter.grad is grad and torch.equal(parameter, value)
    assert all(processors[name] is processor for name, processor in pipe.unet.attn_processors.items())
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", ["balancing", "disjoint", "leakage"])
def test_each_loss_alone_lowers_its_own_quantity(name):
    pipe = da.shapes.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red star above a blue ring on a white background"
    latents = DPLPipeline.from_pipe(pipe).encode_image(_scene())
    inversion = ddim_invert(pipe, latents, prompt, num_inference_steps=2)
    background = torch.ones(16, 16)
    background[2:8, 2:8] = background[9:15, 9:15] = 0
    off = dict.fromkeys(("balancing", "disjoint", "leakage"))
    result = dynamic_prompts(
        pipe,
        inversion,
        ["star", "ring"],
        background=background,
        num_word_steps=15,
        num_null_steps=0,
        **{**off, name: (1.0, 25.0, 0.0)},
        map_size=8,
        temperature=10.0,  # at 100 padding drowns the nouns of this model
    )
    first = [entry[name] for entry in result.history if entry["step"] == 0]
    assert min(first[-3:]) < first[0] - 1e-4


def _scene():
    from diffusion_attn.shapes import Scene, Shape, render

    shapes = (Shape("star", "red", None, 0.3, 0.3, 0.2), Shape("ring", "blue", None, 0.7, 0.75, 0.18))
    return render(Scene(shapes, "white", "above"), 64)


def test_localised_prompts_bring_words_to_their_masks():
    pipe = da.shapes.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red star above a blue ring on a white background"
    latents = DPLPipeline.from_pipe(pipe).encode_image(_scene())
    inversion = ddim_invert(pipe, latents, prompt, num_inference_steps=2)
    masks = torch.zeros(2, 64, 64)
    masks[0, 8:32, 8:32] = masks[1, 36:60, 32:56] = 1
    for boxes in (False, True):
        result = localised_prompts(
            pipe,
            inversion,
            ["star", "ring"],
            masks,
            boxes=boxes,
            adjectives=["red", "blue"],
            num_word_steps=10,
            num_null_steps=0,
            map_size=8,
            similarity=(1.0, 25.0, 0.0),
        )
        for name in ("similarity", "overlap", "adjective"):
            assert result.history[9][name] < result.history[0][name]
    with pytest.raises(
        ValueError, match=r"masks have the shape \(2, 64, 64\); give one \(H, W\) for each of \['star'\]"
    ):
        localised_prompts(pipe, inversion, ["star"], masks)


@pytest.mark.parametrize("change", [offload_sequentially, offload_as_a_whole, lambda pipe: add_lora(pipe, "to_k")])
def test_beside_other_changes(change):
    pipe, plain = tiny.sd(), tiny.sd()
    change(pipe)
    if change not in (offload_as_a_whole, offload_sequentially):
        change(plain)
    results = [dynamic_prompts(each, inverted(each), WORDS, **SHORT) for each in (pipe, plain)]
    torch.testing.assert_close(results[0].reconstruction, results[1].reconstruction, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_what_is_learned_is_float32(dtype):
    pipe = tiny.sd().to(dtype)
    result = dynamic_prompts(pipe, inverted(pipe), WORDS, **SHORT)
    for learned in (result.null_embeds, result.word_embeds, result.reconstruction):
        assert learned.dtype == torch.float32 and learned.isfinite().all()
    assert not torch.equal(result.word_embeds[0], result.word_embeds[2])


def test_bad_arguments(pipe):
    with pytest.raises(ValueError, match=r"latents have the shape \(2, 4, 16, 16\)"):
        ddim_invert(pipe, noise(2, 4, 16, 16), PROMPT)
    with pytest.raises(ValueError, match="neither a prompt nor prompt_embeds"):
        ddim_invert(pipe, noise(1, 4, 16, 16))
    inversion = inverted(pipe)
    with pytest.raises(ValueError, match=r"words names 'leopard'.*'a red star"):
        dynamic_prompts(pipe, inversion, ["leopard"])
    with pytest.raises(ValueError, match="give a list of words"):
        dynamic_prompts(pipe, inversion, "star")
    with pytest.raises(ValueError, match="null_start is 'zero'"):
        null_text(pipe, inversion, null_start="zero")
    with pytest.raises(ValueError, match="the inversion is empty"):
        null_text(pipe, replace(inversion, prompt_embeds=None))
    with pytest.raises(da.UnsupportedModelError, match="Stable Diffusion 1, 2 or XL"):
        ddim_invert(tiny.flux(), noise(1, 4, 16, 16), PROMPT)


def test_maps_of_an_inversion(pipe):
    maps = inverted(pipe).attention_maps(pipe)
    assert maps.steps == 3
    torch.testing.assert_close(maps.maps.sum(-1), torch.ones(1, 16, 16))
    assert maps.heatmap("star").size == (512, 512)


def test_gradient_checkpointing_runs_layers_again_without_recording_them():
    plain, checkpointed = tiny.sd(), tiny.sd()
    checkpointed.unet.enable_gradient_checkpointing()
    results = [dynamic_prompts(each, inverted(each), WORDS, **SHORT) for each in (plain, checkpointed)]
    torch.testing.assert_close(results[0].word_embeds, results[1].word_embeds, atol=1e-4, rtol=1e-3)
    assert len(results[0].history) == len(results[1].history)


def test_words_by_index_and_words_that_stay_learned(pipe):
    named = dynamic_prompts(pipe, inverted(pipe), WORDS, **SHORT)
    pieces = PROMPT.split(" ")
    indexed = dynamic_prompts(pipe, inverted(pipe), [pieces.index(word) for word in WORDS], **SHORT)
    assert indexed.words == named.words == WORDS and torch.equal(indexed.word_embeds, named.word_embeds)
    refitted = null_text(pipe, named, num_null_steps=1)
    assert refitted.words == WORDS and torch.equal(refitted.word_embeds, named.word_embeds)
    assert refitted.history == named.history and not torch.equal(refitted.null_embeds, named.null_embeds)
    with pytest.raises(ValueError, match="index 99"):
        dynamic_prompts(pipe, inverted(pipe), [99])


def test_embeddings_instead_of_a_prompt_are_kept(pipe):
    embeds = noise(1, pipe.tokenizer.model_max_length, 12)
    inversion = null_text(
        pipe, ddim_invert(pipe, 0.5 * noise(1, 4, 16, 16), prompt_embeds=embeds, num_inference_steps=3)
    )
    p2p = PromptToPromptPipeline.from_pipe(pipe)
    output = p2p(PROMPT, PROMPT.replace("red", "green"), inversion=inversion, output_type="latent")
    torch.testing.assert_close(output.source, inversion.reconstruction, atol=1e-4, rtol=1e-4)


def test_schedules_and_adapters_that_do_not_serve():
    from diffusers import PNDMScheduler

    from tests.test_matrix import ip_adapter

    pipe = tiny.sd()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=False)
    with pytest.raises(da.UnsupportedModelError, match=r"PNDMScheduler sets .* timesteps for 10 steps"):
        inverted(pipe, 10)
    pipe = tiny.sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    with pytest.raises(da.UnsupportedModelError, match="unload_ip_adapter"):
        inverted(pipe)
