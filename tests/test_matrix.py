"""Every method beside everything else that touches a pipeline, in either order of calls."""

import copy
from functools import cache

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
from tests.tiny import forward, noise, picture

MAKERS = {
    "hidiffusion": lambda make: da.HiDiffusion(),
    "linfusion": lambda make: seed_parameters(da.LinFusion.for_model(make().unet, mid_dim=4)),
}


@cache
def method_for(name, make):
    return MAKERS[name](make)


every_method = pytest.mark.parametrize("name", MAKERS)


def test_every_method_has_a_row():
    assert MAKERS.keys() == METHODS.keys()


def close(a, b):
    """Equal up to the rounding of another order of summation, after a few steps on values of about ten."""
    torch.testing.assert_close(a, b, atol=5e-4, rtol=1e-3)


@cache
def reference(name, make=tiny.sd):
    pipe = make()
    da.enable(pipe, method_for(name, make))
    return tiny.run(pipe)


def before_and_after(name, change, make=tiny.sd, **kwargs):
    """The change made before enabling and after it gives the same pictures; so does taking the method off again."""
    method = method_for(name, make)
    outputs = []
    for order in ("before", "after"):
        pipe = make()
        if order == "before":
            change(pipe)
        report = da.enable(pipe, method)
        assert report.layers[name]
        if order == "after":
            change(pipe)
        outputs.append(tiny.run(pipe, **kwargs))
        assert da.enabled(pipe) == [method]
    da.disable(pipe)
    plain = make()
    change(plain)
    close(tiny.run(pipe, **kwargs), tiny.run(plain, **kwargs))
    close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], tiny.run(plain, **kwargs), atol=1e-3)
    return outputs[0]


# ---- processors


def fuse_projections(pipe):
    pipe.fuse_qkv_projections()


def slice_attention(pipe):
    pipe.enable_attention_slicing()


def set_processors(pipe):
    pipe.unet.set_attn_processor(da.processors.UNetAttnProcessor())


def set_backend(pipe):
    set_processors(pipe)
    for processor in pipe.unet.attn_processors.values():
        processor._attention_backend = "_native_math"


@every_method
@pytest.mark.parametrize("change", [fuse_projections, slice_attention, set_processors, set_backend])
def test_with_other_ways_to_compute_attention(name, change):
    close(before_and_after(name, change), reference(name))


@every_method
def test_with_freeu(name):
    before_and_after(name, lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4))


# ---- LoRA, IP-Adapter


def add_lora(pipe, *targets):
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False))


@every_method
@pytest.mark.parametrize("targets", [("to_q", "to_v"), ("conv", "conv1", "to_out.0")], ids=["attention", "others"])
def test_with_lora(name, targets):
    with_lora = before_and_after(name, lambda pipe: add_lora(pipe, *targets))
    assert not torch.allclose(with_lora, reference(name), atol=1e-3)


@every_method
def test_with_lora_weights_loaded_and_unloaded(name, tmp_path):
    source = tiny.sd()
    add_lora(source, "to_k", "conv")
    source.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(source.unet))
    before_and_after(name, lambda pipe: pipe.load_lora_weights(tmp_path))
    pipe = tiny.sd()
    da.enable(pipe, method_for(name, tiny.sd))
    pipe.load_lora_weights(tmp_path)
    tiny.run(pipe, steps=1)
    pipe.unload_lora_weights()
    close(tiny.run(pipe), reference(name))


def ip_adapter(unet):
    projections = {}
    for index, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            width = unet.get_submodule(name.rsplit(".", 1)[0]).to_q.weight.shape[0]
            for kind in "kv":
                projections[f"{index}.to_{kind}_ip.weight"] = noise(width, 12, seed=index) * 0.3
    image = {"proj.weight": noise(4 * 12, 6), "proj.bias": noise(4 * 12)}
    image |= {"norm.weight": torch.ones(12), "norm.bias": torch.zeros(12)}
    return {"image_proj": image, "ip_adapter": projections}


@every_method
def test_with_an_ip_adapter(name):
    def change(pipe):
        pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])

    embeds = [torch.cat([torch.zeros(1, 1, 6), noise(1, 1, 6)])]
    with_adapter = before_and_after(name, change, ip_adapter_image_embeds=embeds)
    pipe = tiny.sd()
    da.enable(pipe, method_for(name, tiny.sd))
    assert not torch.allclose(with_adapter, tiny.run(pipe), atol=1e-3)
    change(pipe)
    pipe.unload_ip_adapter()
    close(tiny.run(pipe), reference(name))


# ---- offloading


def offload_sequentially(pipe):
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"), offload_buffers=True)


def offload_as_a_whole(pipe):
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device=torch.device("cpu"))


def offload_in_groups(pipe):
    apply_group_offloading(
        pipe.unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


OFFLOADS = pytest.mark.parametrize("offload", [offload_sequentially, offload_as_a_whole, offload_in_groups])


@every_method
@OFFLOADS
def test_with_offloading(name, offload):
    close(before_and_after(name, offload), reference(name))


@every_method
@OFFLOADS
def test_with_lora_and_offloading(name, offload):
    def change(pipe):
        add_lora(pipe, "to_q", "to_out.0")
        offload(pipe)

    before_and_after(name, change)


@every_method
def test_offloading_taken_off_again_leaves_the_method(name):
    pipe = tiny.sd()
    offload_sequentially(pipe)
    da.enable(pipe, method_for(name, tiny.sd))
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    close(tiny.run(pipe), reference(name))


# ---- precision, sizes, guidance


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["before", "after"])
def test_in_half_precision(name, dtype, order):
    pipe = tiny.sd()
    if order == "before":
        pipe = pipe.to(dtype)
    da.enable(pipe, MAKERS[name](tiny.sd))
    latents = tiny.run(pipe.to(dtype), (144, 104))
    assert latents.dtype == dtype and latents.isfinite().all()


@every_method
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("size", [(192, 128), (104, 184)])
def test_oblong_sizes(name, make, size):
    pipe = make()
    da.enable(pipe, method_for(name, make))
    latents = tiny.run(pipe, size)
    assert latents.shape[-2:] == (size[1] // 4, size[0] // 4) and latents.isfinite().all()


@every_method
def test_guidance_branch_by_branch_equals_the_batch(name):
    unet = tiny.unet()
    da.enable(unet, method_for(name, tiny.sd), timesteps=torch.arange(901, 0, -100))
    x, text = noise(2, 4, 36, 52), noise(2, 5, 12, seed=4)
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


@every_method
@pytest.mark.parametrize("order", ["before", "after", "in place"])
def test_compiled_as_a_whole(name, fresh_dynamo, order):
    pipe = tiny.sd()
    if order == "before":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        tiny.run(pipe)
    da.enable(pipe, method_for(name, tiny.sd))
    if order == "after":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    if order == "in place":
        pipe.unet.compile(backend="eager")
    latents, _ = count_compilations(lambda: tiny.run(pipe))
    close(latents, reference(name))
    again, more = count_compilations(lambda: tiny.run(pipe))
    close(again, reference(name))
    assert more == 0, "a second run of the same regimes compiled again"
    da.disable(pipe)
    plain = tiny.run(tiny.sd())
    assert not torch.allclose(plain, reference(name))
    close(tiny.run(pipe), plain)


@every_method
def test_compiled_block_by_block(name, fresh_dynamo):
    pipe = tiny.sd()
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    tiny.run(pipe)
    da.enable(pipe, method_for(name, tiny.sd))
    latents, _ = count_compilations(lambda: tiny.run(pipe))
    close(latents, reference(name))
    assert count_compilations(lambda: tiny.run(pipe))[1] == 0


@every_method
def test_trains_with_gradient_checkpointing(name):
    grads = []
    for checkpointing in (False, True):
        unet = tiny.unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        da.enable(unet, method_for(name, tiny.sd), timesteps=torch.arange(901, 0, -100))
        unet(noise(1, 4, 36, 44), 901, noise(1, 5, 12)).sample.square().mean().backward()
        grads.append(unet.conv_in.weight.grad)
    close(*grads)


# ---- other pipelines


@every_method
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_with_a_controlnet(name, make):
    pipe = make()
    pipe = tiny.quiet(diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=tiny.controlnet(pipe.unet)))
    plain = tiny.run(pipe, image=picture())
    da.enable(pipe, method_for(name, make))
    on = tiny.run(pipe, image=picture())
    assert on.isfinite().all() and not torch.allclose(on, plain)
    assert not torch.allclose(on, tiny.run(pipe, image=picture(), controlnet_conditioning_scale=0.0))
    da.disable(pipe)
    assert torch.equal(tiny.run(pipe, image=picture()), plain)


@every_method
@pytest.mark.parametrize("make", tiny.T2I_ADAPTERS)
def test_with_t2i_adapters(name, make):
    pipe = tiny.with_t2i_adapter(make)
    kwargs = {"image": picture(), "height": 128, "width": 128}
    plain = tiny.run(pipe, **kwargs)
    da.enable(pipe, method_for(name, make))
    on = tiny.run(pipe, **kwargs)
    assert on.isfinite().all() and not torch.allclose(on, plain)
    da.disable(pipe)
    assert torch.equal(tiny.run(pipe, **kwargs), plain)


@every_method
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("auto", [diffusers.AutoPipelineForImage2Image, diffusers.AutoPipelineForInpainting])
def test_image_to_image_and_inpainting(name, make, auto):
    kwargs = {"image": picture(), "strength": 0.8}
    if auto is diffusers.AutoPipelineForInpainting:
        kwargs |= {"mask_image": picture(mode="L"), "height": 128, "width": 128}
    pipe = tiny.quiet(auto.from_pipe(make()))
    plain = tiny.run(pipe, **kwargs)
    da.enable(pipe, method_for(name, make))
    on = tiny.run(pipe, **kwargs)
    assert on.isfinite().all() and not torch.allclose(on, plain)


@every_method
def test_an_interrupted_run_leaves_nothing_behind(name):
    pipe = tiny.sd()
    da.enable(pipe, method_for(name, tiny.sd))

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run(pipe, callback_on_step_end=stop)
    close(tiny.run(pipe), reference(name))


@every_method
def test_a_copy_of_an_enabled_model_works_on_its_own(name):
    unet, x = tiny.unet(), noise(1, 4, 32, 32)
    plain = forward(unet, x)
    da.enable(unet, method_for(name, tiny.sd), timesteps=torch.tensor([801, 1]))
    expected = forward(unet, x)
    twin = copy.deepcopy(unet)
    da.disable(unet)
    assert torch.equal(forward(twin, x), expected) and torch.equal(forward(unet, x), plain)
    da.disable(twin)
    assert torch.equal(forward(twin, x), plain)


@every_method
def test_disable_leaves_no_trace(name):
    pipe = tiny.sd()
    before, plain = tiny.trace_of(pipe.unet), tiny.run(pipe)
    da.enable(pipe, method_for(name, tiny.sd))
    assert not torch.equal(tiny.run(pipe), plain)
    da.disable(pipe)
    assert tiny.trace_of(pipe.unet) == before
    assert torch.equal(tiny.run(pipe), plain)
