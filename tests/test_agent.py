"""Token merging and agent attention on whole models: phases, draws, levels, and what the official code gets wrong."""

import dataclasses
import logging

import diffusers
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

import diffusion_attn as da
from diffusion_attn.core.session import argument_names
from diffusion_attn.methods.agent.block_match import PLAN, BlockMatch, MergePlan
from diffusion_attn.methods.agent.processor import MergedAttnProcessor
from diffusion_attn.methods.agent.setting import Setting
from tests import tiny
from tests.golden.seeded import seed_parameters
from tests.tiny import noise

SCHEDULE = torch.arange(901, 0, -100)
BOTH = pytest.mark.parametrize("method", [da.AgentAttention(), da.TokenMerging()])


class Recorder:
    """A choice of cells that remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, step, block, cells):
        self.asked.append((step, block, cells))
        return torch.zeros(cells, dtype=torch.long)


# ---- phases


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [("DDIM", {}), ("PNDM", {"skip_prk_steps": True}), ("EulerDiscrete", {"use_karras_sigmas": True}), ("Heun", {})],
)
def test_the_phase_is_a_share_of_the_runs_own_schedule(scheduler, config):
    pipe, recorder = tiny.sd(), Recorder()
    name = f"{scheduler}Scheduler" if scheduler != "Heun" else "HeunDiscreteScheduler"
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)
    da.enable(pipe, da.AgentAttention(cell_choice=recorder))
    tiny.run(pipe, steps=10)
    total = len(pipe.scheduler.timesteps)
    cells = {step: cells for step, _, cells in recorder.asked}
    assert sorted(cells) == list(range(total))
    assert all(cells[step] == ((8, 8) if step < 0.4 * total else (16, 16)) for step in cells)
    assert len({block for _, block, _ in recorder.asked}) == 5


def test_image_to_image_counts_the_steps_that_are_executed():
    pipe, recorder = tiny.quiet(diffusers.AutoPipelineForImage2Image.from_pipe(tiny.sd())), Recorder()
    da.enable(pipe, da.AgentAttention(cell_choice=recorder))
    tiny.run(pipe, steps=10, image=tiny.picture(), strength=0.5)
    cells = [cells for _, _, cells in recorder.asked[::5]]
    assert cells == [(8, 8)] * 2 + [(16, 16)] * 3


@pytest.mark.parametrize("rng", ["keyed", "reference"])
def test_the_late_phase_is_token_merging(rng):
    outputs = []
    for method in (da.AgentAttention(switch=0.0, rng=rng), da.TokenMerging(ratio=0.4, rng=rng)):
        unet = tiny.unet()
        da.enable(unet, method, timesteps=SCHEDULE)
        outputs.append([tiny.forward(unet, noise(2, 4, 32, 32), t) for t in (901, 301)])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


# ---- draws


def test_keyed_draws_leave_the_global_generator_alone_and_do_not_hear_it():
    results = []
    for seed in (1, 2):
        unet = tiny.unet()
        da.enable(unet, da.TokenMerging(), timesteps=SCHEDULE)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(tiny.forward(unet, noise(2, 4, 32, 32)))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*results)


def test_keyed_draws_differ_by_seed_step_and_block():
    def output(seed, t):
        unet = tiny.unet()
        da.enable(unet, da.TokenMerging(seed=seed), timesteps=SCHEDULE)
        return tiny.forward(unet, noise(2, 4, 32, 32), t)

    plain = tiny.unet()
    moved = [output(seed, t) - tiny.forward(plain, noise(2, 4, 32, 32), t) for seed, t in ((0, 901), (1, 901))]
    assert not torch.equal(*moved)
    choices = da.methods.agent.merging.Choices("keyed", 0, None)
    setting, context = Setting(0.5, (2, 2)), da.core.context.StepContext
    draws = [choices.draw(setting, context(8, 8, step), block, 2, (9, 9)) for step in (0, 1) for block in "ab"]
    joined = choices.draw(setting, context(8, 8, 0, skipped=1), "b", 2, (9, 9))  # a run that begins at the second step
    assert torch.equal(joined, draws[3])
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4
    assert {int(x) for draw in draws for x in draw.unique()} == {0, 1, 2, 3}


def test_reference_draws_start_again_with_each_run_and_phase_and_skip_odd_batches():
    choices = da.methods.agent.merging.Choices("reference", 5, None)
    early, late, context = Setting(0.4, (4, 4)), Setting(0.4, (2, 2)), da.core.context.StepContext

    def draw(setting, step, batch=2):
        return choices.draw(setting, context(8, 8, step), "block", batch, (3, 3))

    generator = torch.Generator().manual_seed(5)
    expected = [torch.randint(16, (3, 3), generator=generator) for _ in range(3)]
    assert torch.equal(draw(early, 0), expected[0]) and draw(early, 0, batch=3) is None
    assert torch.equal(draw(early, 0), expected[1]) and torch.equal(draw(early, 1), expected[2])
    assert torch.equal(draw(late, 2), torch.randint(4, (3, 3), generator=torch.Generator().manual_seed(5)))
    assert torch.equal(draw(early, 0), expected[0])


@BOTH
def test_equal_pictures_in_a_batch_stay_equal(method):
    unet = tiny.unet()
    da.enable(unet, method, timesteps=SCHEDULE)
    one, text = noise(1, 4, 32, 32), noise(1, 5, 12)
    with torch.no_grad():
        two = unet(one.repeat(2, 1, 1, 1), 901, text.repeat(2, 1, 1)).sample
        torch.testing.assert_close(two[0], two[1], atol=1e-6, rtol=1e-6)


# ---- levels and the report


def test_the_finest_level_that_has_attention_is_the_default():
    report = da.enable(tiny.unet(), da.TokenMerging())
    assert len(report.layers["token_merging"]) == 5
    assert all(name.startswith(("down_blocks.0", "up_blocks.3")) for name in report.layers["token_merging"])
    xl = tiny.unet(tiny.SDXL)
    report = da.enable(xl, da.TokenMerging())
    assert all(name.startswith(("down_blocks.1", "up_blocks.1")) for name in report.layers["token_merging"])
    assert str(report).splitlines() == [
        f"token_merging: {len(report.layers['token_merging'])} layers",
        "  8 x 8 (native size), every step: 64 tokens merged to 32, no agents",
    ]


def test_a_level_without_attention_is_an_error_not_silence():
    xl = tiny.unet(tiny.SDXL)
    with pytest.raises(da.UnsupportedModelError, match=r"max_downsample=1.*reduced by 2: give 2 or None"):
        da.enable(xl, da.TokenMerging(max_downsample=1))
    assert da.enabled(xl) == []


def test_blocks_that_attend_to_the_prompt_alone_are_left_alone():
    unet = tiny.unet(only_cross_attention=(True, False, False, False))
    report = da.enable(unet, da.TokenMerging())  # the finest level with self-attention is the next one
    assert all(name.startswith(("down_blocks.1", "up_blocks.2")) for name in report.layers["token_merging"])
    assert tiny.forward(unet, noise(2, 4, 32, 32)).isfinite().all()
    with pytest.raises(da.UnsupportedModelError, match="reduced by 2: give 2 or None"):
        da.enable(unet, da.TokenMerging(max_downsample=1))
    with pytest.raises(da.UnsupportedModelError, match="nothing to merge"):
        da.enable(tiny.unet(only_cross_attention=True, mid_block_type=None), da.TokenMerging())


def test_more_levels_up_to_the_middle():
    report = da.enable(tiny.unet(), da.TokenMerging(max_downsample=8))
    assert len(report.layers["token_merging"]) == 16
    assert "mid_block.attentions.0.transformer_blocks.0.attn1" in report.layers["token_merging"]


def test_the_report_says_whether_agents_are_on():
    pipe = tiny.sd(sample_size=64)
    assert da.enable(pipe, da.AgentAttention()).notes["agent"] == (
        "64 x 64 (native size), early: 4096 tokens merged to 2458, 256 agents",
        "64 x 64 (native size), late: 4096 tokens merged to 2458, no agents",
    )
    # The official defaults switch agents off on even grids without a word.
    off = da.AgentAttention(ratio=0.5, agent_ratio=0.8, stride=(2, 2))
    assert "2048, no agents" in da.enable(pipe, off).notes["agent"][0]


def test_each_size_is_told_once_in_the_log(caplog):
    pipe = tiny.sd()
    da.enable(pipe, da.AgentAttention())
    with caplog.at_level(logging.INFO, "diffusion_attn"):
        tiny.run(pipe)
        tiny.run(pipe)
    assert [record.getMessage() for record in caplog.records] == [
        "agent on 32 x 32: 1024 tokens merged to 615, 64 agents",
        "agent on 32 x 32: 1024 tokens merged to 615, no agents",
    ]


# ---- defects of the official code that are not ours


@BOTH
def test_keyword_calls(method):
    unet = tiny.unet()
    da.enable(unet, method, timesteps=SCHEDULE)
    x, text = noise(2, 4, 32, 32), noise(2, 5, 12)
    with torch.no_grad():
        by_name = unet(encoder_hidden_states=text, timestep=901, sample=x).sample
        assert torch.equal(by_name, unet(x, 901, text).sample)


@BOTH
def test_ratio_zero_is_the_stock_model_bit_for_bit(method):
    unet = tiny.unet()
    plain = tiny.forward(unet, noise(2, 4, 32, 32))
    da.enable(unet, dataclasses.replace(method, ratio=0.0), timesteps=SCHEDULE)
    assert torch.equal(tiny.forward(unet, noise(2, 4, 32, 32)), plain)


@BOTH
def test_a_grid_smaller_than_a_cell_is_the_stock_model(method):
    unet = tiny.unet()
    strides = {field.name: (40, 40) for field in dataclasses.fields(method) if "stride" in field.name}
    plain = tiny.forward(unet, noise(2, 4, 32, 32))
    da.enable(unet, dataclasses.replace(method, **strides), timesteps=SCHEDULE)
    assert torch.equal(tiny.forward(unet, noise(2, 4, 32, 32)), plain)


@BOTH
def test_enabling_again_does_not_pile_up(method):
    unet = tiny.unet()
    before = tiny.trace_of(unet)
    da.enable(unet, method, timesteps=SCHEDULE)
    counts = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules()]
    for _ in range(4):
        da.enable(unet, method)
    assert counts == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules()]
    da.disable(unet)
    assert tiny.trace_of(unet) == before


def test_merged_cross_attention_beside_agents_changes_the_picture():
    outputs = []
    for also in ({}, {"merge_cross_attention": True}, {"merge_feed_forward": True}):
        unet = tiny.unet()
        report = da.enable(unet, da.AgentAttention(**also), timesteps=SCHEDULE)
        assert len(report.layers["agent"]) == (10 if also else 5)
        outputs.append(tiny.forward(unet, noise(2, 4, 32, 32)))
        assert outputs[-1].isfinite().all()
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


@BOTH
def test_odd_sizes(method):
    unet, recorder = tiny.unet(), Recorder()
    da.enable(unet, dataclasses.replace(method, max_downsample=8, cell_choice=recorder), timesteps=SCHEDULE)
    assert tiny.forward(unet, noise(1, 4, 27, 37)).isfinite().all()
    rows, columns = method.stride
    grids = {"down_blocks.0": (27, 37), "down_blocks.1": (14, 19), "down_blocks.2": (7, 10)}
    for _, block, cells in recorder.asked:
        grid = grids.get(block[:13])
        assert grid is None or cells == (grid[0] // rows, grid[1] // columns)


def processor_and_layer(dtype=torch.float32, upcast=False):
    block = seed_parameters(BasicTransformerBlock(32, 4, 8).eval())
    attn = block.attn1.to(dtype)
    attn.upcast_attention = upcast
    match, setting = BlockMatch(torch.tensor(0), argument_names(block)), Setting(0.4, (4, 4), 0.95, 0.3, 0.075)
    plan = MergePlan(setting, (8, 8), setting.counts((8, 8)))
    hidden = (noise(2, 64, 32) * 4).to(dtype)
    match.find(block, (hidden,), {"cross_attention_kwargs": {PLAN: plan}})
    attn.set_processor(MergedAttnProcessor(match))
    return attn, hidden, match


def test_masks_are_refused_where_tokens_are_merged():
    attn, hidden, _ = processor_and_layer()
    with pytest.raises(da.UnsupportedModelError, match="mask"):
        attn(hidden, attention_mask=torch.zeros(2, 1, 64))


@pytest.mark.parametrize("agents", [True, False])
def test_upcast_attention_is_honoured_in_both_phases(agents):
    results = {}
    for upcast in (True, False):
        attn, hidden, match = processor_and_layer(torch.bfloat16, upcast)
        if not agents:
            match.match = dataclasses.replace(match.match, agent=None, agent_tokens=0)
        seen = []
        original = attn.to_out[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
        attn(hidden)
        original.remove()
        results[upcast] = seen[0]
    # What float32 gives from the same bfloat16 projections, rounded once.
    q, k, v = (x.transpose(1, 2).float() for x in MergedAttnProcessor().project(attn, match.match.merge(hidden), None))
    if agents:
        a = MergedAttnProcessor().project(attn, match.match.agents(hidden), None)[0].transpose(1, 2).float()
        exact = da.ops.agent_attention(q, k, v, a, second_scale=8 ** (-0.5 * 0.3), shortcut=0.075)
    else:
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    exact = exact.transpose(1, 2).flatten(2).bfloat16()
    torch.testing.assert_close(results[True], exact, atol=0, rtol=2**-7)
    assert (results[False] != exact).float().mean() > (results[True] != exact).float().mean()


def test_upcast_attention_holds_under_autocast():
    attn, hidden, match = processor_and_layer(torch.float32, upcast=True)
    seen = []
    attn.to_out[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    processor = MergedAttnProcessor()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attn(hidden)
        projected = processor.project(attn, match.match.merge(hidden), None)
        agents = processor.project(attn, match.match.agents(hidden), None)[0]
    q, k, v, a = (x.float().transpose(1, 2) for x in (*projected, agents))
    assert projected[0].dtype == torch.bfloat16  # autocast was at work, and stopped where logits begin
    exact = da.ops.agent_attention(q, k, v, a, second_scale=8 ** (-0.5 * 0.3), shortcut=0.075)
    torch.testing.assert_close(seen[0], exact.transpose(1, 2).flatten(2), atol=1e-6, rtol=1e-6)


def test_gradient_checkpointing_recomputes_with_the_plan_of_its_own_pass():
    def gradients(checkpointing):
        unet = tiny.unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        da.enable(unet, da.AgentAttention(), timesteps=SCHEDULE)
        text = noise(2, 5, 12)
        early, late = (unet(noise(2, 4, *size), t, text).sample for size, t in (((32, 32), 901), ((32, 16), 101)))
        (early.square().mean() + late.square().mean()).backward()
        return [p.grad for p in unet.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 0
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_gligen():
    unet = seed_parameters(
        diffusers.UNet2DConditionModel(**{**tiny.SD, "attention_type": "gated", "cross_attention_dim": 768}).eval()
    )
    objects = {"objs": noise(2, 3, 768)}
    for block in (m for m in unet.modules() if isinstance(m, BasicTransformerBlock)):
        block.fuser.enabled = True
    kwargs = {"cross_attention_kwargs": {"gligen": {"boxes": noise(2, 3, 4), "masks": torch.ones(2, 3)}}}
    kwargs["cross_attention_kwargs"]["gligen"]["positive_embeddings"] = objects["objs"]
    x, text = noise(2, 4, 32, 32), noise(2, 5, 768)
    with torch.no_grad():
        plain = unet(x, 901, text, **kwargs).sample
        da.enable(unet, da.AgentAttention(), timesteps=SCHEDULE)
        on = unet(x, 901, text, **kwargs).sample
    assert on.isfinite().all() and not torch.allclose(on, plain)


def test_chunked_feed_forward_is_served_unless_it_is_merged():
    unet = tiny.unet()
    da.enable(unet, da.TokenMerging())
    whole = tiny.forward(unet, noise(2, 4, 32, 32))
    for block in (m for m in unet.modules() if isinstance(m, BasicTransformerBlock)):
        block.set_chunk_feed_forward(16, 1)
    torch.testing.assert_close(tiny.forward(unet, noise(2, 4, 32, 32)), whole)
    da.enable(unet, da.TokenMerging(merge_feed_forward=True))
    with pytest.raises(da.GridError, match="feed-forward chunking"):
        tiny.forward(unet, noise(2, 4, 32, 32))


def test_masks_of_image_prompts_are_refused_on_merged_cross_attention():
    unet = tiny.unet()
    da.enable(unet, da.TokenMerging(merge_cross_attention=True))
    with pytest.raises(da.UnsupportedModelError, match="ip_adapter_masks"):
        tiny.forward(unet, noise(2, 4, 32, 32), cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]})


@BOTH
def test_motion_modules_are_left_alone(method):
    motion = tiny.motion()
    x, text = noise(1, 4, 3, 16, 16), noise(3, 5, 12)
    with torch.no_grad():
        plain = motion(x, 901, text).sample
        report = da.enable(motion, method, timesteps=SCHEDULE)
        assert not any("motion" in name for name in report.layers[method.name])
        assert not torch.allclose(motion(x, 901, text).sample, plain)
        da.disable(motion)
        assert torch.equal(motion(x, 901, text).sample, plain)


def test_a_pass_that_broke_off_leaves_no_matching_behind():
    unet = tiny.unet()
    plain = tiny.forward(unet, noise(2, 4, 8, 8))
    da.enable(unet, da.TokenMerging(stride=(16, 16)))

    def fail(module, args, kwargs):
        raise KeyboardInterrupt

    handle = (
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.register_forward_pre_hook(fail, with_kwargs=True)
    )
    with pytest.raises(KeyboardInterrupt):
        tiny.forward(unet, noise(2, 4, 32, 32))
    handle.remove()
    assert torch.equal(tiny.forward(unet, noise(2, 4, 8, 8)), plain)  # smaller than a cell: nothing is merged


def test_the_order_of_merged_tokens_does_not_matter():
    attn, hidden, match = processor_and_layer()
    plan = match.match
    expected = attn(hidden)
    order = torch.randperm(plan.merged_tokens, generator=torch.Generator().manual_seed(0))
    match.match = dataclasses.replace(plan, merged=order[plan.merged])
    torch.testing.assert_close(attn(hidden), expected, atol=1e-5, rtol=1e-5)


# ---- beside other methods


@BOTH
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_beside_raunet_in_either_order(method, make):
    raunet = da.HiDiffusion(window_attention=False)
    outputs = []
    for methods in ((method, raunet), (raunet, method)):
        pipe = make()
        for one in methods:
            da.enable(pipe, one)
        outputs.append(tiny.run(pipe, steps=4))
    torch.testing.assert_close(*outputs)
    pipe = make()
    da.enable(pipe, raunet)
    assert not torch.allclose(tiny.run(pipe, steps=4), outputs[0], atol=1e-3)


def test_a_level_that_raunet_has_shrunk_is_left_alone_when_it_is_below_the_limit():
    pipe, recorder = tiny.sdxl(), Recorder()
    da.enable(pipe, da.HiDiffusion(window_attention=False, aggressive=False, t1_ratio=1.0, t2_ratio=0.0, min_size=0))
    da.enable(pipe, da.TokenMerging(cell_choice=recorder))
    tiny.run(pipe, steps=1)
    assert {cells for _, _, cells in recorder.asked} == {(8, 8)}  # 16 x 16 tokens; the 8 x 8 of pooled pairs are not
    da.disable(pipe, "hidiffusion")
    everywhere = len(recorder.asked)
    recorder.asked.clear()
    tiny.run(pipe, steps=1)
    assert len(recorder.asked) > everywhere


@BOTH
def test_conflicts_are_named(method):
    unet = tiny.unet()
    with pytest.raises(da.MethodConflictError, match=f"'{method.name}' and 'hidiffusion'|'hidiffusion' and"):
        da.enable(unet, method, da.HiDiffusion(), timesteps=SCHEDULE)
    with pytest.raises(da.MethodConflictError, match="linfusion"):
        da.enable(unet, da.LinFusion.for_model(unet, mid_dim=4), method, timesteps=SCHEDULE)
    with pytest.raises(da.MethodConflictError, match="'agent' and 'token_merging'"):
        da.enable(unet, da.AgentAttention(), da.TokenMerging(), timesteps=SCHEDULE)
    assert da.enabled(unet) == []
    other = da.LinFusion.for_model(unet, mid_dim=4)
    for first, second in ((other, method), (method, other)):
        da.enable(unet, first, timesteps=SCHEDULE)
        with pytest.raises(
            da.MethodConflictError, match=f"'{method.name}' and 'linfusion'|'linfusion' and '{method.name}'"
        ):
            da.enable(unet, second, timesteps=SCHEDULE)
        da.disable(unet)


def test_agents_need_a_schedule_and_merging_does_not():
    with pytest.raises(da.UnsupportedModelError, match="timesteps="):
        da.enable(tiny.unet(), da.AgentAttention())
    unet = tiny.unet()
    da.enable(unet, da.TokenMerging())
    assert torch.equal(tiny.forward(unet, noise(2, 4, 32, 32)), tiny.forward(unet, noise(2, 4, 32, 32)))


def test_transformers_are_refused_unless_asked_for_as_an_experiment():
    with pytest.raises(da.UnsupportedModelError, match="FluxTransformer2DModel"):
        da.enable(tiny.transformer(), da.TokenMerging())
    with pytest.raises(da.UnsupportedModelError, match="experimental=True"):
        da.enable(tiny.transformer(), da.AgentAttention(), timesteps=SCHEDULE)


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        (da.TokenMerging, {"ratio": 1.5}, "ratio=1.5"),
        (da.TokenMerging, {"stride": (0, 2)}, "stride="),
        (da.TokenMerging, {"max_downsample": 0}, "max_downsample=0"),
        (da.TokenMerging, {"rng": "global"}, "rng='global'"),
        (da.AgentAttention, {"agent_ratio": -0.1}, "agent_ratio=-0.1"),
        (da.AgentAttention, {"late_stride": (2, 0)}, r"stride=\(2, 0\) \(late\)"),
        (da.AgentAttention, {"switch": 20}, "switch=20"),
        (da.TokenMerging, {"stride": 2}, "stride=2"),
        (da.TokenMerging, {"stride": (2.0, 2.0)}, "whole numbers"),
    ],
)
def test_bad_options(method, options, told):
    with pytest.raises(ValueError, match=told):
        method(**options)


def test_a_stride_may_be_a_list_as_files_of_settings_give_it():
    outputs = []
    for stride in ((2, 2), [2, 2]):
        unet = tiny.unet()
        da.enable(unet, da.TokenMerging(stride=stride))
        outputs.append(tiny.forward(unet, noise(2, 4, 32, 32)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("choice", [torch.full((16, 16), 4), torch.zeros(16, 8, dtype=torch.long)])
def test_a_choice_outside_the_cell_is_refused(choice):
    unet = tiny.unet()
    da.enable(unet, da.TokenMerging(cell_choice=lambda step, block, cells: choice), timesteps=SCHEDULE)
    with pytest.raises(ValueError, match=r"cell_choice for down_blocks\.0.*from 0 to 3"):
        tiny.forward(unet, noise(2, 4, 32, 32))
