"""``python -m diffusion_attn`` is the command ``diffusion-attn``."""

import sys

from diffusion_attn.cli.main import main

sys.exit(main())
