"""The UNet processor against the stock one on every option that `Attention` has."""

from functools import partial

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0

import diffusion_attn as da
from tests import tiny
from tests.golden.seeded import seed_parameters, seeded_tensor

OPTIONS = {
    "plain": {},
    "bias and out bias": {"bias": True, "out_bias": False},
    "group norm": {"norm_num_groups": 4},
    "residual": {"residual_connection": True, "rescale_output_factor": 2.0},
    "query and key norm": {"qk_norm": "layer_norm"},
    "cross": {"cross_attention_dim": 12},
    "cross norm": {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
    "spatial norm": {"spatial_norm_dim": 4, "norm_num_groups": 4},
}


def both(attn, stock, **kwargs):
    x = kwargs.pop("x", seeded_tensor("x", (2, 30, 32)))
    outputs = []
    for processor in (stock, da.processors.UNetAttnProcessor()):
        attn.set_processor(processor)
        with torch.no_grad():
            outputs.append(attn(x, **kwargs))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_exact_attention_equals_stock(name, masked):
    options = OPTIONS[name]
    attn = seed_parameters(Attention(32, heads=2, dim_head=16, **options).eval())
    kwargs = {}
    if "cross_attention_dim" in options:
        kwargs["encoder_hidden_states"] = seeded_tensor("text", (2, 7, 12))
    if "spatial_norm_dim" in options:
        kwargs |= {"x": seeded_tensor("image", (2, 32, 5, 6)), "temb": seeded_tensor("z", (2, 4, 5, 6))}
    if masked:
        tokens = 7 if "cross_attention_dim" in options else 30
        kwargs["attention_mask"] = torch.where(seeded_tensor("mask", (2, 1, tokens)) > 0, 0.0, -10000.0)
    both(attn, AttnProcessor2_0(), **kwargs)


@pytest.mark.parametrize("cross", [None, 12])
def test_fused_projections_equal_stock(cross):
    attn = seed_parameters(Attention(32, heads=2, dim_head=16, cross_attention_dim=cross).eval())
    attn.fuse_projections()
    both(attn, FusedAttnProcessor2_0(), encoder_hidden_states=seeded_tensor("text", (2, 7, 12)) if cross else None)


def test_a_whole_unet_and_its_autoencoder_equal_stock():
    pipe = tiny.sd()
    plain = tiny.run(pipe, output_type="pt")
    pipe.unet.set_attn_processor(da.processors.UNetAttnProcessor())
    pipe.vae.set_attn_processor(da.processors.UNetAttnProcessor())
    torch.testing.assert_close(tiny.run(pipe, output_type="pt"), plain, atol=1e-3, rtol=1e-3)


def test_the_backend_really_reaches_the_unet():
    unet = tiny.unet()
    unet.set_attn_processor(da.processors.UNetAttnProcessor())
    unet.set_attention_backend("_native_math")
    try:
        assert all(p._attention_backend == "_native_math" for p in unet.attn_processors.values())
    finally:
        unet.reset_attention_backend()
        diffusers.models.attention_dispatch._AttentionBackendRegistry.set_active_backend("native")
    x, text = seeded_tensor("x", (1, 4, 16, 16)), seeded_tensor("text", (1, 5, 12))
    with torch.no_grad():
        plain = unet(x, 5, text).sample
        with attention_backend("_native_math"):
            torch.testing.assert_close(unet(x, 5, text).sample, plain)


def test_an_op_serves_self_attention_alone():
    attn = seed_parameters(Attention(16, heads=2, dim_head=8).eval())
    op = partial(da.ops.window_attention, grid=(5, 6), windows=(1, 2), shift=(0, 1))
    x = seeded_tensor("x", (2, 30, 16))
    with torch.no_grad():
        plain = attn(x)
        attn.set_processor(da.processors.UNetAttnProcessor(op))
        windowed = attn(x)
        assert not torch.allclose(windowed, plain)
        q, k, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        expected = attn.to_out[0](op(q, k, v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(windowed, expected)
        with pytest.raises(da.UnsupportedModelError, match="mask"):
            attn(x, attention_mask=torch.zeros(2, 1, 30))

    cross = seed_parameters(Attention(16, heads=2, dim_head=8, cross_attention_dim=12).eval())
    text = seeded_tensor("text", (2, 7, 12))
    with torch.no_grad():
        plain = cross(x, encoder_hidden_states=text)
        cross.set_processor(da.processors.UNetAttnProcessor(op))
        torch.testing.assert_close(cross(x, encoder_hidden_states=text), plain)
