"""A picture of 4096 x 4096 pixels with SDXL: HiDiffusion draws 2048 at once, image-to-image takes it further.

    python examples/highres_sdxl_hidiffusion.py "a street in the rain, neon lights"
    python examples/highres_sdxl_hidiffusion.py --refine demofusion     # the last stage by DemoFusion's loop
    python examples/highres_sdxl_hidiffusion.py --model shapes-sd       # the embedded model, 256 x 256, offline

HiDiffusion (arXiv 2311.17528) keeps objects single above the training size; from there on the layout is given, and
stages only add detail.
"""

import argparse
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

import diffusion_attn as da
from diffusion_attn.pipelines import HighResolutionPipeline, Ladder


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?")
    add("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="Hub id or folder of SDXL, or shapes-sd")
    add("--size", type=int, help="pixels of a side; by default four times the native size")
    add("--refine", choices=("demofusion",))
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("outputs/highres-hidiffusion"))
    add("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Draw at twice the native size, then enlarge and refine."""
    args = parse_args()
    if args.model == "shapes-sd":
        pipe = da.shapes.load_pipeline()
        prompt, size, steps, guidance = "a red star above a blue ring on a white background", 256, 30, 2.0
        # Windows cost quality at the few cells of the embedded model and save nothing there.
        hidiffusion = da.HiDiffusion(window_attention=False)
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(
            args.model, dtype=torch.float16, variant="fp16", use_safetensors=True
        )
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        prompt, size, steps, guidance = "a street in the rain, neon lights", 4096, 50, 7.5
        hidiffusion = da.HiDiffusion()
    pipe.to(args.device)
    hires = HighResolutionPipeline.from_pipe(pipe, methods=[hidiffusion], base_methods=[hidiffusion])
    result = hires(
        args.prompt or prompt,
        height=args.size or size,
        width=args.size or size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        ladder=Ladder(base_scale=2.0, strength=0.3),
        refine=args.refine,
        memory="low",
        generator=torch.Generator().manual_seed(args.seed),
        output_dir=args.output,
        resume=args.resume,
    )
    for done in result.stages:
        print(f"{done.files[0]}: {done.seconds:.0f} s, {done.peak_memory_bytes / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
