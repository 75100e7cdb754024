"""Inversions against the numbers of the official code, on its tiny networks."""

import torch

from diffusion_attn.editing.inversion import ddim_invert, dynamic_prompts, null_text
from diffusion_attn.editing.inversion.ddim_path import DdimPath
from tests.editing.golden import DPL, drawn
from tests.editing.networks import assert_near, tiny


def test_ddim_steps():
    case = DPL.cases["ddim_steps"]
    path = DdimPath(tiny().scheduler, case["params"]["steps"])
    x, output = drawn(case["inputs"]["x"]), drawn(case["inputs"]["eps"])
    at = [path.timesteps.index(t) for t in case["params"]["timesteps"]]
    DPL.close(torch.stack([path.down(step, output, x) for step in at]), "ddim_steps", "down")
    DPL.close(torch.stack([path.up(step, output, x) for step in at]), "ddim_steps", "up")


def inverted(pipe):
    inputs = DPL.cases["ddim_inversion"]["inputs"]
    context = drawn(inputs["context"])
    return ddim_invert(pipe, drawn(inputs["x0"]), prompt_embeds=context[1:2], num_inference_steps=5), context


def test_ddim_inversion():
    inversion, _ = inverted(tiny())
    assert inversion.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert_near(inversion.latents, "ddim_inversion", "latents")


@DPL.named("null_text")
def test_null_text(name):
    params = DPL.cases[name]["params"]
    pipe = tiny()
    inversion, context = inverted(pipe)
    result = null_text(
        pipe,
        inversion,
        negative_prompt_embeds=context[:1],
        num_null_steps=params["inner_steps"],
        null_tolerance=params["epsilon"],
    )
    assert_near(result.null_embeds, name, "embeddings")


def test_dynamic_prompts():
    case = DPL.cases["dpl_inversion"]
    params = case["params"]
    pipe = tiny()
    inversion = ddim_invert(pipe, drawn(case["inputs"]["x0"]), params["prompt"], num_inference_steps=3)
    balance, background, disjoint = zip(params["lambda"], params["alpha"], params["beta"], strict=True)
    result = dynamic_prompts(
        pipe,
        inversion,
        params["words"],
        background=drawn(case["inputs"]["background"])[0],
        num_word_steps=params["attn_inner"],
        num_null_steps=params["null_inner"],
        balancing=balance,
        leakage=background,
        disjoint=disjoint,
        map_size=params["res"],
    )
    assert_near(result.word_embeds, "dpl_inversion", "noun_embeddings")
    assert_near(result.null_embeds, "dpl_inversion", "null_embeddings")
    assert_near(result.reconstruction, "dpl_inversion", "final_latents")
    names = ("total", "balancing", "leakage", "disjoint", "step", "iteration")
    log = torch.tensor([[entry[name] for name in names] for entry in result.history])
    torch.testing.assert_close(log, DPL.expected("dpl_inversion", "loss_log"), atol=2e-5, rtol=1e-3)
