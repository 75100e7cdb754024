"""Maps that are averaged over layers, and attention to pictures that is taken from the source."""

import random

import pytest
import torch

from diffusion_attn.core.errors import GridError
from diffusion_attn.editing.attention import AttentionControl, MapRecorder
from diffusion_attn.editing.controls import PromptEdit
from diffusion_attn.editing.layers import attention_layers, grid_of, reduced
from tests import tiny
from tests.editing.golden import DPL, drawn
from tests.test_matrix import ip_adapter
from tests.tiny import PROMPT, noise


def official_layers():
    layers = [drawn(layer["probs"]) for layer in DPL.cases["aggregate_a"]["inputs"]["layers"]]
    return [(maps, grid_of(maps.shape[1], (32, 32))) for maps in layers]


@pytest.mark.parametrize("order", range(3))
def test_official_average_in_any_order(order):
    layers = official_layers()
    random.Random(order).shuffle(layers)
    recorder = MapRecorder("cross", (16, 16))
    for maps, grid in layers:
        if recorder.wants("cross", grid):
            recorder.add(maps.mean(0, keepdim=True), grid)
    [output] = DPL.cases["aggregate_a"]["outputs"]
    DPL.close(recorder.take()[0], "aggregate_a", output)


def test_levels_of_a_unet():
    unet = tiny.unet()
    layers = list(attention_layers(unet))
    by_place = {(layer.place, layer.factor, layer.kind) for layer in layers}
    assert ("down", 1, "self") in by_place and ("up", 4, "cross") in by_place and ("mid", 8, "cross") in by_place
    assert all(unet.get_submodule(layer.name) is layer.attn for layer in layers)


def test_grids_of_odd_sizes():
    assert reduced((13, 7), 4) == (4, 2) and grid_of(8, (13, 7)) == (4, 2)
    with pytest.raises(GridError, match="merge tokens"):
        grid_of(50, (16, 16))


def test_layers_with_nothing_to_do_keep_their_processors():
    unet = tiny.unet()
    before = dict(unet.attn_processors)
    tokenizer = tiny.sd().tokenizer
    edit = PromptEdit(PROMPT, PROMPT, tokenizer, 10, max_queries=16)
    with AttentionControl((16, 16), [edit], rows=2).on(unet):
        changed = {name for name, processor in unet.attn_processors.items() if processor is not before[name]}
    layers = list(attention_layers(unet))
    expected = {x.name for x in layers if x.kind == "cross" or x.factor >= 4}
    assert changed == {f"{name}.processor" for name in expected}
    edit = PromptEdit(PROMPT, PROMPT, tokenizer, 10, self_replace_steps=0)
    with AttentionControl((16, 16), [edit], rows=2).on(unet):
        changed = {name for name, processor in unet.attn_processors.items() if processor is not before[name]}
    assert changed == {f"{x.name}.processor" for x in layers if x.kind == "cross"}
    assert all(before[name] is processor for name, processor in unet.attn_processors.items())


@pytest.mark.parametrize("window", [0.0, 1.0])
def test_attention_to_pictures_is_the_sources_inside_its_window(window):
    """With equal hidden states and prompts, targets differ by the weights of their own picture alone."""
    pipe = tiny.sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    layer = next(x for x in attention_layers(pipe.unet) if x.kind == "cross")
    edit = PromptEdit(PROMPT, PROMPT, pipe.tokenizer, 10, image_replace_steps=window)
    control = AttentionControl((16, 16), [edit])
    hidden = noise(1, 256, 8).expand(2, -1, -1)
    text = noise(1, pipe.tokenizer.model_max_length, 12, seed=1).expand(2, -1, -1)
    pictures = noise(2, 1, 4, 12, seed=2)
    stock = layer.attn.processor(layer.attn, hidden, (text, [pictures]))
    with control.on(pipe.unet):
        out = layer.attn.processor(layer.attn, hidden, (text, [pictures]))
    torch.testing.assert_close(out[0], stock[0], atol=1e-5, rtol=1e-4)
    assert torch.allclose(out[1], stock[1], atol=1e-5) == (window == 0)
