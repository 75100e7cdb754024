"""LowMemory: every switch leaves the picture what it is, and does what it says."""

import pytest
import torch
from diffusers.models.attention import FeedForward

import diffusion_attn as da
from diffusion_attn.methods.low_memory.skips import Parked
from diffusion_attn.methods.low_memory.split import SplitRows
from diffusion_attn.metrics.cost import measure
from tests import tiny
from tests.golden.seeded import seed_parameters
from tests.tiny import noise

OFF = {"one_row": False, "feed_forward_chunks": 1, "park_skips": None, "in_place": False}
SWITCHES = {
    "one_row": {"one_row": True},
    "feed_forward": {"feed_forward_chunks": 7},
    "disk": {"park_skips": "disk"},
    "in_place": {"in_place": True},
    "all": {"one_row": True, "feed_forward_chunks": 16, "park_skips": "disk", "in_place": True},
}


def call(unet, rows=3, size=(20, 28)):
    x, text = noise(rows, 4, *size).to(unet.dtype), noise(rows, 5, 12, seed=4).to(unet.dtype)
    times = torch.tensor([901.0, 501.0, 1.0])[:rows]
    with torch.no_grad():
        return unet(x, times, text).sample


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_is_exact(switch):
    unet = tiny.unet().double()
    plain = call(unet)
    trace = tiny.trace_of(unet)
    report = da.enable(unet, da.LowMemory(**{**OFF, **SWITCHES[switch]}))
    torch.testing.assert_close(call(unet), plain, atol=1e-10, rtol=1e-10)
    assert all(unet.get_submodule(name) is not None for name in report.layers["low_memory"])
    da.disable(unet)
    assert tiny.trace_of(unet) == trace and torch.equal(call(unet), plain)


def test_rows_and_chunks_arrive_one_by_one():
    unet = tiny.unet()
    da.enable(unet, da.LowMemory(feed_forward_chunks=4))
    seen = {"rows": [], "tokens": []}
    unet.conv_in.register_forward_pre_hook(lambda module, args: seen["rows"].append(len(args[0])))
    layer = next(x for x in unet.modules() if isinstance(x, FeedForward))
    layer.net[0].register_forward_pre_hook(lambda module, args: seen["tokens"].append(args[0].shape[1]))
    call(unet)
    assert seen["rows"] == [1, 1, 1]
    assert seen["tokens"] == [140] * 4 * 3


def test_skips_come_back_one_at_a_time():
    unet = tiny.unet()
    da.enable(unet, da.LowMemory(**{**OFF, "park_skips": "disk"}))
    parked = []
    for block in unet.up_blocks:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: parked.append(
                [isinstance(x, Parked) for x in kwargs["res_hidden_states_tuple"]]
            ),
            with_kwargs=True,
        )
    call(unet)
    # All but the last of each block, which are small and which the way down goes on with.
    assert sum(map(sum, parked)) == 8 and sum(map(len, parked)) == 12


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parked_tensor_is_the_tensor(place, dtype):
    x = noise(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
    parked = Parked(x, place)
    assert parked.shape == x.shape and parked.dtype == dtype and "Parked" in repr(parked)
    assert torch.equal(torch.cat([parked, x], dim=1), torch.cat([x, x], dim=1))
    assert torch.equal(parked + 1, x + 1) and type(parked * 2) is torch.Tensor
    assert Parked(torch.empty(2, 3, device="meta"), place).fetch().device.type == "meta"


def test_nothing_is_parked_while_gradients_are_recorded():
    unet = tiny.unet()
    da.enable(unet, da.LowMemory(park_skips="disk"))
    tiny.call(unet).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_a_pass_that_breaks_off_leaves_nothing_to_the_next():
    unet = tiny.unet()
    plain, single = call(unet), call(unet, rows=1)
    da.enable(unet, da.LowMemory())
    handle = unet.mid_block.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(unet)
    handle.remove()
    torch.testing.assert_close(call(unet), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(call(unet, rows=1), single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("make", ["linfusion", "hidiffusion", "clear", "agent"])
def test_beside_another_method_in_either_order(make, order):
    pipe = tiny.flux() if make == "clear" else tiny.sd()
    methods = {
        "linfusion": lambda: seed_parameters(da.LinFusion.for_model(pipe.unet, mid_dim=4)),
        "hidiffusion": da.HiDiffusion,
        "agent": da.AgentAttention,
        "clear": lambda: da.Clear(radius=4),
    }
    both = [methods[make](), da.LowMemory()]
    with da.using(pipe, both[0]):
        alone = tiny.run(pipe, num_images_per_prompt=2)
    for index in order:
        da.enable(pipe, both[index])
    together = tiny.run(pipe, num_images_per_prompt=2)
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=2e-3)


def test_linfusion_in_pieces_is_linfusion(monkeypatch):
    unet = tiny.unet().double()
    method = seed_parameters(da.LinFusion.for_model(unet, mid_dim=4))
    da.enable(unet, method)
    whole = call(unet)
    monkeypatch.setattr("diffusion_attn.methods.linfusion.processor.LinFusionProcessor.whole", 33)
    torch.testing.assert_close(call(unet), whole, atol=1e-10, rtol=1e-10)


def test_rows_of_videos_have_several_texts_each():
    unet = tiny.motion()
    x, text = noise(2, 4, 3, 16, 16), noise(2, 5, 12, seed=4).repeat_interleave(3, dim=0)
    with torch.no_grad():
        plain = unet(x, 501, text).sample
        da.enable(unet, da.LowMemory())
        torch.testing.assert_close(unet(x, 501, text).sample, plain, atol=1e-4, rtol=1e-4)


def test_what_all_rows_share_stays_whole():
    masks, embeds = torch.ones(2, 1, 8, 8), [torch.ones(2, 1, 6)]
    call = {
        "sample": torch.ones(2, 4, 8, 8),
        "cross_attention_kwargs": {"ip_adapter_masks": masks, "scale": 0.5},
        "added_cond_kwargs": {"image_embeds": embeds},
    }
    [(_, first), _] = SplitRows().parts(tiny.unet(), (), call)
    assert first["cross_attention_kwargs"]["ip_adapter_masks"] is masks
    assert first["added_cond_kwargs"]["image_embeds"][0].shape == (1, 1, 6) and first["sample"].shape[0] == 1


def test_the_peak_falls():
    unet = tiny.unet(block_out_channels=(32, 32, 32, 32), attention_head_dim=8, layers_per_block=1)
    da.enable(unet, da.LinFusion.for_model(unet))  # else attention decides

    def peak():
        call(unet, rows=2, size=(112, 112))
        with measure() as cost:
            call(unet, rows=2, size=(112, 112))
        return cost.peak_bytes

    plain = min(peak() for _ in range(2))
    da.enable(unet, da.LowMemory(park_skips="disk"))
    assert min(peak() for _ in range(2)) < 0.5 * plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward_chunks": 0}, "feed_forward_chunks=0: expected 1 or more"),
        ({"park_skips": "cloud"}, "park_skips='cloud': expected one of cpu, disk"),
        (OFF, "all switches are off"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        da.LowMemory(**options)


def test_unknown_models_are_refused():
    with pytest.raises(da.UnsupportedModelError, match="neither a UNet nor a transformer"):
        da.enable(torch.nn.Linear(2, 2), da.LowMemory())
