"""What holds for every test."""

import gc
import os

os.environ.setdefault("DIFFUSERS_ATTN_CHECKS", "1")  # read when diffusers is imported; it then checks what is attended
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not here is missing at once, with a network and without one


def pytest_collection_finish():
    """What was imported stays: the collector need not look through it again at every one of its rounds."""
    gc.collect()
    gc.freeze()
