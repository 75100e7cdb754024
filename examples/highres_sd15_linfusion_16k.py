"""A picture of 16384 x 8192 pixels with Stable Diffusion 1.5 and LinFusion, on one GPU of 24 GB.

    python examples/highres_sd15_linfusion_16k.py "an astronaut on the moon, the earth in the sky"
    python examples/highres_sd15_linfusion_16k.py --model shapes-sd    # the embedded model, 512 x 256, offline

The ladder of LinFusion's authors (arXiv 2409.02097 and its repository): 1024 x 512 pixels from noise, then
image-to-image at each doubling with strengths 0.4, 0.3, 0.2 and 0.1. Stages are kept; with --resume a run goes on where
it stopped.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import diffusion_attn as da
from diffusion_attn.pipelines import HighResolutionPipeline

EMBEDDED = {
    "prompt": "a red star above a blue ring on a white background",
    "size": (256, 512),
    "steps": 30,
    "guidance": 2.0,
}
REAL = {"prompt": "an astronaut on the moon, the earth in the sky", "size": (8192, 16384), "steps": 50, "guidance": 7.5}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?")
    add("--model", default="Lykon/dreamshaper-8", help="Hub id or folder of SD 1.5, or shapes-sd")
    add("--weights", help="Hub id or folder of LinFusion's weights; by default those that belong to the model")
    add("--height", type=int)
    add("--width", type=int)
    add("--seed", type=int, default=3)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("outputs/highres-linfusion"))
    add("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Climb the published ladder."""
    args = parse_args()
    embedded = args.model == "shapes-sd"
    default = EMBEDDED if embedded else REAL
    if embedded:
        pipe = da.shapes.load_pipeline()
    else:
        pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float16, use_safetensors=True)
    pipe.to(args.device)
    linfusion = da.LinFusion.from_pretrained(args.weights) if args.weights else da.LinFusion.for_pipeline(pipe)
    hires = HighResolutionPipeline.from_pipe(pipe, methods=[linfusion], base_methods=[linfusion])
    result = hires(
        args.prompt or default["prompt"],
        height=args.height or default["size"][0],
        width=args.width or default["size"][1],
        num_inference_steps=default["steps"],
        guidance_scale=default["guidance"],
        ladder="linfusion",
        memory="low",
        generator=torch.Generator().manual_seed(args.seed),
        output_dir=args.output,
        resume=args.resume,
    )
    for done in result.stages:
        print(f"{done.files[0]}: {done.seconds:.0f} s, {done.peak_memory_bytes / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
