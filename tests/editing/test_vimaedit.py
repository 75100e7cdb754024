"""ViMAEdit on tiny pipelines: its identities, pairs, masks, image guidance, and beside what touches a pipeline."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from PIL import Image

import diffusion_attn as da
from diffusion_attn.editing.guidance import image_guidance_embeds
from diffusion_attn.editing.schedulers import EditDDIMScheduler, EditDPMSolverMultistepScheduler
from diffusion_attn.pipelines import ViMAEditPipeline
from tests import tiny
from tests.editing.test_pipelines import CHANGES as OTHERS
from tests.test_matrix import fresh_dynamo, ip_adapter
from tests.tiny import PROMPT, noise

TARGET = PROMPT.replace("star", "square")
WORDS = ("star", "square")
KNOWN = 0.7 * noise(1, 4, 16, 16, seed=3)
STEPS = 5
__all__ = ["fresh_dynamo"]


def edit(pipe, target=TARGET, blend_words=WORDS, image=KNOWN, **kwargs):
    vima = pipe if isinstance(pipe, ViMAEditPipeline) else ViMAEditPipeline.from_pipe(pipe)
    call = {
        "num_inference_steps": STEPS,
        "latents": noise(1, 4, 16, 16),
        "variance_noise": noise(STEPS, 1, 4, 16, 16, seed=1),
        "output_type": "latent",
        **kwargs,
    }
    return vima(image, PROMPT, target, blend_words, **call)


def close(a, b):
    torch.testing.assert_close(a, b, atol=5e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


def adapted(make=tiny.sd, clip=None):
    """With an IP-Adapter, and both halves of its CLIP."""
    pipe = make()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet, width=12 if clip else 6)])
    if clip is None:
        return ViMAEditPipeline.from_pipe(pipe)
    vima = ViMAEditPipeline.from_pipe(pipe)
    vima.load_clip(clip)
    return vima


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


# ---- what the source and the masks promise


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("scheduler", [EditDDIMScheduler, EditDPMSolverMultistepScheduler])
def test_the_source_ends_at_its_picture_and_so_does_all_outside_of_the_mask(make, scheduler):
    pipe = make()
    vima = ViMAEditPipeline.from_pipe(pipe, scheduler=scheduler.from_config(pipe.scheduler.config))
    output = edit(vima)
    assert torch.equal(output.source, KNOWN)
    kept = ~output.blend_mask.expand_as(output.images)
    assert kept.any() and torch.equal(output.images[kept], KNOWN[kept])
    assert not torch.allclose(output.images, KNOWN, atol=1e-2)
    assert (output.blend_mask | ~output.variance_mask).all() and output.variance_mask.any()
    assert output.word_maps.shape == (2, 1, 8, 8)


def test_a_target_that_is_the_source_stays(pipe):
    close(edit(pipe, PROMPT, None, guidance_scale=1.0).images, KNOWN)
    assert not torch.allclose(edit(pipe, PROMPT, None).images, KNOWN, atol=1e-2)


@pytest.mark.parametrize(("layout", "same"), [("per_branch", True), ("contrastive", False)])
def test_only_with_a_picture_for_each_branch_an_equal_prompt_changes_nothing(clip, layout, same):
    vima = adapted(clip=clip)
    call = {"image": tiny.picture(64), "source_guidance_scale": 3.0, "guidance_scale": 3.0}
    output = edit(vima, PROMPT, None, image_guidance_layout=layout, image_replace_steps=0, **call)
    assert torch.allclose(output.images, output.source, atol=1e-3) == same


def test_no_noise_is_no_mask_for_it(pipe):
    quiet = ViMAEditPipeline.from_pipe(pipe, scheduler=EditDDIMScheduler.from_config(pipe.scheduler.config, eta=0.0))
    close(edit(quiet).images, edit(pipe, variance_threshold=None).images)
    assert not torch.allclose(edit(quiet).images, edit(pipe).images, atol=1e-3)


def test_masks_begin_where_they_are_told_to(pipe):
    never = edit(pipe, mask_start=1.0)  # the last step
    assert never.blend_mask is not None
    none = edit(pipe, blend_words=None)
    assert none.blend_mask is none.variance_mask is none.word_maps is None
    close(never.images, torch.where(never.blend_mask, none.images, KNOWN))


def test_words_that_are_not_spread_need_no_self_attention(pipe):
    plain = edit(pipe, grounding_iterations=0)
    close(plain.word_maps, edit(pipe, grounding_gamma=1.0).word_maps)
    assert not torch.allclose(plain.word_maps, edit(pipe).word_maps, atol=1e-4)
    assert edit(pipe, spread_size=4).word_maps.shape == edit(pipe, map_size=2).word_maps.shape == (2, 1, 4, 4)
    assert edit(pipe, map_size=16).word_maps.shape == (2, 1, 16, 16)


def test_rows_that_are_not_guided_are_left_out(pipe):
    """As if the source's unconditional row were there: 3 rows instead of 4."""
    sizes = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    close(edit(pipe).images, edit(pipe, source_guidance_scale=1 + 1e-6).images)
    edit(pipe, guidance_scale=1.0)
    handle.remove()
    assert sizes == [3] * STEPS + [4] * STEPS + [2] * STEPS


# ---- masks of the user


def test_a_mask_of_the_user_is_taken_instead_of_words_or_cut_out_of_theirs(pipe):
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    output = edit(pipe, edit_mask=left)
    assert torch.equal(output.images[..., 8:], KNOWN[..., 8:]) and output.word_maps is None
    assert torch.equal(output.blend_mask, left.bool()[None, None])
    late = {"mask_start": 1.0}  # so that both have seen the same
    cut = edit(pipe, edit_mask=left, edit_mask_mode="intersect", **late)
    assert torch.equal(cut.blend_mask, edit(pipe, **late).blend_mask & left.bool())
    alone = edit(pipe, edit_mask=left, blend_words=None)
    assert torch.equal(alone.images, output.images)


@pytest.mark.parametrize("kind", ["picture", "array", "tensor"])
def test_it_may_be_painted_in_pixels(pipe, kind):
    pixels = np.zeros((64, 64), dtype=bool)
    pixels[5, 7] = True
    mask = {
        "picture": lambda: Image.fromarray(pixels.astype(np.uint8) * 255),
        "array": lambda: pixels,
        "tensor": lambda: torch.tensor(pixels)[None, None],
    }[kind]()
    found = edit(pipe, edit_mask=mask).blend_mask
    assert found.nonzero().tolist() == [[0, 0, 1, 1]]


def test_a_mask_can_say_how_much(pipe):
    whole, half = (edit(pipe, edit_mask=torch.full((16, 16), much)).images for much in (1.0, 0.5))
    assert 0 < (half - KNOWN).abs().mean() < (whole - KNOWN).abs().mean()


def test_where_words_and_mask_have_nothing_in_common_is_an_error(pipe):
    found = edit(pipe, mask_start=1.0, blend_threshold=0.9).blend_mask
    call = {"mask_start": 1.0, "blend_threshold": 0.9, "edit_mask_mode": "intersect"}
    with pytest.raises(da.DiffusionAttnError, match="only outside of edit_mask"):
        edit(pipe, edit_mask=~found, **call)


# ---- pairs


def test_pairs_do_not_know_each_other(pipe):
    longer = PROMPT.replace("a blue", "a large blue")
    images = [KNOWN, 0.7 * noise(1, 4, 16, 16, seed=8), 0.5 * KNOWN]
    targets, words = [TARGET, longer, TARGET], [WORDS, (["ring"], ["large", "ring"]), None]
    latents, drawn = noise(3, 4, 16, 16), noise(STEPS, 3, 4, 16, 16, seed=1)
    weights = [None, {"large": 3.0}, None]
    together = edit(pipe, targets, words, images, latents=latents, variance_noise=drawn, word_weights=weights)
    assert together.blend_mask.shape == (3, 1, 16, 16) and together.word_maps.shape == (6, 1, 8, 8)
    assert together.blend_mask[2].all() and not together.variance_mask[2].any()
    batch = edit(pipe, targets, words, torch.cat(images), latents=latents, variance_noise=drawn, word_weights=weights)
    assert torch.equal(batch.images, together.images)
    for pair in range(3):
        one = slice(pair, pair + 1)
        alone = edit(
            pipe,
            targets[pair],
            words[pair],
            images[pair],
            latents=latents[one],
            variance_noise=drawn[:, one],
            word_weights=weights[pair],
        )
        close(together.images[one], alone.images)
        assert torch.equal(together.source[one], images[pair])
        if words[pair]:
            assert torch.equal(together.blend_mask[one], alone.blend_mask)


def test_pairs_without_words_do_not_know_others_that_have_some(pipe):
    """Beside a painted mask, a pair without words has that mask, for noise too."""
    call = {"edit_mask": torch.ones(16, 16).tril(), "edit_mask_mode": "intersect"}
    both = edit(pipe, [TARGET, TARGET], [WORDS, None], **call)
    close(both.images[:1], edit(pipe, **call).images)
    close(both.images[1:], edit(pipe, blend_words=None, **call).images)


def test_words_of_one_side_alone(pipe):
    source, target = edit(pipe, blend_words=("star", [])), edit(pipe, blend_words=([], "square"))
    assert not source.word_maps[1].any() and not target.word_maps[0].any()
    assert not source.blend_mask.all() and not target.blend_mask.all() and target.variance_mask.any()


def test_one_tuple_of_several_words_is_for_all_pairs_and_a_list_for_each(pipe):
    several = (["red", "star"], ["square", "red"])
    for_all = edit(pipe, [TARGET, TARGET], several)
    for_each = edit(pipe, [TARGET, TARGET], [several, several])
    assert torch.equal(for_all.images, for_each.images)
    windows = [edit(pipe, cross_replace_steps=window).images for window in ([0.0, 0.4], (0.0, 0.4), 0.4)]
    assert torch.equal(windows[0], windows[1]) and torch.equal(windows[1], windows[2])


def test_one_picture_in_several_ways(pipe):
    output = edit(pipe, [TARGET, TARGET])
    assert torch.equal(*output.images) and torch.equal(*output.blend_mask)


# ---- image guidance


def test_the_target_is_told_of_the_picture_it_will_be(clip):
    vima, photo = adapted(clip=clip), tiny.picture(64)
    pixels = vima.feature_extractor(images=photo, return_tensors="pt").pixel_values
    tokens = vima.tokenizer([PROMPT, TARGET], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        seen = vima.image_encoder(pixels).image_embeds
        said = vima.guidance_text_encoder(tokens).text_embeds
    given = [image_guidance_embeds(seen, said[:1], said[1:])]
    estimated = edit(vima, image=photo).images
    close(estimated, edit(vima, image=photo, ip_adapter_image_embeds=given).images)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
    close(estimated, edit(vima, image=pixels).images)
    assert not torch.allclose(estimated, edit(vima, image=photo, image_guidance_layout="per_branch").images, atol=1e-3)


def test_without_strength_it_is_the_pipeline_without_an_adapter():
    close(edit(adapted(), ip_adapter_scale=0).images, edit(tiny.sd()).images)
    patches = adapted()  # an adapter that reads patches
    resampler = IPAdapterPlusImageProjection(6, 12, 8, 1, 8, 2, 4)
    patches.unet.encoder_hid_proj = MultiIPAdapterImageProjection([resampler])
    close(edit(patches, ip_adapter_scale=0).images, edit(tiny.sd()).images)
    with pytest.raises(da.UnsupportedModelError, match="reads patches"):
        edit(patches, image=tiny.picture(64))


def test_the_scale_is_set_for_the_run_alone(clip):
    vima = adapted(clip=clip)
    processors = [p for p in vima.unet.attn_processors.values() if hasattr(p, "scale")]
    for processor in processors:
        processor.scale = [0.7]
    call = {"image": tiny.picture(64)}
    as_it_is = edit(vima, ip_adapter_scale=None, **call).images
    close(as_it_is, edit(vima, ip_adapter_scale=0.7, **call).images)
    assert not torch.allclose(as_it_is, edit(vima, **call).images, atol=1e-4)
    assert [p.scale for p in processors] == [[0.7]] * len(processors)


def test_sdxl_has_the_text_encoder_of_its_own_adapters(clip):
    pipe = tiny.sdxl()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet, width=12)])
    vima = ViMAEditPipeline.from_pipe(pipe)
    vima.load_clip(clip)
    expected = edit(vima, image=tiny.picture(64)).images
    vima.register_modules(guidance_text_encoder=None)
    own = edit(vima, image=tiny.picture(64)).images
    assert own.isfinite().all() and not torch.equal(own, expected)


def test_what_is_missing_for_it_is_named(clip):
    with pytest.raises(ValueError, match="image_encoder or feature_extractor is missing"):
        edit(adapted(), image=tiny.picture(64))
    vima = adapted(clip=clip)
    with pytest.raises(ValueError, match="given as latents"):
        edit(vima)
    vima.register_modules(guidance_text_encoder=None)
    with pytest.raises(ValueError, match=r"call load_clip\(\)"):
        edit(vima, image=tiny.picture(64))
    other = adapted()
    parts = {name: getattr(adapted(clip=clip), name) for name in ("image_encoder", "feature_extractor")}
    other.register_modules(**parts, guidance_text_encoder=adapted(clip=clip).guidance_text_encoder)
    with pytest.raises(da.UnsupportedModelError, match=r"gives 12 numbers.*takes \[6\]"):
        edit(other, image=tiny.picture(64))


# ---- schedulers


def test_a_stock_scheduler_becomes_one_that_edits(pipe):
    for stock in (EulerDiscreteScheduler, DDIMScheduler):
        pipe.scheduler, own = stock.from_config(pipe.scheduler.config, clip_sample=True), pipe.scheduler
        vima = ViMAEditPipeline.from_pipe(pipe)
        pipe.scheduler = own
        assert isinstance(vima.scheduler, EditDDIMScheduler)
        assert not vima.scheduler.config.clip_sample and vima.scheduler.config.steps_offset == 1
    assert not hasattr(pipe.scheduler, "edit_step")
    cubic = EditDPMSolverMultistepScheduler.from_config(own.config, solver_order=3)
    with pytest.raises(ValueError, match="solver_order of the scheduler is 3"):
        edit(ViMAEditPipeline.from_pipe(pipe, scheduler=cubic))
    vima.scheduler = own
    with pytest.raises(ValueError, match="DDIMScheduler, which cannot edit"):
        edit(vima)


def test_few_steps_with_all_the_noise(pipe):
    """InfEdit's: the source is exact all the same, and chosen timesteps are the ones that are taken."""
    scheduler = EditDDIMScheduler.from_config(pipe.scheduler.config, variance="marginal")
    steps = []
    output = edit(
        ViMAEditPipeline.from_pipe(pipe, scheduler=scheduler),
        timesteps=[999, 759, 499, 259],
        variance_noise=noise(4, 1, 4, 16, 16),
        variance_threshold=None,
        callback_on_step_end=lambda *args: steps.append(int(args[2])) or {},
    )
    assert steps == [999, 759, 499, 259] and torch.equal(output.source, KNOWN)
    vima = ViMAEditPipeline.from_pipe(pipe)
    few = {"variance_noise": noise(3, 1, 4, 16, 16)}
    numbers = [edit(vima, timesteps=kind([901, 500, 20]), **few).images for kind in (list, torch.tensor)]
    assert torch.equal(*numbers)


def test_v_prediction_ends_at_the_source_too():
    pipe = tiny.sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    output = edit(pipe)
    assert torch.equal(output.source, KNOWN) and output.images.isfinite().all()


# ---- beside other changes


CHANGES = {"nothing": lambda pipe: None, **OTHERS}


@pytest.mark.parametrize("name", CHANGES)
def test_beside_other_changes_it_leaves_no_trace(name):
    pipe = tiny.sd()
    CHANGES[name](pipe)
    trace = tiny.trace_of(pipe.unet)
    stock = tiny.run(pipe, size=64, steps=3)
    changed = edit(pipe).images
    assert torch.equal(edit(pipe).images, changed)
    assert torch.allclose(changed, edit(tiny.sd()).images, atol=1e-3) == (name != "lora")
    assert tiny.trace_of(pipe.unet) == trace
    assert torch.equal(tiny.run(pipe, size=64, steps=3), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype, clip):
    vima = adapted(clip=clip).to(dtype)
    output = edit(vima, image=tiny.picture(64), output_type="pil")
    assert vima.unet.dtype == vima.guidance_text_encoder.dtype == dtype
    assert output.images[0].size == (64, 64) and output.word_maps.dtype == torch.float32


@pytest.mark.parametrize("size", [(64, 96), (104, 56)])
def test_oblong_sizes_and_pictures(pipe, size):
    height, width = size
    call = {"latents": None, "variance_noise": None, "output_type": "pil"}
    photo = tiny.picture(128).resize((width, height))
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    first, again = (edit(pipe, image=photo, generator=generator, **call) for generator in generators)
    assert first.images[0].size == (width, height) and first.images[0].tobytes() == again.images[0].tobytes()
    for mode in ("L", "RGBA"):
        assert edit(pipe, image=photo.convert(mode), **call).images[0].mode == "RGB"
    cut = edit(pipe, image=tiny.picture(128), height=height, width=width, **call)
    assert cut.images[0].size == (width, height)


def test_compiled(fresh_dynamo):
    pipe = tiny.sd()
    expected = edit(pipe).images
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    close(edit(pipe).images, expected)


def test_beside_methods():
    pipe = tiny.sd()
    da.enable(pipe, da.LinFusion.for_model(pipe.unet, mid_dim=4))
    with pytest.raises(da.MethodConflictError, match="no attention map"):
        edit(pipe)
    output = edit(pipe, self_replace_steps=0, grounding_iterations=0)
    assert torch.equal(output.source, KNOWN)


def test_after_an_exception_everything_is_as_before(clip):
    vima = adapted(clip=clip)
    trace = tiny.trace_of(vima.unet)

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(vima, image=tiny.picture(64), callback_on_step_end=fail)
    assert tiny.trace_of(vima.unet) == trace
    assert all(p.scale == [1.0] for p in vima.unet.attn_processors.values() if hasattr(p, "scale"))


def test_it_is_saved_and_loaded(pipe, tmp_path, clip):
    vima = ViMAEditPipeline.from_pipe(pipe)
    vima.load_clip(clip)
    vima.save_pretrained(tmp_path)
    again = ViMAEditPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(edit(again).images, edit(vima).images)
    assert isinstance(again.scheduler, EditDDIMScheduler) and again.guidance_text_encoder is not None


# ---- arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"blend_words": ("star", "leopard")}, "blend_words names 'leopard'"),
        ({"blend_words": "star"}, "blend_words is 'star'"),
        ({"blend_words": [WORDS, WORDS, WORDS]}, "each of the 1 pairs"),
        ({"target": []}, "'target_prompt': 0"),
        ({"target": [TARGET] * 3, "image": [KNOWN] * 2}, "'image': 2.*'target_prompt': 3"),
        ({"blend_threshold": 1.0}, "blend_threshold is 1.0"),
        ({"variance_threshold": -0.1}, "variance_threshold is -0.1"),
        ({"mask_start": 20}, "mask_start is 20"),
        ({"grounding_gamma": 1.5}, "grounding_gamma is 1.5"),
        ({"grounding_iterations": -1}, "grounding_iterations is -1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"variance_noise": noise(2, 1, 4, 16, 16)}, r"give \(5, 1 or 1, C, h, w\)"),
        ({"generator": [torch.Generator()] * 2}, "generator has 2 entries for 1 pairs"),
        ({"target": "a " * 40 + TARGET}, "tokens, and the model reads 32"),
        ({"negative_prompt": ["dark", "light"]}, "give one text for all rows"),
        ({"latents": noise(1, 4, 8, 8)}, "give noise of the picture's"),
        ({"edit_mask": torch.zeros(16, 16)}, "edit_mask runs from 0 to 0"),
        ({"edit_mask": torch.full((16, 16), 255)}, "edit_mask runs from 255 to 255"),
        ({"edit_mask": torch.ones(3, 16, 16)}, r"edit_mask has the shape \(3, 16, 16\)"),
        ({"edit_mask_mode": "both"}, "edit_mask_mode is 'both'"),
        ({"latents": noise(2, 4, 16, 16)}, r"latents have the shape \(2, 4, 16, 16\)"),
        ({"image": [KNOWN, noise(1, 4, 16, 8)], "target": [TARGET] * 2}, "bring pictures to one size"),
        ({"ip_adapter_image_embeds": [noise(2, 1, 6)]}, r"have \[2\] rows; give 4"),
        ({"ip_adapter_image_embeds": [noise(4, 1, 6)]}, "only then"),
        ({"prompt_embeds": noise(1, 20, 12)}, "prompt_embeds have 1 rows; give 2"),
        ({"word_weights": [None, None]}, "word_weights has 2 entries for 1 pairs"),
        ({"callback_on_step_end_tensor_inputs": ["text"]}, "'latents' alone"),
        ({"map_size": 5}, "map_size is"),
        ({"image": tiny.picture(64), "height": 63}, "give multiples of 4"),
        ({"timesteps": [1, 500]}, "give falling ones"),
    ],
)
def test_bad_arguments(pipe, kwargs, message):
    trace = tiny.trace_of(pipe.unet)
    with pytest.raises((ValueError, da.UnsupportedModelError), match=message):
        edit(pipe, **kwargs)
    assert tiny.trace_of(pipe.unet) == trace


def test_words_that_look_nowhere_are_an_error():
    """With queries that are the same everywhere."""
    pipe = tiny.sd()
    for layer in pipe.unet.modules():
        if getattr(layer, "is_cross_attention", False):
            torch.nn.init.zeros_(layer.to_q.weight)
    with pytest.raises(da.DiffusionAttnError, match="attend to every part of the picture alike"):
        edit(pipe, grounding_iterations=0)
