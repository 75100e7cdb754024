"""Attention that is looked at: the right numbers, and nothing changed by looking."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import diffusion_attn as da
from diffusion_attn.editing import record
from tests import tiny
from tests.test_matrix import add_lora, fresh_dynamo, ip_adapter, offload_as_a_whole, offload_sequentially
from tests.tiny import PROMPT, noise

WORDS = [word for word in PROMPT.split() if PROMPT.split().count(word) == 1][:2]
MAKERS = [tiny.sd, tiny.sdxl, tiny.flux, tiny.sd3]
__all__ = ["fresh_dynamo"]


def recorded(pipe, **kwargs):
    with record(pipe, WORDS) as maps:
        latents = tiny.run(pipe, **kwargs)
    return latents, maps


@pytest.mark.parametrize("make", MAKERS)
def test_looking_changes_nothing(make):
    pipe = make()
    plain, trace = tiny.run(pipe), tiny.trace_of(tiny.denoiser(pipe))
    latents, maps = recorded(pipe)
    torch.testing.assert_close(latents, plain, atol=1e-4, rtol=1e-4)
    assert tiny.trace_of(tiny.denoiser(pipe)) == trace
    assert torch.equal(tiny.run(pipe), plain)
    assert maps.steps == 5 and len(maps.maps) == 1 and maps.maps.isfinite().all()
    assert maps.prompts == [PROMPT]


def test_the_maps_are_those_that_are_computed_with():
    """Against the probabilities that stock code forms when its processor does not use the fused kernel."""
    pipe = tiny.sd()
    maps_of, layers = {}, dict(tiny.denoiser(pipe).named_modules())

    def spy(attn, query, key, mask=None):
        scores = type(attn).get_attention_scores(attn, query, key, mask)
        if scores.shape[-1] == pipe.tokenizer.model_max_length:
            maps_of.setdefault(scores.shape[1], []).append(scores.unflatten(0, (2, -1))[1].mean(0))
        return scores

    pipe.unet.set_attn_processor(AttnProcessor())
    for name, layer in layers.items():
        if name.endswith("attn2"):
            layer.get_attention_scores = lambda *args, attn=layer: spy(attn, *args)
    tiny.run(pipe, size=64, steps=1)
    for name, layer in layers.items():
        if name.endswith("attn2"):
            del layer.get_attention_scores
    with record(pipe, finest=4) as maps:
        tiny.run(pipe, size=64, steps=1)
    finest = 16  # queries of a latent of 16 x 16, four times smaller
    levels = [torch.stack(found).sum(0) for queries, found in maps_of.items() if queries <= finest]
    count = sum(len(found) for queries, found in maps_of.items() if queries <= finest)
    side = int(max(len(level) for level in levels) ** 0.5)
    resized = [
        torch.nn.functional.interpolate(
            level.T.unflatten(1, (int(len(level) ** 0.5), -1))[None], (side, side), mode="bilinear"
        )
        for level in levels
    ]
    torch.testing.assert_close(maps.maps[0].permute(2, 0, 1), torch.stack(resized).sum(0)[0] / count)


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd3])
def test_maps_of_joint_attention_are_the_texts_columns(make):
    pipe = make()
    with record(pipe, WORDS) as maps:
        tiny.run(pipe, steps=1, guidance_scale=1.0)
    tokens, seen = maps.maps.shape[1] * maps.maps.shape[2], []

    def spy(query, key, value):
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if query.shape[2] > tokens:  # not the layers of SD3.5 that see the image alone
            text = query.shape[2] - tokens
            seen.append(scores.softmax(-1).mean(1)[:, text:, :text])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    tiny.denoiser(pipe).set_attn_processor(da.processors.JointAttnProcessor(spy))
    tiny.run(pipe, steps=1, guidance_scale=1.0)
    torch.testing.assert_close(maps.maps.flatten(1, 2), torch.stack(seen).mean(0))


def test_maps_are_distributions_over_the_text():
    _, maps = recorded(tiny.sd(), size=(128, 64))
    torch.testing.assert_close(maps.maps.sum(-1), torch.ones(1, 16, 32))


def test_every_step_of_the_words_is_kept():
    _, maps = recorded(tiny.sd())
    mean = torch.stack([maps.word(WORDS[0], step=step) for step in range(5)]).mean(0)
    torch.testing.assert_close(mean, maps.word(WORDS[0]))
    with pytest.raises(ValueError, match="step 5"):
        maps.word(WORDS[0], step=5)


def test_prompts_of_a_batch_and_of_several_runs():
    pipe = tiny.sd()
    prompts = ["a red star on a white background", "a blue ring on a black background"]
    with record(pipe) as maps:
        tiny.run(pipe, steps=3)
        tiny.run(pipe, steps=2, prompt=prompts, num_images_per_prompt=2)
    assert maps.prompts == prompts and maps.steps == 2 and len(maps.maps) == 4
    maps.word("star", image=1), maps.word("ring", image=2)
    with pytest.raises(ValueError, match="'ring' is not a word of the prompt 'a red star"):
        maps.word("ring", image=1)
    with pytest.raises(ValueError, match="image is 4"):
        maps.word("ring", image=4)


def test_pictures():
    _, maps = recorded(tiny.sd(), size=(128, 64))
    heatmap = maps.heatmap(WORDS[0])
    assert heatmap.size == (512, 256)
    colors = heatmap.convert("L").getextrema()
    assert colors[0] < 40 and colors[1] > 200
    over = tiny.picture(64)
    assert maps.heatmap(WORDS[0], over=over).size == (64, 64)
    assert maps.grid().width == 2 * 192
    assert maps.grid(over=over).height == 192 + 16


def test_a_word_that_is_not_in_the_prompt_stops_the_run():
    pipe = tiny.sd()
    trace = tiny.trace_of(pipe.unet)
    with (
        pytest.raises(ValueError, match=f"'leopard' is not a word of the prompt {PROMPT!r}"),
        record(pipe, ["leopard"]),
    ):
        tiny.run(pipe)
    assert tiny.trace_of(pipe.unet) == trace


def test_embeddings_instead_of_a_prompt():
    pipe = tiny.sd()
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    call = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with record(pipe, WORDS, prompt=PROMPT) as maps:
        tiny.run(pipe, **call)
    known, _ = maps.word(WORDS[0]), None
    torch.testing.assert_close(known, recorded(pipe)[1].word(WORDS[0]))
    with record(pipe) as maps:
        tiny.run(pipe, **call)
    with pytest.raises(ValueError, match="record\\(pipe, prompt="):
        maps.word(WORDS[0])


def test_after_a_run_that_failed_the_next_one_is_read_afresh():
    pipe = tiny.sd()
    plain = recorded(pipe)[1].maps

    def fail(*args):
        raise RuntimeError("in the middle")

    with record(pipe, WORDS) as maps:
        with pytest.raises(ValueError, match="is not a word of the prompt 'a blue ring'"):
            tiny.run(pipe, prompt="a blue ring")
        hook = pipe.unet.mid_block.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            tiny.run(pipe)
        hook.remove()
        tiny.run(pipe)
    torch.testing.assert_close(maps.maps, plain)


def test_runs_of_one_step_follow_each_other():
    pipe = tiny.sd()
    call = dict(
        zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(PROMPT, "cpu", 1, True), strict=True)
    )
    with record(pipe, WORDS, prompt=PROMPT) as maps:
        tiny.run(pipe, steps=1, prompt=None, **call)
        first = maps.maps
        tiny.run(pipe, steps=1, prompt=None, size=64, **call)
    assert maps.steps == 1 and first.shape != maps.maps.shape


def test_words_as_they_are_written_in_the_prompt():
    pipe = tiny.sd()
    with record(pipe, ["Star,", "RING"]) as maps:
        tiny.run(pipe, steps=1, prompt="a red Star, a blue RING.")
    assert torch.equal(maps.word("RING"), maps.word("ring"))
    assert not torch.equal(maps.word("Star,"), maps.word("RING"))


def test_nothing_recorded():
    with record(tiny.sd()) as maps:
        pass
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        maps.heatmap("red")


@pytest.mark.parametrize("change", [offload_sequentially, offload_as_a_whole, lambda pipe: add_lora(pipe, "to_k")])
def test_beside_other_changes(change):
    pipe = tiny.sd()
    change(pipe)
    plain = tiny.run(pipe)
    latents, maps = recorded(pipe)
    torch.testing.assert_close(latents, plain, atol=1e-4, rtol=1e-4)
    assert maps.steps == 5


@pytest.mark.parametrize("scale", [0.7, 0.0])
def test_with_an_ip_adapter(scale):
    pipe = tiny.sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    pipe.set_ip_adapter_scale(scale)
    embeds = {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 1, 6), noise(1, 1, 6)])]}
    plain, before = tiny.run(pipe, **embeds), dict(pipe.unet.attn_processors)
    with record(pipe, WORDS) as maps:
        latents = tiny.run(pipe, **embeds)
        pipe.set_ip_adapter_scale(0.3)  # reaches the adapter behind
    torch.testing.assert_close(latents, plain, atol=1e-4, rtol=1e-4)
    assert all(before[name] is processor for name, processor in pipe.unet.attn_processors.items())
    assert {p.scale[0] for p in before.values() if hasattr(p, "scale")} == {0.3}
    assert maps.steps == 5


def test_with_masks_of_an_ip_adapter():
    pipe = tiny.sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    pipe.set_ip_adapter_scale([[0.9, 0.4]])
    masks = torch.zeros(1, 2, 128, 128)
    masks[:, 0, :, :64], masks[:, 1, :, 64:] = 1, 1
    call = {
        "ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 2, 6), noise(1, 2, 6)])],
        "cross_attention_kwargs": {"ip_adapter_masks": [masks]},
    }
    plain = tiny.run(pipe, **call)
    torch.testing.assert_close(recorded(pipe, **call)[0], plain, atol=1e-4, rtol=1e-4)


def test_compiled(fresh_dynamo):
    pipe = tiny.sd(layers_per_block=1)
    plain, maps = recorded(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    tiny.run(pipe)
    latents, again = recorded(pipe)
    torch.testing.assert_close(latents, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.maps, maps.maps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tiny.run(pipe), plain, atol=1e-4, rtol=1e-4)


def test_beside_methods():
    pipe = tiny.sd()
    da.enable(pipe, da.LinFusion.for_model(pipe.unet, mid_dim=4))
    plain = tiny.run(pipe)
    latents, maps = recorded(pipe)
    torch.testing.assert_close(latents, plain, atol=1e-4, rtol=1e-4)
    assert maps.steps == 5


def test_clear_has_no_maps():
    pipe = tiny.flux()
    clear = da.Clear.for_model(pipe.transformer, radius=4)
    with record(pipe), pytest.raises(da.MethodConflictError, match="ControlledJointAttnProcessor"):
        da.enable(pipe, clear)
    da.enable(pipe, clear)
    with pytest.raises(da.MethodConflictError, match="disable it"), record(pipe):
        pass


def test_with_a_controlnet():
    base = tiny.sd()
    from diffusers import StableDiffusionControlNetPipeline

    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = tiny.quiet(
        StableDiffusionControlNetPipeline(**parts, controlnet=tiny.controlnet(base.unet), requires_safety_checker=False)
    )
    plain = tiny.run(pipe, image=tiny.picture())
    latents, maps = recorded(pipe, image=tiny.picture())
    torch.testing.assert_close(latents, plain, atol=1e-4, rtol=1e-4)
    assert maps.steps == 5


def test_true_guidance_of_flux_counts_the_prompts_branch_alone():
    pipe = tiny.flux()
    _, plain = recorded(pipe)
    with record(pipe, WORDS) as maps:
        tiny.run(pipe, steps=1, negative_prompt="a green cross on a black background", true_cfg_scale=3.0)
    assert maps.prompts == [PROMPT] and maps.steps == 1
    torch.testing.assert_close(maps.word(WORDS[0]), plain.word(WORDS[0], step=0))


def test_levels_are_kept_apart():
    """The coarsest level by itself is what `finest` leaves; every level has a grid of its own, and every step."""
    pipe = tiny.sd()
    with record(pipe, WORDS, levels=True) as maps:
        tiny.run(pipe)
    coarsest = max(maps.levels)
    with record(pipe, WORDS, finest=coarsest) as alone:
        tiny.run(pipe)
    assert torch.equal(maps.levels[coarsest].maps, alone.maps)
    assert torch.equal(maps.levels[coarsest].word(WORDS[0], step=2), alone.word(WORDS[0], step=2))
    grids = [level.maps.shape[1] for level in maps.levels.values()]
    assert grids == sorted(set(grids), reverse=True)
    assert maps.maps.shape == maps.levels[min(maps.levels)].maps.shape
