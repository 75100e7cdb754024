"""Large pictures with FLUX in a cascade: the plain model draws the first, CLEAR refines each larger one.

    python examples/highres_flux_clear.py "a lighthouse in a storm" --size 4096 --device cuda
    python examples/highres_flux_clear.py "..." --radius 8 --down-factor 4
    python examples/highres_flux_clear.py "..." --factor 4                              # to 4096 pixels at once
    python examples/highres_flux_clear.py "..." --model my-flux-folder --weights none   # the rule alone
    python examples/highres_flux_clear.py --model shapes-flux                           # embedded, 256 x 256, offline

The settings are those of CLEAR's authors (arXiv 2412.16112 and its repository): 1024, 2048, 4096 pixels, image-to-image
with strength 0.7, scores scaled with the length of the sequence, a rotary base of ten times the usual, a fixed shift of
the noise levels.
At 4096 pixels an attention layer computes 1.4 instead of 53.6 TFLOP with a radius of 16.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxPipeline

import diffusion_attn as da
from diffusion_attn.pipelines import HighResolutionPipeline, Ladder


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?")
    add("--model", default="black-forest-labs/FLUX.1-dev", help="Hub id or folder of FLUX, or shapes-flux")
    add("--weights", help="Hub id or folder of CLEAR's weights, or none; by default those that belong to the model")
    add("--radius", type=int, help="in tokens; by default 16, with the weights of shapes-flux 8")
    add("--down-factor", type=int, default=1)
    add("--size", type=int, help="pixels of a side; by default 4096, of shapes-flux 256")
    add("--factor", type=int, default=2, help="by which sides grow from picture to picture; 4 in the authors' notebook")
    add("--steps", type=int)
    add("--strength", type=float, help="share of the steps that a larger picture is drawn again for; by default 0.7")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("outputs/highres-clear"))
    add("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Draw, enlarge, refine."""
    args = parse_args()
    ladder = replace(Ladder.PRESETS["clear"], factor=args.factor)
    if args.model == "shapes-flux":
        pipe = da.shapes.load_pipeline("shapes-flux")
        prompt, size, guidance, options = "a red star above a blue ring on a white background", 256, 3.0, {}
        ladder = replace(ladder, fit="area", static_shift=None)
    else:
        pipe = FluxPipeline.from_pretrained(args.model, dtype=torch.bfloat16, use_safetensors=True)
        prompt, size = "a lighthouse in a storm", 4096
        guidance = 3.5 if pipe.transformer.config.guidance_embeds else None  # as the pipeline has it
        options = {"proportional": True, "ntk_factor": 10.0}
    options |= {"radius": args.radius, "down_factor": args.down_factor}
    if args.weights is None:
        clear = da.Clear.for_pipeline(pipe, **options)
    elif args.weights == "none":
        clear = da.Clear(**options | {"radius": args.radius or 16})
    else:
        clear = da.Clear.from_pretrained(args.weights, **options)
    pipe.to(args.device)
    hires = HighResolutionPipeline.from_pipe(pipe, methods=[clear])
    result = hires(
        args.prompt or prompt,
        height=args.size or size,
        width=args.size or size,
        num_inference_steps=args.steps or 20,
        guidance_scale=guidance,
        ladder=ladder if args.strength is None else replace(ladder, strength=args.strength),
        memory="low",
        generator=torch.Generator().manual_seed(args.seed),
        output_dir=args.output,
        resume=args.resume,
    )
    for done in result.stages:
        print(f"{done.files[0]}: {done.seconds:.0f} s, {done.peak_memory_bytes / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
