"""Edits against the numbers of the official code, on its tiny networks."""

from dataclasses import replace

import torch
from diffusers import AutoencoderKL

from diffusion_attn.editing.inversion import ddim_invert
from diffusion_attn.pipelines import DPLPipeline, PromptToPromptPipeline
from tests.editing.golden import DPL, drawn
from tests.editing.networks import assert_near, tiny


def pipeline(cls):
    parts = tiny()
    return cls(AutoencoderKL(latent_channels=4), parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler)


@DPL.named("p2p")
def test_prompt_to_prompt(name):
    case = DPL.cases[name]
    params = case["params"]
    source, target = params["prompts"]
    output = pipeline(PromptToPromptPipeline)(
        source,
        target,
        num_inference_steps=params["steps"],
        alignment="reference",
        cross_replace_steps=params["cross_replace_steps"],
        self_replace_steps=params["self_replace_steps"],
        max_queries=256,
        latents=drawn(case["inputs"]["x_T"]),
        output_type="latent",
    )
    assert_near(torch.cat([output.source, output.images]), name, "latents")


@DPL.named("dpl_edit")
def test_edit_with_learned_words(name):
    learned = DPL.cases["dpl_inversion"]["params"]
    pipe = pipeline(DPLPipeline)
    x0 = drawn(DPL.cases["dpl_inversion"]["inputs"]["x0"])
    inversion = replace(
        ddim_invert(pipe, x0, learned["prompt"], num_inference_steps=3),
        words=("cat", "dog"),
        word_embeds=DPL.expected("dpl_inversion", "noun_embeddings"),
        null_embeds=DPL.expected("dpl_inversion", "null_embeddings"),
    )
    params = DPL.cases[name]["params"]
    output = pipe(
        target_prompt=params["target_prompt"].replace("<cat-toy>", "cat").replace("<dog-toy>", "dog"),
        inversion=inversion,
        edit_type=name.removeprefix("dpl_edit_"),
        cross_replace_steps=1.0,
        self_replace_steps=1.0,
        max_queries=256,
        output_type="latent",
    )
    assert_near(torch.cat([output.source, output.images]), name, "latents")
