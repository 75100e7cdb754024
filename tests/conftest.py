"""What holds for every test."""

import os

os.environ.setdefault("DIFFUSERS_ATTN_CHECKS", "1")  # read when diffusers is imported; it then checks what is attended
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not here is missing at once, with a network and without one
