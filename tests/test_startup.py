"""What a fresh process loads: no more than was asked for."""

import subprocess
import sys

SCRIPT = """
import sys
heavy = {"accelerate", "datasets", "diffusers", "gradio", "jsonargparse", "matplotlib", "torchmetrics", "transformers"}

def check(what, *may):
    found = (heavy & sys.modules.keys()) - set(may)
    found |= {name for name in sys.modules if name.startswith("diffusers.pipelines.stable_diffusion")}
    assert not found, f"{what} loads {sorted(found)[:3]}"

import diffusion_attn as da
check("import diffusion_attn")
assert not [name for name in ("distill", "editing", "metrics", "pipelines") if f"diffusion_attn.{name}" in sys.modules]
from diffusion_attn.cli.main import main
for arguments in (["--help"], ["generate", "--help"], ["edit", "--nonsense"]):
    main(arguments)
    check(arguments, "accelerate", "jsonargparse")
da.editing.record, da.editing.prompts.word_tokens, da.editing.schedulers.EditDDIMScheduler
da.editing.inversion.Inversion, da.editing.guidance.image_guidance_embeds, da.editing.losses.threshold
check("editing", "accelerate", "jsonargparse", "diffusers")
da.pipelines.PromptToPromptPipeline, da.pipelines.DPLPipeline
check("pipelines", "accelerate", "jsonargparse", "diffusers", "transformers")
da.metrics.pie_bench.decode_mask, da.distill.DistillConfig()
"""


def test_heavy_things_wait_until_they_are_needed():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=200, stdout=subprocess.DEVNULL)
