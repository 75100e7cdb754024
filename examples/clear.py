"""Large pictures with FLUX in a cascade: the plain model draws the first, CLEAR refines each larger one.

    python examples/clear.py "a lighthouse in a storm" --sizes 1024 2048 4096 --device cuda
    python examples/clear.py "..." --radius 8 --down-factor 4
    python examples/clear.py "..." --model my-flux-folder --weights none    # the rule alone, with the model's weights

The settings are those of CLEAR's authors (arXiv 2412.16112 and its repository): image-to-image with strength 0.7,
scores scaled with the length of the sequence, a rotary base of ten times the usual, a fixed shift of the noise levels.
At 4096 pixels an attention layer computes 1.4 instead of 53.6 TFLOP with a radius of 16.
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

import diffusion_attn as da
from diffusion_attn.core.calls import call_arguments


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt")
    add("--model", default="black-forest-labs/FLUX.1-dev", help="Hub id or folder of a FLUX pipeline")
    add("--weights", default="Huage001/CLEAR", help="Hub id or folder of CLEAR's weights, or none")
    add("--radius", type=int, default=16)
    add("--down-factor", type=int, default=1)
    add("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="pixels of a side, from stage to stage")
    add("--steps", type=int, default=20)
    add("--strength", type=float, default=0.7, help="share of the steps that a larger picture is drawn again for")
    add("--guidance", type=float, default=3.5, help="of the first picture")
    add("--refine-guidance", type=float, default=7.5, help="of the larger ones")
    add("--ntk-factor", type=float, default=10.0, help="factor of the rotary embedding's base in the larger ones")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("outputs/clear"))
    return parser.parse_args()


def main() -> None:
    """Draw, enlarge, refine."""
    args = parse_args()
    options = {"radius": args.radius, "down_factor": args.down_factor}
    options |= {"proportional": True, "ntk_factor": args.ntk_factor}
    clear = da.Clear(**options) if args.weights == "none" else da.Clear.from_pretrained(args.weights, **options)
    pipe = FluxPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if args.device != "cpu" else torch.float32)
    pipe.to(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    common = {"num_inference_steps": args.steps, "generator": generator}

    first, *larger = args.sizes
    call = call_arguments(pipe, [args.prompt], args.guidance)
    image = pipe(height=first, width=first, **call, **common).images[0]
    image.save(args.output / f"{first}.png")

    refine = FluxImg2ImgPipeline.from_pipe(pipe, dtype=pipe.dtype)
    refine.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False, shift=3.0)
    refine.vae.enable_tiling()
    call = call_arguments(refine, [args.prompt], args.refine_guidance)
    with da.using(refine, clear):
        for size in larger:
            image = image.resize((size, size))
            image = refine(image=image, height=size, width=size, strength=args.strength, **call, **common).images[0]
            image.save(args.output / f"{size}.png")
            print(args.output / f"{size}.png")


if __name__ == "__main__":
    main()
