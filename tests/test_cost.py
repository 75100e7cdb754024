"""The cost meter sees time pass and memory come and go, also the second time."""

import time

import pytest
import torch

from diffusion_attn.metrics.cost import measure


def test_seconds():
    with measure() as cost:
        time.sleep(0.2)
    assert 0.2 <= cost.seconds < 0.6


@pytest.mark.parametrize("attempt", [1, 2])
def test_peak_memory_of_what_is_freed_again(attempt):
    size = 200_000_000
    with measure() as cost:
        block = torch.ones(size // 4)
        time.sleep(0.05)
        del block
    assert 0.9 * size < cost.peak_bytes < 1.3 * size


def test_an_exception_passes_through_and_the_watch_ends():
    with pytest.raises(KeyError), measure() as cost:
        raise KeyError
    assert cost.seconds == 0
