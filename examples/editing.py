"""Look at attention, edit a drawn picture's prompt, then edit a real one: offline, on the embedded model.

    python examples/editing.py --output outputs/editing

With another model and a photograph give words of your own prompts; everything else stays the same.
"""

import argparse
from pathlib import Path

import torch

import diffusion_attn as da
from diffusion_attn.editing.inversion import ddim_invert, direct_inversion
from diffusion_attn.shapes.models import CLIP, IP_ADAPTER

SOURCE = "a large red star above a blue ring on a white background"
TARGET = "a large red square above a blue ring on a white background"
WINDOWS = {"cross_replace_steps": 0.4, "self_replace_steps": 0.2}


def main() -> None:
    """Record, edit, invert, edit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/editing"))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pipe = da.shapes.load_pipeline()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    steps = {"num_inference_steps": args.steps}

    with da.editing.record(pipe, words=["star", "ring"]) as maps:
        picture = pipe(SOURCE, latents=noise, guidance_scale=2.0, **steps).images[0]
    picture.save(args.output / "picture.png")
    maps.grid(over=picture).save(args.output / "maps.png")

    # A drawn picture: both prompts start from the same noise.
    p2p = da.pipelines.PromptToPromptPipeline.from_pipe(pipe)
    drawn = p2p(SOURCE, TARGET, latents=noise, guidance_scale=2.0, **steps, **WINDOWS)
    drawn.images[0].save(args.output / "drawn-square.png")

    # A real one has to be inverted. Direct inversion costs one pass; DPL learns what "star" and "ring" mean in it.
    inversion = direct_inversion(p2p, ddim_invert(p2p, p2p.encode_image(picture), SOURCE, **steps))
    edited = p2p(target_prompt=TARGET, inversion=inversion, guidance_scale=3.0, **WINDOWS)
    edited.images[0].save(args.output / "direct-square.png")

    dpl = da.pipelines.DPLPipeline.from_pipe(pipe)
    inversion = dpl.invert(
        picture,
        SOURCE,
        words=["star", "ring"],
        guidance_scale=3.0,
        background_threshold=0.5,
        map_size=16,
        temperature=10.0,
        num_word_steps=5,
        num_null_steps=10,
        null_start="previous",
        null_tolerance=1e-5,
        **steps,
    )
    inversion.save(args.output / "inversion.safetensors")
    inversion.attention_maps(dpl).grid(over=picture).save(args.output / "learned-maps.png")
    edited = dpl(target_prompt=TARGET, inversion=inversion, guidance_scale=3.0, **WINDOWS)
    edited.images[0].save(args.output / "dpl-square.png")

    # ViMAEdit needs no inversion; its image adapter is told what the edited picture should look like.
    pipe.load_ip_adapter(CLIP, subfolder="", weight_name=IP_ADAPTER, image_encoder_folder=None)
    vima = da.pipelines.ViMAEditPipeline.from_pipe(pipe)
    vima.load_clip(CLIP)
    output = vima(
        picture,
        SOURCE,
        TARGET,
        blend_words=("star", "square"),
        guidance_scale=3.0,
        map_size=16,
        generator=torch.Generator().manual_seed(0),
        **steps,
        **WINDOWS,
    )
    output.images[0].save(args.output / "vimaedit-square.png")
    print(*sorted(args.output.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
