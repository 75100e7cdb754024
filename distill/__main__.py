"""``python -m diffusion_attn.distill`` is ``diffusion-attn distill``, for ``accelerate launch -m``."""

import sys

from diffusion_attn.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
