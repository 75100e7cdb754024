"""What holds for every test."""

import os

os.environ.setdefault("DIFFUSERS_ATTN_CHECKS", "1")  # read when diffusers is imported; it then checks what is attended
