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

import diffusion_attn
check("import diffusion_attn")
from diffusion_attn.cli.main import main
for arguments in (["--help"], ["generate", "--help"], ["edit", "--nonsense"]):
    main(arguments)
    check(arguments, "accelerate", "jsonargparse")
import diffusion_attn.editing
check("editing", "accelerate", "jsonargparse", "diffusers")
import diffusion_attn.pipelines
check("pipelines", "accelerate", "jsonargparse", "diffusers", "transformers")
"""


def test_heavy_things_wait_until_they_are_needed():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=200, stdout=subprocess.DEVNULL)
