"""Edits against the numbers of the official code, on its tiny networks."""

from dataclasses import replace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffusion_attn.editing.inversion import ddim_invert
from diffusion_attn.editing.schedulers import EditDDIMScheduler
from diffusion_attn.pipelines import DPLPipeline, PromptToPromptPipeline, ViMAEditPipeline
from tests.editing import tokenizers
from tests.editing.golden import DPL, VIMAEDIT, drawn
from tests.editing.networks import assert_near, tiny
from tests.golden.seeded import seed_parameters, seeded_tensor


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


def vimaedit_pipeline(case):
    """As the manifest describes it: a tiny UNet with an IP-Adapter, every weight of which is drawn from its name."""
    params = case["parameters"]
    unet = UNet2DConditionModel(**params["unet"]).eval()
    width, tokens = params["image_embed_dim"], params["image_tokens"]
    inner = params["unet"]["cross_attention_dim"]
    adapter = {}
    for index, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            rows = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            adapter |= {f"{index}.to_{kind}_ip.weight": torch.zeros(rows, inner) for kind in "kv"}
    projection = {"proj.weight": torch.zeros(tokens * inner, width), "proj.bias": torch.zeros(tokens * inner)}
    projection |= {"norm.weight": torch.zeros(inner), "norm.bias": torch.zeros(inner)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
    seed_parameters(unet, params["parameter_gain"])
    tokenizer = tokenizers.pieces(*params["prompts"])
    return ViMAEditPipeline(None, None, tokenizer, unet, EditDDIMScheduler(**params["scheduler_config"]))


@VIMAEDIT.named("loop_pub")
def test_vimaedit(name):
    case = VIMAEDIT.cases[name]
    params = case["parameters"]
    source, target = params["prompts"]

    def tensor(entry, **names):
        text = case["inputs"][entry]["seeded_tensor"]
        for key, value in names.items():
            text = text.replace(f"<{key}>", str(value))
        return seeded_tensor(text, case["inputs"][entry]["shape"])

    embeds = tensor("image_embeds")
    embeds[[0, 2]] = 0
    pipe = vimaedit_pipeline(case)
    output = pipe(
        tensor("source_latent"),
        source,
        target,
        params["blend_words"] and [words[0] for words in params["blend_words"]],
        num_inference_steps=params["num_inference_steps"],
        source_guidance_scale=params["source_guidance_scale"],
        guidance_scale=params["target_guidance_scale"],
        edit_type=params["kind"],
        cross_replace_steps=params["cross_text_replace_steps"],
        self_replace_steps=params["self_replace_steps"],
        image_replace_steps=params["cross_image_replace_steps"],
        ip_adapter_scale=params["ip_adapter_scale"],
        ip_adapter_image_embeds=[embeds],
        blend_threshold=params["thresholds"][0],
        variance_threshold=params["thresholds"][1],
        grounding_iterations=params["iterations"],
        grounding_gamma=params["gamma"],
        mask_start=params["start_blend"],
        latents=tensor("init_noise"),
        variance_noise=torch.stack([tensor("variance_noise", step=n) for n in range(params["num_inference_steps"])]),
        prompt_embeds=torch.stack([tensor("prompt_embeds", prompt=prompt) for prompt in (source, target)]),
        negative_prompt_embeds=torch.stack([tensor("prompt_embeds", prompt="")] * 2),
        output_type="latent",
    )
    VIMAEDIT.close(torch.cat([output.source, output.images]), name, "latents")
    if params["blend_words"]:
        VIMAEDIT.close(output.word_maps, name, "map")
        VIMAEDIT.close(output.blend_mask, name, "blend_mask")
        VIMAEDIT.close(output.variance_mask, name, "variance_mask")
    else:
        assert output.word_maps is output.blend_mask is output.variance_mask is None
