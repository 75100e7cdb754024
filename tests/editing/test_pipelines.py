"""Edits on tiny pipelines: what must hold whatever the weights, and beside everything that touches a pipeline."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import diffusion_attn as da
from diffusion_attn.editing.inversion import ddim_invert, null_text
from diffusion_attn.pipelines import DPLPipeline, PromptToPromptPipeline
from tests import tiny
from tests.test_matrix import add_lora, fresh_dynamo, ip_adapter, offload_as_a_whole, offload_sequentially
from tests.tiny import PROMPT, noise

TARGET = PROMPT.replace("star", "square")
LONGER = PROMPT.replace("a blue", "a large blue")
__all__ = ["fresh_dynamo"]


def edit(pipe, target=TARGET, **kwargs):
    p2p = PromptToPromptPipeline.from_pipe(pipe)
    call = {"num_inference_steps": 4, "latents": noise(1, 4, 16, 16), "output_type": "latent", **kwargs}
    return p2p(PROMPT, target, **call)


def close(a, b):
    torch.testing.assert_close(a, b, atol=5e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_the_source_is_what_the_stock_pipeline_draws(make):
    pipe = make()
    stock = tiny.run(pipe, size=64, steps=4, latents=noise(1, 4, 16, 16), guidance_scale=7.5)
    close(edit(pipe).source, stock)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_empty_windows_are_plain_sampling(make):
    pipe = make()
    target = edit(pipe, cross_replace_steps=0, self_replace_steps=0).images
    stock = tiny.run(pipe, size=64, steps=4, latents=noise(1, 4, 16, 16), guidance_scale=7.5, prompt=TARGET)
    close(target, stock)
    assert not torch.allclose(edit(pipe).images, target, atol=1e-3)


def test_equal_prompts_give_equal_pictures(pipe):
    output = edit(pipe, [PROMPT, PROMPT])
    close(output.images, output.source.expand(2, -1, -1, -1))


def test_self_attention_in_the_fused_kernel_equals_the_map(pipe):
    """The published way: form the map of the source and multiply the target's values with it."""
    from diffusion_attn.editing.attention import AttentionControl, probabilities
    from diffusion_attn.editing.controls import PromptEdit
    from diffusion_attn.editing.layers import AttentionLayer

    change = PromptEdit(PROMPT, TARGET, pipe.tokenizer, 10, self_replace_steps=1.0)
    control = AttentionControl((4, 4), [change], rows=2)
    layer = AttentionLayer("layer", None, "self", "down", 1)
    query, key, value = (noise(4, 16, 2, 8, seed=seed) for seed in range(3))

    def fused(query, key, value, mask):
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    maps = probabilities(query, key)
    maps[2:] = change.edit(maps[2:], kind="self", step=0)
    expected = (maps @ value.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(control.attend(layer, query, key, value, None, fused), expected)


def test_a_blend_everywhere_changes_nothing_and_one_nowhere_keeps_the_source(pipe):
    words = ("star", "square")
    everywhere = edit(pipe, blend_words=words, blend_threshold=-1.0)
    assert everywhere.blend_mask.all() and everywhere.blend_mask.shape == (1, 1, 16, 16)
    close(everywhere.images, edit(pipe).images)
    nowhere = edit(pipe, blend_words=words, blend_threshold=1.0)
    assert not nowhere.blend_mask.any()
    assert torch.equal(nowhere.images, nowhere.source)
    some = edit(pipe, blend_words=words, blend_threshold=0.8)
    kept = ~some.blend_mask.expand_as(some.images)
    assert kept.any() and torch.equal(some.images[kept], some.source[kept])
    assert some.word_maps.shape == (2, 1, 4, 4)


def test_word_weights(pipe):
    assert not torch.allclose(edit(pipe, word_weights={"square": 3.0}).images, edit(pipe).images, atol=1e-3)
    close(edit(pipe, word_weights={"square": 1.0}).images, edit(pipe).images)


def test_several_targets_are_the_same_as_each_alone(pipe):
    both = edit(pipe, [TARGET, LONGER], edit_type="refine")
    close(both.images[:1], edit(pipe, TARGET, edit_type="refine").images)
    close(both.images[1:], edit(pipe, LONGER).images)


def test_without_guidance(pipe):
    output = edit(pipe, guidance_scale=1)
    stock = tiny.run(pipe, size=64, steps=4, latents=noise(1, 4, 16, 16), guidance_scale=1)
    close(output.source, stock)


def test_other_schedulers():
    pipe = tiny.sd()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    stock = tiny.run(pipe, size=64, steps=4, latents=noise(1, 4, 16, 16), guidance_scale=7.5)
    close(edit(pipe).source, stock)


@pytest.mark.parametrize("size", [(64, 96), (104, 56)])
def test_oblong_sizes_and_pictures(pipe, size):
    height, width = size
    output = edit(pipe, latents=None, height=height, width=width, output_type="pil", blend_words=("star", "square"))
    assert output.images[0].size == (width, height) and len(output.source) == 1


def test_callbacks_see_and_change_the_latents(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    output = edit(pipe, callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] and seen[0][2] == (2, 4, 16, 16)
    assert not output.images.any()


def test_a_tuple_instead_of_an_output(pipe):
    images, source = edit(pipe, return_dict=False)[:2]
    assert images.shape == source.shape == (1, 4, 16, 16)


def test_after_an_exception_everything_is_as_before(pipe):
    trace = tiny.trace_of(pipe.unet)

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(pipe, callback_on_step_end=fail)
    assert tiny.trace_of(pipe.unet) == trace
    edit(pipe)
    assert tiny.trace_of(pipe.unet) == trace


def test_an_inversion_leads_the_run(pipe):
    p2p = PromptToPromptPipeline.from_pipe(pipe)
    inversion = null_text(pipe, ddim_invert(pipe, 0.5 * noise(1, 4, 16, 16), PROMPT, num_inference_steps=3))
    steps = []
    output = p2p(
        target_prompt=TARGET,
        inversion=inversion,
        output_type="latent",
        callback_on_step_end=lambda *args: steps.append(args[2]) or {},
    )
    assert steps == inversion.timesteps.tolist()
    close(output.source, inversion.reconstruction)


def test_invert_finds_a_background_where_none_is_given(pipe):
    dpl = DPLPipeline.from_pipe(pipe)
    image, words, short = tiny.picture(64), ["star", "ring"], {"num_word_steps": 1, "num_null_steps": 1}
    plain, mask = dpl.segment(image, PROMPT, words, num_inference_steps=2, threshold=0.9)
    assert mask.shape == (8, 8) and mask.dtype == torch.bool
    torch.testing.assert_close(
        plain.latents, ddim_invert(pipe, dpl.encode_image(image), PROMPT, num_inference_steps=2).latents
    )
    found = dpl.invert(image, PROMPT, words, num_inference_steps=2, background_threshold=0.9, **short)
    given = dpl.invert(image, PROMPT, words, num_inference_steps=2, background=mask, **short)
    assert found.history == given.history and found.history[0]["leakage"] > 0
    _, nowhere = dpl.segment(image, PROMPT, words, num_inference_steps=2, threshold=-1.0)
    assert nowhere is None


# ---- beside other changes


CHANGES = {
    "lora": lambda pipe: add_lora(pipe, "to_q", "to_v"),
    "offload": offload_as_a_whole,
    "sequential offload": offload_sequentially,
    "sliced": lambda pipe: pipe.enable_attention_slicing(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_beside_other_changes(name):
    pipe = tiny.sd()
    CHANGES[name](pipe)
    stock = tiny.run(pipe, size=64, steps=4, latents=noise(1, 4, 16, 16), guidance_scale=7.5)
    output = edit(pipe)
    close(output.source, stock)
    close(tiny.run(pipe, size=64, steps=4, latents=noise(1, 4, 16, 16), guidance_scale=7.5), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_components_keep_it(dtype):
    pipe = tiny.sd().to(dtype)
    output = edit(pipe, blend_words=("star", "square"))
    assert pipe.unet.dtype == pipe.text_encoder.dtype == dtype and output.images.isfinite().all()


def test_with_an_ip_adapter():
    pipe = tiny.sd()
    with pytest.raises(ValueError, match="only then"):
        edit(pipe, ip_adapter_image_embeds=[noise(4, 1, 6)])
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    with pytest.raises(ValueError, match="ip_adapter_image_embeds are needed"):
        edit(pipe)
    two = torch.cat([torch.zeros(1, 1, 6), noise(1, 1, 6)])
    call = {"size": 64, "steps": 4, "latents": noise(1, 4, 16, 16), "guidance_scale": 7.5}
    stock = tiny.run(pipe, ip_adapter_image_embeds=[two], **call)
    processors = dict(pipe.unet.attn_processors)
    close(edit(pipe, ip_adapter_image_embeds=[two.repeat_interleave(2, 0)]).source, stock)
    assert all(processors[name] is processor for name, processor in pipe.unet.attn_processors.items())


def test_compiled(fresh_dynamo):
    pipe = tiny.sd()
    expected = edit(pipe).images
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    close(edit(pipe).images, expected)


def test_beside_methods():
    pipe = tiny.sd()
    da.enable(pipe, da.LinFusion.for_model(pipe.unet, mid_dim=4))
    with pytest.raises(da.MethodConflictError, match="self_replace_steps=0"):
        edit(pipe)
    stock = tiny.run(pipe, size=64, steps=4, latents=noise(1, 4, 16, 16), guidance_scale=7.5)
    close(edit(pipe, self_replace_steps=0).source, stock)


# ---- arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": None}, "target_prompt is missing"),
        ({"latents": noise(2, 4, 16, 16)}, r"latents have the shape \(2, 4, 16, 16\)"),
        ({"latents": None, "height": 63}, "give multiples of 4 pixels"),
        ({"blend_words": "star"}, "one entry for each of the 2 prompts"),
        ({"blend_words": ("star", "leopard")}, "blend_words names 'leopard'.*square"),
        ({"target": LONGER, "edit_type": "replace"}, "word"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "text"]}, "'latents' alone"),
        ({"blend_words": ("star", "square"), "map_size": 5}, "ValueError|map_size is"),
    ],
)
def test_bad_arguments(pipe, kwargs, message):
    trace = tiny.trace_of(pipe.unet)
    with pytest.raises((ValueError, da.UnsupportedModelError), match=message):
        edit(pipe, **kwargs)
    assert tiny.trace_of(pipe.unet) == trace


def test_other_families_are_refused():
    with pytest.raises(da.UnsupportedModelError, match=r"FluxPipeline.*Stable Diffusion 1, 2 or XL"):
        PromptToPromptPipeline.from_pipe(tiny.flux())
