"""Every method beside everything else that touches a pipeline, in either order of calls."""

import copy
from functools import cache, partial

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model_state_dict

import diffusion_attn as da
from diffusion_attn.methods import METHODS
from tests import tiny
from tests.golden.seeded import seed_parameters
from tests.tiny import noise, picture

ALSO = {"merge_cross_attention": True, "merge_feed_forward": True}
SHORT = partial(tiny.sd, layers_per_block=1)
SHORT_XL = partial(tiny.sdxl, layers_per_block=1, transformer_layers_per_block=1)
"""Shorter to run and to trace, with all that a method distinguishes."""
COMPACT = partial(
    SHORT_XL,
    block_out_channels=(8, 16),
    attention_head_dim=[1, 2],
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
ROWS = {
    "hidiffusion": (SHORT, lambda model: da.HiDiffusion()),
    "linfusion": (SHORT, lambda model: seed_parameters(da.LinFusion.for_model(model, mid_dim=4))),
    "agent": (SHORT, lambda model: da.AgentAttention()),
    "agent-everywhere": (SHORT, lambda model: da.AgentAttention(max_downsample=4, **ALSO)),
    "token_merging": (SHORT, lambda model: da.TokenMerging()),
    "agent-flux": (tiny.flux, lambda model: da.AgentAttention(experimental=True)),
    "agent-sd3": (tiny.sd3, lambda model: da.AgentAttention(experimental=True)),
    "clear": (tiny.flux, lambda model: seed_parameters(da.Clear.for_model(model, radius=4))),
    "clear-pooled": (tiny.flux, lambda model: seed_parameters(da.Clear.for_model(model, radius=3, down_factor=2))),
    "clear-sd3": (tiny.sd3, lambda model: seed_parameters(da.Clear.for_model(model, radius=4))),
    "low_memory": (SHORT, lambda model: da.LowMemory(feed_forward_chunks=3, park_skips="disk")),
    "low_memory-flux": (tiny.flux, lambda model: da.LowMemory(feed_forward_chunks=3)),
}
EXACT = ("low_memory", "low_memory-flux")
"""Rows whose pictures are the plain model's."""
UNETS = [name for name, (make, _) in ROWS.items() if make is SHORT]


def pipeline_for(name):
    return ROWS[name][0]()


@cache
def method_for(name, make=None):
    return fresh_method(name, make)


def fresh_method(name, make=None):
    make = make or ROWS[name][0]
    return ROWS[name][1](tiny.denoiser(make()))


every_row = pytest.mark.parametrize("name", ROWS)
every_unet_row = pytest.mark.parametrize("name", UNETS)


def test_every_method_has_a_row():
    assert {method_for(name).name for name in ROWS} == METHODS.keys()


def close(a, b):
    """Equal up to the rounding of another order of summation, after a few steps on values of about ten."""
    torch.testing.assert_close(a, b, atol=5e-4, rtol=1e-3)


def check_effect(name, on, plain):
    """A method makes other pictures, unless it is one that must not."""
    assert on.isfinite().all()
    if name in EXACT:
        close(on, plain)
    else:
        assert not torch.allclose(on, plain, atol=1e-3)


@cache
def reference(name):
    pipe = pipeline_for(name)
    da.enable(pipe, method_for(name))
    return tiny.run(pipe)


@cache
def plain_of(run, build, *args):
    """The picture of the pipeline that ``build(*args)`` makes: without methods, and so the same for all of them."""
    return run(build(*args))


def changed(make, change):
    pipe = make()
    change(pipe)
    return pipe


def before_and_after(name, change, run=tiny.run):
    """The change made before enabling and after it gives the same pictures; so does taking the method off again."""
    method = method_for(name)
    plain = plain_of(run, changed, ROWS[name][0], change)
    outputs = []
    for order in ("before", "after"):
        pipe = pipeline_for(name)
        if order == "before":
            change(pipe)
        report = da.enable(pipe, method)
        assert report.layers[method.name]
        if order == "after":
            change(pipe)
        outputs.append(run(pipe))
        assert da.enabled(pipe) == [method]
    da.disable(pipe)
    close(run(pipe), plain)
    close(outputs[0], outputs[1])
    check_effect(name, outputs[0], plain)
    return outputs[0]


# ---- processors


def fuse_projections(pipe):
    tiny.denoiser(pipe).fuse_qkv_projections()


def slice_attention(pipe):
    pipe.enable_attention_slicing()


def set_processors(pipe):
    cls = da.processors.UNetAttnProcessor if hasattr(pipe, "unet") else da.processors.JointAttnProcessor
    tiny.denoiser(pipe).set_attn_processor(cls())


def set_backend(pipe):
    set_processors(pipe)
    for processor in tiny.denoiser(pipe).attn_processors.values():
        processor._attention_backend = "_native_math"


WAYS = (fuse_projections, slice_attention, set_processors, set_backend)
"""Of diffusers' own, fused projections fail on SD3.5's layers of the image alone."""


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, way) for name in ROWS for way in WAYS if not ("sd3" in name and way is fuse_projections)],
)
def test_with_other_ways_to_compute_attention(name, change):
    close(before_and_after(name, change), reference(name))


def enable_freeu(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@every_unet_row
def test_with_freeu(name):
    before_and_after(name, enable_freeu)


# ---- LoRA, IP-Adapter


def part_of(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


def add_lora(pipe, *targets):
    torch.manual_seed(0)
    tiny.denoiser(pipe).add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)
    )


def lora_on_attention(pipe):
    add_lora(pipe, "to_q", "to_v")


def lora_on_others(pipe):
    add_lora(pipe, "conv", "conv1", "proj_out", "to_out.0")


@every_row
@pytest.mark.parametrize("change", [lora_on_attention, lora_on_others])
def test_with_lora(name, change):
    with_lora = before_and_after(name, change)
    assert not torch.allclose(with_lora, reference(name), atol=1e-3)


@every_row
def test_with_lora_weights_loaded_and_unloaded(name, tmp_path):
    source = pipeline_for(name)
    add_lora(source, "to_k", "conv" if hasattr(source, "unet") else "proj_out")
    layers = {f"{part_of(source)}_lora_layers": get_peft_model_state_dict(tiny.denoiser(source))}
    source.save_lora_weights(tmp_path, **layers)
    before_and_after(name, lambda pipe: pipe.load_lora_weights(tmp_path))
    pipe = pipeline_for(name)
    da.enable(pipe, method_for(name))
    pipe.load_lora_weights(tmp_path)
    tiny.run(pipe, steps=1)
    pipe.unload_lora_weights()
    close(tiny.run(pipe), reference(name))


def ip_adapter(unet, width=6):
    projections, inner = {}, unet.config.cross_attention_dim
    for index, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            rows = unet.get_submodule(name.rsplit(".", 1)[0]).to_q.weight.shape[0]
            for kind in "kv":
                projections[f"{index}.to_{kind}_ip.weight"] = noise(rows, inner, seed=index) * 0.3
    image = {"proj.weight": noise(4 * inner, width), "proj.bias": noise(4 * inner)}
    image |= {"norm.weight": torch.ones(inner), "norm.bias": torch.zeros(inner)}
    return {"image_proj": image, "ip_adapter": projections}


def load_ip_adapter(pipe):
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])


def run_with_embeds(pipe):
    return tiny.run(pipe, ip_adapter_image_embeds=[torch.cat([torch.zeros(1, 1, 6), noise(1, 1, 6)])])


@every_unet_row
def test_with_an_ip_adapter(name):
    with_adapter = before_and_after(name, load_ip_adapter, run_with_embeds)
    assert not torch.allclose(with_adapter, reference(name), atol=1e-3)
    pipe = pipeline_for(name)
    da.enable(pipe, method_for(name))
    load_ip_adapter(pipe)
    pipe.unload_ip_adapter()
    close(tiny.run(pipe), reference(name))


# ---- offloading


def offload_sequentially(pipe):
    accelerate.cpu_offload(tiny.denoiser(pipe), execution_device=torch.device("cpu"), offload_buffers=True)


def offload_as_a_whole(pipe):
    accelerate.cpu_offload_with_hook(tiny.denoiser(pipe), execution_device=torch.device("cpu"))


def offload_in_groups(pipe):
    apply_group_offloading(
        tiny.denoiser(pipe),
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


OFFLOADS = pytest.mark.parametrize("offload", [offload_sequentially, offload_as_a_whole, offload_in_groups])


@every_row
@OFFLOADS
def test_with_offloading(name, offload):
    close(before_and_after(name, offload), reference(name))


@cache
def lora_and(offload):
    def change(pipe):
        add_lora(pipe, "to_q", "to_out.0")
        offload(pipe)

    return change


@every_row
@OFFLOADS
def test_with_lora_and_offloading(name, offload):
    before_and_after(name, lora_and(offload))


@every_row
def test_offloading_taken_off_again_leaves_the_method(name):
    pipe = pipeline_for(name)
    offload_sequentially(pipe)
    da.enable(pipe, method_for(name))
    accelerate.hooks.remove_hook_from_module(tiny.denoiser(pipe), recurse=True)
    close(tiny.run(pipe), reference(name))


# ---- precision, sizes, guidance


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["before", "after"])
def test_in_half_precision(name, dtype, order):
    pipe = pipeline_for(name)
    if order == "before":
        pipe = pipe.to(dtype)
    da.enable(pipe, fresh_method(name))
    latents = tiny.run(pipe.to(dtype), (144, 112 if "pooled" in name else 104))  # cells have to be whole
    assert latents.dtype == dtype and latents.isfinite().all()


@pytest.mark.parametrize(
    ("name", "make"),
    [*((name, make) for name in UNETS for make in (tiny.sd, tiny.sdxl)), ("clear", tiny.flux), ("clear-sd3", tiny.sd3)],
)
@pytest.mark.parametrize("size", [(192, 128), (104, 184)])
def test_oblong_sizes(name, make, size):
    pipe = make()
    da.enable(pipe, method_for(name, make))
    pictures = tiny.run(pipe, size, steps=2, output_type="pt")
    assert pictures.shape[-2:] == (size[1], size[0]) and pictures.isfinite().all()


@every_unet_row
def test_guidance_branch_by_branch_equals_the_batch(name):
    unet = tiny.unet().double()  # rounding decides nothing then, not even between tokens that are nearly alike
    da.enable(unet, fresh_method(name, tiny.sd), timesteps=torch.arange(901, 0, -100))
    x, text = noise(2, 4, 36, 52).double(), noise(2, 5, 12, seed=4).double()
    with torch.no_grad():
        for t in (901, 301):
            both = unet(x, t, text).sample
            each = torch.cat([unet(x[i : i + 1], t, text[i : i + 1]).sample for i in range(2)])
            close(each, both)


# ---- compiled, trained


def count_compilations(run):
    torch._dynamo.utils.counters.clear()
    result = run()
    return result, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


ORDERS = ("before", "after", "in place")
"""Of compiling and enabling; in all of them for one row of each kind of attachment, as tracing takes long."""
IN_ALL_ORDERS = ("hidiffusion", "clear")
COMPILED = [name for name in ROWS if name != "agent"]
"""What "agent" does is a part of what "agent-everywhere" does."""
SMALLEST = {**dict.fromkeys(UNETS, COMPACT), "hidiffusion": SHORT_XL}  # which needs all three levels


@pytest.mark.parametrize(
    ("name", "make", "order"),
    [
        (name, SMALLEST.get(name, ROWS[name][0]), order)
        for name in COMPILED
        for order in (ORDERS if name in IN_ALL_ORDERS else ("after",))
    ],
)
def test_compiled_as_a_whole(name, make, fresh_dynamo, order):
    pipe, method = make(), fresh_method(name, make)
    part, model = part_of(pipe), tiny.denoiser(pipe)
    eager = make()
    # In one order over a run long enough for all that a method does in turn; each is a trace of its own.
    run = partial(tiny.run, steps=5 if order == "after" else 2)
    plain = run(eager)
    with da.using(eager, fresh_method(name, make)):
        expected = run(eager)
    check_effect(name, expected, plain)
    if order == "before":
        setattr(pipe, part, torch.compile(model, backend="eager"))
        run(pipe)
    da.enable(pipe, method)
    if order == "after":
        setattr(pipe, part, torch.compile(model, backend="eager"))
    if order == "in place":
        model.compile(backend="eager")
    close(run(pipe), expected)
    again, more = count_compilations(lambda: run(pipe))
    close(again, expected)
    assert more == 0, "a second run of the same regimes compiled again"
    da.disable(pipe)
    close(run(pipe), plain)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_block_by_block(name, fresh_dynamo):
    pipe = pipeline_for(name)
    model = tiny.denoiser(pipe)
    model._repeated_blocks = model._repeated_blocks or ["JointTransformerBlock"]  # SD3 names none
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    tiny.run(pipe, steps=1)
    da.enable(pipe, method_for(name))
    close(tiny.run(pipe), reference(name))
    assert count_compilations(lambda: tiny.run(pipe))[1] == 0


@every_row
def test_trains_with_gradient_checkpointing(name):
    grads = []
    for checkpointing in (False, True):
        model = tiny.denoiser(pipeline_for(name)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        da.enable(model, method_for(name), timesteps=torch.arange(901, 0, -100))
        tiny.call(model).square().mean().backward()
        grads.append(next(model.parameters()).grad)
    close(*grads)


# ---- other pipelines


def with_controlnet(make):
    pipe = make()
    return tiny.quiet(diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=tiny.controlnet(pipe.unet)))


def as_pipeline(make, auto):
    return tiny.quiet(auto.from_pipe(make()))


def run_with_picture(pipe, **kwargs):
    return tiny.run(pipe, image=picture(), **kwargs)


def run_at_size(pipe, **kwargs):
    return run_with_picture(pipe, height=128, width=128, **kwargs)


def redraw(pipe):
    return run_with_picture(pipe, strength=0.8)


def redraw_inside(pipe):
    return run_at_size(pipe, strength=0.8, mask_image=picture(mode="L"))


@every_unet_row
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_with_a_controlnet(name, make):
    pipe = with_controlnet(make)
    plain = plain_of(run_with_picture, with_controlnet, make)
    da.enable(pipe, method_for(name, make))
    on = run_with_picture(pipe)
    check_effect(name, on, plain)
    assert not torch.allclose(on, run_with_picture(pipe, controlnet_conditioning_scale=0.0))
    da.disable(pipe)
    assert torch.equal(run_with_picture(pipe), plain)


@every_unet_row
@pytest.mark.parametrize("make", tiny.T2I_ADAPTERS)
def test_with_t2i_adapters(name, make):
    pipe = tiny.with_t2i_adapter(make)
    plain = plain_of(run_at_size, tiny.with_t2i_adapter, make)
    da.enable(pipe, method_for(name, make))
    check_effect(name, run_at_size(pipe), plain)
    da.disable(pipe)
    assert torch.equal(run_at_size(pipe), plain)


@every_unet_row
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize(
    ("auto", "run"),
    [(diffusers.AutoPipelineForImage2Image, redraw), (diffusers.AutoPipelineForInpainting, redraw_inside)],
)
def test_image_to_image_and_inpainting(name, make, auto, run):
    pipe = as_pipeline(make, auto)
    da.enable(pipe, method_for(name, make))
    check_effect(name, run(pipe), plain_of(run, as_pipeline, make, auto))


@every_row
def test_an_interrupted_run_leaves_nothing_behind(name):
    pipe = pipeline_for(name)
    da.enable(pipe, method_for(name))

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run(pipe, callback_on_step_end=stop)
    close(tiny.run(pipe), reference(name))


@every_row
def test_a_copy_of_an_enabled_model_works_on_its_own(name):
    model = tiny.denoiser(pipeline_for(name))
    with torch.no_grad():
        plain = tiny.call(model)
        da.enable(model, method_for(name), timesteps=torch.tensor([901, 1]))
        expected = tiny.call(model)
        twin = copy.deepcopy(model)
        da.disable(model)
        assert torch.equal(tiny.call(twin), expected) and torch.equal(tiny.call(model), plain)
        check_effect(name, expected, plain)
        da.disable(twin)
        assert torch.equal(tiny.call(twin), plain)


@every_row
def test_disable_leaves_no_trace(name):
    pipe = pipeline_for(name)
    plain = tiny.run(pipe)  # first: FLUX's pipeline leaves marks of its own
    before = tiny.trace_of(tiny.denoiser(pipe))
    da.enable(pipe, method_for(name))
    check_effect(name, tiny.run(pipe), plain)
    da.disable(pipe)
    assert tiny.trace_of(tiny.denoiser(pipe)) == before
    assert torch.equal(tiny.run(pipe), plain)
