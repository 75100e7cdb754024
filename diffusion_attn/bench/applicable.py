"""Which methods serve a pipeline as they are, and why others do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusion_attn.core.enable import using
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.method import Method
from diffusion_attn.methods import METHODS


def applicable_methods(pipe: Any, names: Iterable[str] = tuple(METHODS)) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods that serve a pipeline, with their default options, and why others do not.

    Methods with weights get those that belong to the model: embedded ones, or published ones, which are downloaded.

    Args:
        pipe: a diffusers pipeline; it is left as it is.
        names: of the registry.

    Returns:
        Methods by name, and a line about each that does not serve.
    """
    serving: dict[str, Method] = {}
    others: dict[str, str] = {}
    for name in names:
        kind: Any = METHODS[name]
        try:
            method = kind.for_pipeline(pipe) if hasattr(kind, "for_pipeline") else kind()
            with using(pipe, method):
                serving[name] = method
        except DiffusionAttnError as error:
            others[name] = " ".join(str(error).split())
    return serving, others
