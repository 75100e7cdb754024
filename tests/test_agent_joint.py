"""The experimental form of agent attention in FLUX and SD3."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline

import diffusion_attn as da
from diffusion_attn.methods.agent.pooled import AgentTokens, PooledAgentProcessor
from tests import tiny
from tests.tiny import call_flux, image_ids, noise

FIRST = torch.tensor([900.0, 100.0])


def reference(q, k, v, grid, size, text):
    """Query by query in float64."""
    q, k, v = q.double(), k.double(), v.double()
    image = q[:, :, text:].unflatten(2, grid)
    rows, columns = (torch.arange(s) for s in size)
    agents = torch.stack(
        [
            image[
                :,
                :,
                r * grid[0] // size[0] : -(-(r + 1) * grid[0] // size[0]),
                c * grid[1] // size[1] : -(-(c + 1) * grid[1] // size[1]),
            ].mean((2, 3))
            for r in rows.tolist()
            for c in columns.tolist()
        ],
        2,
    )
    read = torch.softmax(agents @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    keys, values = torch.cat([k[:, :, :text], agents], 2), torch.cat([v[:, :, :text], read], 2)
    seen = torch.softmax(q[:, :, text:] @ keys.mT / q.shape[-1] ** 0.5, -1) @ values
    exact = torch.softmax(q[:, :, :text] @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    return torch.cat([exact, seen], 2).float()


@pytest.mark.parametrize(("grid", "size", "text"), [((6, 8), (2, 2), 5), ((5, 7), (2, 3), 0), ((4, 4), (1, 1), 3)])
def test_the_op_equals_its_definition(grid, size, text):
    tokens = text + grid[0] * grid[1]
    q, k, v = (noise(2, 3, tokens, 8, seed=i) for i in range(3))
    agents = da.ops.pool_agents(q[:, :, text:], grid=grid, size=size)
    out = da.ops.joint_agent_attention(q, k, v, agents, text_tokens=text)
    torch.testing.assert_close(out, reference(q, k, v, grid, size, text), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, :, :text], F.scaled_dot_product_attention(q[:, :, :text], k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny.flux, tiny.sd3])
def test_agents_work_in_the_early_phase_only(make, dtype):
    pipe, seen = make().to(dtype), []
    da.enable(pipe, da.AgentAttention(experimental=True))
    first = next(
        m for m in tiny.denoiser(pipe).modules() if isinstance(getattr(m, "processor", None), PooledAgentProcessor)
    )

    def record(module, args, kwargs):
        seen.append("agent_tokens" in kwargs)

    handle = first.register_forward_pre_hook(record, with_kwargs=True)
    tiny.run(pipe, steps=30)  # in bfloat16 many of FLUX's timesteps are the same number
    handle.remove()
    assert seen == [True] * 12 + [False] * 18


def test_late_steps_are_the_plain_model():
    model = tiny.transformer()
    plain = call_flux(model, (16, 16))
    da.enable(model, da.AgentAttention(experimental=True, switch=0.0), timesteps=FIRST)
    torch.testing.assert_close(call_flux(model, (16, 16)), plain)
    da.enable(model, da.AgentAttention(experimental=True))
    assert not torch.allclose(call_flux(model, (16, 16)), plain, atol=1e-3)


def test_where_agents_would_not_be_fewer_attention_is_exact():
    model = tiny.transformer()
    plain = call_flux(model, (8, 8))
    da.enable(model, da.AgentAttention(experimental=True, stride=(1, 2)), timesteps=FIRST)
    torch.testing.assert_close(call_flux(model, (8, 8)), plain)


def test_the_order_of_tokens_does_not_matter():
    model = tiny.transformer()
    da.enable(model, da.AgentAttention(experimental=True), timesteps=FIRST)
    hidden, grid = noise(1, 108, 16), (9, 12)
    order = torch.randperm(108, generator=torch.Generator().manual_seed(0))
    shuffled = call_flux(model, grid, hidden[:, order], image_ids(grid)[order])
    torch.testing.assert_close(shuffled, call_flux(model, grid, hidden)[:, order], atol=1e-5, rtol=1e-5)


def test_agents_of_constant_cells_stand_at_their_centres():
    """Where all queries of a cell are alike, its agent is that query, turned to the middle of the cell."""
    model = tiny.transformer()
    processor = PooledAgentProcessor()
    query = noise(1, 4, 2, 16).repeat_interleave(4, dim=1)[:, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]]
    centres = torch.tensor([[0.0, r, c] for r in (0.5, 2.5) for c in (0.5, 2.5)])
    tokens = AgentTokens((4, 4), (2, 2), None, model.pos_embed(centres))
    turned, _ = processor.rotate(query, query, model.pos_embed(image_ids((4, 4)).float()), agent_tokens=tokens)
    from diffusion_attn.processors.joint import rotated

    torch.testing.assert_close(turned[:, 16:], rotated(query[:, [0, 2, 8, 10]], tokens.rotary))


def test_reference_pictures_and_masks_are_refused():
    pipe = tiny.flux()
    kontext = tiny.quiet(FluxKontextPipeline(**pipe.components))
    da.enable(kontext, da.AgentAttention(experimental=True))
    with pytest.raises(da.UnsupportedModelError, match="Kontext"):
        tiny.run(kontext, image=tiny.picture(64), size=64, steps=1, max_area=64 * 64, _auto_resize=False)
    model = tiny.transformer(tiny.SD3)
    da.enable(model, da.AgentAttention(experimental=True), timesteps=FIRST)
    attn = model.transformer_blocks[0].attn
    with pytest.raises(da.UnsupportedModelError, match="masks"):
        attn(
            noise(1, 64, 32),
            encoder_hidden_states=noise(1, 3, 32),
            attention_mask=torch.zeros(1, 1, 67, 67),
            agent_tokens=AgentTokens((8, 8), (2, 2)),
        )
