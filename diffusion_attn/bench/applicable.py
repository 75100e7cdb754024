"""Which methods serve a pipeline as they are, and why others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diffusion_attn.core.enable import using
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.method import Method
from diffusion_attn.methods import METHODS


def applicable_methods(
    pipe: Any, methods: Iterable[str] | Mapping[str, Method | Callable[[Any], Method]] = tuple(METHODS)
) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods that serve a pipeline, and why others do not.

    Args:
        pipe: a diffusers pipeline; it is left as it is.
        methods: names of the registry, for the default options and, where a method has weights, those that belong to
            the model: embedded ones, or published ones, which are downloaded. Or methods by name, or functions that
            make them of the pipeline.

    Returns:
        Methods by name, and a line about each that does not serve.
    """
    makers = methods if isinstance(methods, Mapping) else {name: _by_default(METHODS[name]) for name in methods}
    serving: dict[str, Method] = {}
    others: dict[str, str] = {}
    for name, maker in makers.items():
        try:
            method = maker if isinstance(maker, Method) else maker(pipe)
            with using(pipe, method):
                serving[name] = method
        except DiffusionAttnError as error:
            others[name] = " ".join(str(error).split())
    return serving, others


def _by_default(kind: Any) -> Callable[[Any], Method]:
    return kind.for_pipeline if hasattr(kind, "for_pipeline") else lambda pipe: kind()
