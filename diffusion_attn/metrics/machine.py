"""What numbers were made on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_attn.version import __version__


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the numbers were made on, without names of hosts or folders."""
    import diffusers

    facts = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "diffusion_attn": __version__,
    }
    return {name: value for name, value in facts.items() if value is not None}


def device_slug(device: torch.device | str = "cpu") -> str:
    """A device as part of a file name: a GPU by its model, others by their kind."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "-".join(name.lower().split())


def changed(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """The names of what two results differ in among their ``settings`` and ``machine``: rows of both do not mix."""
    one, other = ({**result["settings"], **result["machine"]} for result in (now, then))
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _processor() -> str:
    """The processor's model where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} ({platform.machine()})" if models else platform.machine()
