"""The contract of enable, disable, enabled, using: nothing half-applied, nothing left behind."""

import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

import diffusion_attn as da
from diffusion_attn.core.method import Plan
from tests import tiny


@pytest.fixture
def pipe():
    return tiny.sd()


def test_report_names_real_modules(pipe):
    report = da.enable(pipe, da.HiDiffusion())
    layers = report.layers["hidiffusion"]
    assert "down_blocks.0.downsamplers.0" in layers and "up_blocks.3.attentions.2.transformer_blocks.0.attn1" in layers
    for name in layers:
        pipe.unet.get_submodule(name)
    assert len([name for name in layers if name.endswith("attn1")]) == 5


def test_weights_are_saved_plain_while_enabled(pipe, tmp_path):
    keys = list(pipe.unet.state_dict())
    da.enable(pipe, da.HiDiffusion())
    assert list(pipe.unet.state_dict()) == keys
    pipe.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pipe.unet.parameters(), strict=True))


def test_state_belongs_to_the_denoiser(pipe):
    other = tiny.quiet(type(pipe)(**pipe.components, requires_safety_checker=False))
    da.enable(pipe, da.HiDiffusion(seed=7))
    assert da.enabled(other) == da.enabled(pipe.unet) == [da.HiDiffusion(seed=7)]
    da.disable(other.unet, "hidiffusion")
    assert da.enabled(pipe) == []


def test_enabling_again_replaces(pipe):
    da.enable(pipe, da.HiDiffusion())
    once = tiny.run(pipe)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules())
    da.enable(pipe, da.HiDiffusion(shift=1))
    da.enable(pipe, da.HiDiffusion())
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules()) == hooks
    assert torch.equal(tiny.run(pipe), once)


def test_using_brings_back_what_was_enabled(pipe):
    da.enable(pipe, da.HiDiffusion(seed=1))
    first = tiny.run(pipe)
    with da.using(pipe, da.HiDiffusion(seed=2)) as report:
        assert "hidiffusion" in report.layers
        assert da.enabled(pipe) == [da.HiDiffusion(seed=2)]
    assert da.enabled(pipe) == [da.HiDiffusion(seed=1)]
    assert torch.equal(tiny.run(pipe), first)


def test_what_fails_to_be_undone_keeps_nothing_else(pipe):
    before = tiny.trace_of(pipe.unet)
    da.enable(pipe, da.HiDiffusion())
    attachment = pipe.unet._diffusion_attn.enabled["hidiffusion"].attachment
    attachment.when_undone(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        da.disable(pipe)
    da.disable(pipe)
    assert tiny.trace_of(pipe.unet) == before


def test_using_cleans_up_after_an_exception(pipe):
    before = tiny.trace_of(pipe.unet)
    with pytest.raises(ZeroDivisionError), da.using(pipe, da.HiDiffusion()):
        raise ZeroDivisionError
    assert tiny.trace_of(pipe.unet) == before


def test_a_deleted_pipeline_is_freed_while_its_denoiser_lives_on():
    pipe = tiny.sd()
    da.enable(pipe, da.HiDiffusion())
    gone, unet = weakref.ref(pipe), pipe.unet
    del pipe
    gc.collect()
    assert gone() is None
    assert da.enabled(unet) == [da.HiDiffusion()]


def test_an_exception_inside_a_forward_pass_leaves_nothing_behind(pipe):
    da.enable(pipe, da.HiDiffusion())
    expected = tiny.run(pipe)

    def fail(module, args):
        raise InterruptedError

    handle = pipe.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        tiny.run(pipe)
    handle.remove()
    assert torch.equal(tiny.run(pipe), expected)


def flux():
    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


@pytest.mark.parametrize(
    ("make", "methods", "kwargs", "error", "says"),
    [
        (tiny.unet, (), {}, ValueError, "no method given"),
        (tiny.unet, (da.HiDiffusion,), {}, TypeError, "give an instance"),
        (tiny.unet, ("hidiffusion",), {}, TypeError, "'hidiffusion' is not a method"),
        (tiny.unet, (da.HiDiffusion(),), {}, da.UnsupportedModelError, "timesteps="),
        (tiny.unet, (da.HiDiffusion(), da.HiDiffusion(seed=1)), {}, da.MethodConflictError, "2 times"),
        (tiny.unet, (da.HiDiffusion(),), {"timesteps": torch.ones(2, 2)}, ValueError, "one dimension"),
        (tiny.unet, (da.HiDiffusion(),), {"timesteps": torch.ones(0)}, ValueError, "one dimension"),
        (flux, (da.HiDiffusion(),), {"timesteps": torch.ones(1)}, da.UnsupportedModelError, "CLEAR"),
        (lambda: torch.nn.Linear(1, 1), (da.HiDiffusion(),), {}, da.UnsupportedModelError, "Linear"),
        (lambda: 5, (da.HiDiffusion(),), {}, da.UnsupportedModelError, "int"),
    ],
)
def test_bad_input_is_refused_before_anything_is_touched(make, methods, kwargs, error, says):
    target = make()
    before = tiny.trace_of(target) if isinstance(target, torch.nn.Module) else None
    with pytest.raises(error, match=says):
        da.enable(target, *methods, **kwargs)
    if before:
        assert tiny.trace_of(target) == before


def test_disable_of_what_is_not_enabled(pipe):
    da.disable(pipe)
    with pytest.raises(ValueError, match="nothing"):
        da.disable(pipe, "hidiffusion")
    da.enable(pipe, da.HiDiffusion())
    with pytest.raises(ValueError, match="linfusion"):
        da.disable(pipe, "hidiffusion", "linfusion")
    assert da.enabled(pipe)


@dataclass(frozen=True)
class Claims:
    """A method that claims one attention layer and may fail while it is installed."""

    name: ClassVar[str] = "claims"
    fails: bool = False

    def plan(self, target):
        layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"

        def install(attachment):
            attachment.before(target.denoiser.conv_in, lambda module, args: None)
            if self.fails:
                raise RuntimeError("half-way")

        return Plan([layer], install, frozenset([layer]), "take another layer")


def test_conflicts_name_both_and_the_way_out(pipe):
    da.enable(pipe, Claims())
    before = tiny.trace_of(pipe.unet)
    with pytest.raises(da.MethodConflictError, match=r"'claims' and 'hidiffusion'.*window_attention=False"):
        da.enable(pipe, da.HiDiffusion())
    assert tiny.trace_of(pipe.unet) == before
    da.enable(pipe, da.HiDiffusion(window_attention=False))
    assert [method.name for method in da.enabled(pipe)] == ["claims", "hidiffusion"]
    da.disable(pipe, "claims")
    assert [method.name for method in da.enabled(pipe)] == ["hidiffusion"]


def test_a_failing_installation_is_taken_back(pipe):
    before = tiny.trace_of(pipe.unet)
    with pytest.raises(RuntimeError, match="half-way"):
        da.enable(pipe, da.HiDiffusion(window_attention=False), Claims(fails=True))
    assert tiny.trace_of(pipe.unet) == before
    da.enable(pipe, Claims())
    with pytest.raises(RuntimeError, match="half-way"):
        da.enable(pipe, Claims(fails=True))
    assert da.enabled(pipe) == [Claims()]
