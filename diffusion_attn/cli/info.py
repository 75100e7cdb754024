"""Show versions, devices, attention backends, methods, models and optional parts of this installation."""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import psutil
import torch

from diffusion_attn import processors
from diffusion_attn.cli.backends import working_backends
from diffusion_attn.cli.method_options import describe, read_docstring
from diffusion_attn.cli.quiet import silence
from diffusion_attn.methods import METHODS
from diffusion_attn.shapes.models import FOLDER, available
from diffusion_attn.version import __version__

_REQUIRED = ("torch", "diffusers", "transformers", "accelerate")
_AT_THE_TOP = ("version", "python", "packages")  # of the text
_SELF = "diffusion-attn"
_FOR_DEVELOPERS = ("test", "dev")  # extras
# Packages that belong to no extra, and are used where they are.
_OPTIONAL = (
    "peft",
    "xformers",
    "flash-attn",
    "sageattention",
    "kernels",
    "triton",
)


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn info``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Any) -> int:
    """Print what is installed; returns the exit code."""
    facts = gather()
    print(json.dumps(facts, indent=2) if args.json else _as_text(facts))
    return 0


def gather() -> dict[str, Any]:
    """Everything that the command shows, ready for JSON.

    ``packages`` and ``optional_packages`` map names to versions, ``None`` for what is missing; ``model_families`` and
    ``methods`` map names to a line about them; ``optional_parts`` maps each extra to what is there of it, and how to
    get the rest; ``embedded_weights`` go with embedded models.
    """
    with silence():
        backends = working_backends()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _REQUIRED},
        "devices": _devices(),
        "attention_backends": backends,
        "methods": {name: describe(method) for name, method in METHODS.items()},
        "model_families": _families(),
        "embedded_models": available(),
        "embedded_weights": sorted({path.name for path in FOLDER.iterdir() if path.is_dir()} - {*available()}),
        "optional_parts": _parts(),
        "optional_packages": {name: _version(name) for name in _OPTIONAL},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _parts() -> dict[str, str]:
    """The extras that users install, each with its packages' versions."""
    parts: dict[str, dict[str, str | None]] = {}
    for requirement in requires(_SELF) or ():
        found = re.match(r"""([\w.-]+).*;.*extra == ["'](\w+)["']""", requirement)
        if found and found[2] not in _FOR_DEVELOPERS:
            parts.setdefault(found[2], {})[found[1]] = _version(found[1])
    return {part: _told(part, packages) for part, packages in parts.items()}


def _told(part: str, packages: dict[str, str | None]) -> str:
    there = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    missing = ", ".join(name for name, number in packages.items() if not number)
    remedy = f"missing: {missing} (pip install {_SELF}[{part}])" if missing else ""
    return "; ".join(filter(None, (there, remedy)))


def _devices() -> dict[str, str]:
    """Device names as ``--device`` takes them, the default first, each with a description."""
    devices = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    memory = psutil.virtual_memory().total / 2**30
    devices["cpu"] = f"{platform.machine()}, {torch.get_num_threads()} threads, {memory:.0f} GiB"
    return devices


def _families() -> dict[str, str]:
    """There is one file of processors for each family."""
    names = [module.name for module in pkgutil.iter_modules(processors.__path__) if not module.name.startswith("_")]
    return {name: read_docstring(importlib.import_module(f"{processors.__name__}.{name}"))[0] for name in names}


def _as_text(facts: dict[str, Any]) -> str:
    lines = [f"diffusion-attn {facts['version']}", f"python {facts['python']}"]
    lines += [f"{name} {number}" for name, number in facts["packages"].items()]
    for key, entries in facts.items():
        if key in _AT_THE_TOP:
            continue
        lines += ["", f"{key.replace('_', ' ')}:"]
        if isinstance(entries, dict):
            width = max(map(len, entries), default=0)
            lines += [f"  {name.ljust(width)}  {text or 'missing'}" for name, text in entries.items()]
        else:
            lines += [f"  {name}" for name in entries] or ["  none"]
    return "\n".join(lines)
