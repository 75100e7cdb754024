"""Token merging and agent attention against numbers of the official code (see ``golden/agent/manifest.json``)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import nn

import diffusion_attn as da
from diffusion_attn.core.context import StepContext
from diffusion_attn.core.method import Attachment
from diffusion_attn.methods.agent.merging import Hooks
from diffusion_attn.methods.agent.setting import Setting
from diffusion_attn.ops.agent_attention import agent_attention, pool_agents, position_bias
from diffusion_attn.ops.match_tokens import match_tokens
from tests.golden.seeded import seed_parameters, seeded_tensor

FOLDER = Path(__file__).parent / "golden" / "agent"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
EXPECTED = load_file(FOLDER / "cases.safetensors")


def named(kind):
    return pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["kind"] == kind])


def drawn(case, key):
    name, shape, *rest = case["inputs"][key]
    return seeded_tensor(name, tuple(shape)) * (float(rest[0].split()[1]) if rest else 1.0)


def expected(name, key):
    return EXPECTED[next(k for k in EXPECTED if k.startswith(name) and k.removeprefix(name).strip("./") == key)]


def close(actual, name, key="out", atol=2e-5):
    torch.testing.assert_close(actual, expected(name, key), atol=atol, rtol=1e-5)


# ---- matching


def match_of(case, metric, **choice):
    params = case["params"]
    return match_tokens(
        metric,
        grid=(params["h"], params["w"]),
        stride=(params["sy"], params["sx"]),
        merge=params["requested_r"],
        agents=params["requested_agent_r"],
        **choice,
    )


@named("matching")
@pytest.mark.parametrize("source", ["choice", "generator"])
def test_matching(name, source):
    case = CASES[name]
    counts = case["counts"]
    metric, x = drawn(case, "metric"), drawn(case, "x")
    choice = {"cell_choice": expected(name, "cell_choice")}
    if source == "generator":
        seed = case["generator_seed"]
        choice = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
    match = match_of(case, metric, **choice)
    close(match.merge(x), name, "merged")
    close(match.unmerge(match.merge(x)), name, "unmerged")
    assert match.merged_tokens == counts["merged_tokens"]
    if case["agents_active"]:
        close(match.agents(x), name, "agents")
        assert match.agent_tokens == counts["agent_tokens"]
    for kind, groups in (("", match.merged), ("agent_", match.agent)):
        if kind and not case["agents_active"]:
            continue
        into, positions = expected(name, f"{kind}merged_into"), expected(name, f"{kind}merged_positions")
        assert torch.equal(groups.gather(1, positions), groups.gather(1, into))
        alone = torch.ones_like(groups).scatter(1, positions, 0).bool()
        stays = "agent_positions" if kind else "surviving_positions"
        assert torch.equal(alone.nonzero()[:, 1].unflatten(0, (len(groups), -1)), expected(name, stays))


@named("matching")
def test_whether_agents_are_worth_it(name):
    case = CASES[name]
    params, counts = case["params"], case["counts"]
    setting = Setting(params["ratio"], (params["sy"], params["sx"]), params["agent_ratio"])
    ours = setting.counts((params["h"], params["w"]))
    assert (ours.tokens, ours.merge) == (counts["tokens"], counts["r"])
    assert ours.fewer == (counts["agent_r"] if case["agents_active"] else None)


# ---- one layer


@named("attention")
def test_attention(name):
    case = CASES[name]
    module, params = case["module"], case["params"]
    attn = seed_parameters(Attention(module["query_dim"], heads=module["heads"], dim_head=module["dim_head"]))
    x = drawn(case, "x")

    def heads(linear, tokens):
        return linear(tokens).unflatten(-1, (module["heads"], -1)).transpose(1, 2)

    q, k, v = heads(attn.to_q, x), heads(attn.to_k, x), heads(attn.to_v, x)
    if case["agents_active"]:
        agents = heads(attn.to_q, drawn(case, "agent"))
        out = agent_attention(
            q,
            k,
            v,
            agents,
            second_scale=module["dim_head"] ** (-0.5 * params["k_scale2"]),
            shortcut=params["k_shortcut"],
        )
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    close(attn.to_out[0](out.transpose(1, 2).flatten(2)), name)


# ---- one block, a whole UNet


@named("block")
def test_block(name):
    case = CASES[name]
    module, params = case["module"], case["params"]
    block = BasicTransformerBlock(
        module["dim"], module["heads"], module["dim_head"], cross_attention_dim=module["cross_attention_dim"]
    )
    block = seed_parameters(block.eval())
    grid, stride = tuple(case["latent_size"]), (params["sy"], params["sx"])
    ratios = (params["ratio"], params.get("agent_ratio", 0.0))
    if case["library"] == "tomesd":
        options = da.TokenMerging(ratios[0], stride, cell_choice=lambda *_: expected(name, "cell_choice"))
    else:
        options = da.AgentAttention(*ratios, stride, switch=1.0, rng="reference", seed=case["generator_seed"] or 0)
    attachment = Attachment(lambda: StepContext(*grid, 0, 50))
    transformer = nn.Module()
    transformer.transformer_blocks = nn.ModuleList([block])
    Hooks(options, nn.Module(), 1).install_on(attachment, transformer, {"block": block})
    hidden = drawn(case, "hidden")
    (hook,) = transformer._forward_pre_hooks.values()  # its forward is the UNet's business
    _, given = hook(transformer, (), {"hidden_states": hidden.transpose(1, 2).unflatten(2, grid)})
    extra = given["cross_attention_kwargs"]
    with torch.no_grad():
        close(block(hidden, encoder_hidden_states=drawn(case, "context"), cross_attention_kwargs=extra), name)
        attachment.undo()
        assert not torch.allclose(block(hidden, encoder_hidden_states=drawn(case, "context")), expected(name, "out"))


@named("unet")
@pytest.mark.parametrize("source", ["choice", "reference"])
def test_unet(name, source):
    case = CASES[name]
    params = case["params"]
    unet = seed_parameters(UNet2DConditionModel(**case["unet_config"]).eval())
    inputs = drawn(case, "latent"), case["timestep"], drawn(case, "context")
    draws = [expected(name, f"cell_choice_{k}") for k in range(len(case["matchings"]))]
    options = {"rng": "reference", "seed": case["generator_seed"]}
    if source == "choice":
        order = iter(draws)
        options = {"cell_choice": lambda step, block, cells: next(order)}
    method = da.AgentAttention(params["ratio"], params["agent_ratio"], (params["sy"], params["sx"]), **options)
    with torch.no_grad():
        close(unet(*inputs).sample, name, "unpatched", 2e-4)
        da.enable(unet, method, timesteps=torch.tensor([case["timestep"], 1]))
        close(unet(*inputs).sample, name, atol=2e-4)
        da.disable(unet)
        close(unet(*inputs).sample, name, "unpatched", 2e-4)


# ---- trained vision transformers


def trained_layer(case):
    """The parameters of a published layer under their names."""
    holder = nn.Module()
    for key, shape in case["parameters"].items():
        *path, leaf = key.split(".")
        part = holder
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, nn.Module())
            part = getattr(part, step)
        part.register_parameter(leaf, nn.Parameter(torch.empty(shape)))
    return {key: value.detach() for key, value in seed_parameters(holder).state_dict().items()}


@named("pooled_agent_attention")
def test_pooled_agents(name):
    case = CASES[name]
    w, grid, heads = trained_layer(case), tuple(case["grid"]), case["params"]["heads"]
    side = round(case["params"]["agent_num"] ** 0.5)
    x = drawn(case, "x")
    lead = int(case["leading_class_token"])

    def split(tokens):
        return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)

    key_grid = grid
    if "qkv.weight" in w:
        q, k, v = map(split, F.linear(x, w["qkv.weight"], w["qkv.bias"]).chunk(3, -1))
    else:
        image = x.transpose(1, 2).unflatten(2, grid)
        reduced = F.conv2d(image, w["sr.weight"], w["sr.bias"], stride=case["params"]["sr_ratio"])
        key_grid = tuple(reduced.shape[-2:])
        reduced = F.layer_norm(reduced.flatten(2).transpose(1, 2), (x.shape[-1],), w["norm.weight"], w["norm.bias"])
        q = split(F.linear(x, w["q.weight"], w["q.bias"]))
        k, v = map(split, F.linear(reduced, w["kv.weight"], w["kv.bias"]).chunk(2, -1))
    agents = pool_agents(q[:, :, lead:], grid=grid, size=(side, side))
    bias = position_bias(w["an_bias"], w["ah_bias"][0], w["aw_bias"][0])
    second = position_bias(w["na_bias"], w["ha_bias"][0].movedim(-1, 1), w["wa_bias"][0].movedim(-1, 1)).transpose(1, 2)
    if lead:
        bias = torch.cat([w["ac_bias"][0], bias], -1)
        second = torch.cat([w["ca_bias"][0], second], -2)
    out = agent_attention(q, k, v, agents, bias=bias, second_bias=second).transpose(1, 2).flatten(2)
    values = v[:, :, lead:].transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, key_grid)
    if key_grid != grid:
        values = F.interpolate(values, size=grid, mode="bilinear")
    local = F.conv2d(values, w["dwc.weight"], w["dwc.bias"], padding=1, groups=values.shape[1])
    out[:, lead:] += local.flatten(2).transpose(1, 2)
    close(F.linear(out, w["proj.weight"], w["proj.bias"]), name)
