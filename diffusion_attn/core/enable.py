"""The two verbs: `enable` puts methods in force on a pipeline or denoiser, `disable` takes them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.context import Schedule
from diffusion_attn.core.errors import MethodConflictError, UnsupportedModelError
from diffusion_attn.core.method import Method, Target
from diffusion_attn.core.session import Session, check_conflicts


@dataclass(frozen=True)
class EnableReport:
    """What `enable` touched; its text is a summary.

    Attributes:
        layers: name of each method -> names of the modules that it works on.
        notes: name of each method -> what it has to say about that.
    """

    layers: dict[str, list[str]]
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for name, layers in self.layers.items():
            lines += [f"{name}: {len(layers)} layers", *(f"  {note}" for note in self.notes.get(name, ()))]
        return "\n".join(lines)


def enable(target: Any, *methods: Method, timesteps: torch.Tensor | None = None) -> EnableReport:
    """Put ``methods`` in force on the denoiser of ``target``.

    Everything is checked before anything is changed. A method that is enabled already is replaced by the new one. What
    is enabled belongs to the denoiser, so it shows on every pipeline that shares it.

    Args:
        target: a diffusers pipeline, or its denoiser (``pipe.unet``), compiled or not, offloaded or not.
        methods: what to enable, for example ``HiDiffusion()``.
        timesteps: the run's schedule, a 1-D tensor, noisiest first, for a denoiser that runs without a pipeline. With a
            pipeline its scheduler is read at every call.

    Returns:
        What was touched.

    Raises:
        UnsupportedModelError: a method does not serve this model.
        MethodConflictError: two methods claim the same layers.
        TypeError, ValueError: the arguments are not what they should be.
    """
    pipeline, denoiser = resolve(target)
    _check_methods(methods)
    session = Session.of(denoiser)
    schedule = session.schedule if session else None
    if pipeline is not None or timesteps is not None:
        schedule = Schedule(pipeline, timesteps)
    planned = Target(denoiser, pipeline, schedule is not None)
    plans = {method.name: method.plan(planned) for method in methods}
    for name, plan in plans.items():
        if not plan.layers:
            raise UnsupportedModelError(
                f"{name!r} found no layer to work on in {type(denoiser).__name__}; give a model of a family it serves."
            )
    kept = {name: on.plan for name, on in session.enabled.items()} if session else {}
    check_conflicts({**kept, **plans})

    session = session or Session(denoiser)
    previous = dict(session.enabled), session.schedule
    try:
        for method in methods:
            if method.name in session.enabled:
                session.remove(method.name)
            session.install(method, plans[method.name])
        session.schedule = schedule
    except BaseException:
        _restore(session, *previous)
        raise
    _forget_compiled(target)
    notes = {name: plan.notes for name, plan in plans.items() if plan.notes}
    return EnableReport({name: plan.layers for name, plan in plans.items()}, notes)


def disable(target: Any, *names: str) -> None:
    """Take methods back, by name, or all of them without names; the denoiser is then bit for bit what it was.

    Raises:
        ValueError: a name is not enabled.
    """
    _, denoiser = resolve(target)
    session = Session.of(denoiser)
    on = list(session.enabled) if session else []
    for name in names:
        if name not in on:
            raise ValueError(f"{name!r} is not enabled on this {type(denoiser).__name__}; enabled: {on or 'nothing'}.")
    if session is None:
        return
    for name in names or on:
        session.remove(name)
    session.close_if_empty()
    _forget_compiled(target)


def enabled(target: Any) -> list[Method]:
    """The methods in force on ``target``, in the order in which they were enabled."""
    session = Session.of(resolve(target)[1])
    return [on.method for on in session.enabled.values()] if session else []


@contextmanager
def using(target: Any, *methods: Method, timesteps: torch.Tensor | None = None) -> Iterator[EnableReport]:
    """`enable` for one block of code; afterwards exactly what was enabled before is enabled again."""
    _, denoiser = resolve(target)
    session = Session.of(denoiser)
    previous = (dict(session.enabled), session.schedule) if session else ({}, None)
    report = enable(target, *methods, timesteps=timesteps)
    try:
        yield report
    finally:
        if session := Session.of(denoiser):
            _restore(session, *previous)
            _forget_compiled(target)


def resolve(target: Any) -> tuple[Any, nn.Module]:
    """The pipeline (or ``None``) and the denoiser behind ``target``, taken out of any ``torch.compile`` wrapper.

    Raises:
        UnsupportedModelError: ``target`` is neither.
    """
    from diffusers import DiffusionPipeline

    pipeline = target if isinstance(target, DiffusionPipeline) else None
    denoiser = _outer_denoiser(target)
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    if not isinstance(denoiser, nn.Module):
        raise UnsupportedModelError(
            f"target is a {type(target).__name__} without a denoiser; give a diffusers pipeline that has a `unet` or "
            "`transformer`, or that module itself."
        )
    return pipeline, denoiser


def _outer_denoiser(target: Any) -> Any:
    """The denoiser of ``target`` as it is called, with its ``torch.compile`` wrapper if it has one."""
    from diffusers import DiffusionPipeline

    if not isinstance(target, DiffusionPipeline):
        return target
    unet = getattr(target, "unet", None)
    return unet if unet is not None else getattr(target, "transformer", None)


def _check_methods(methods: tuple[Any, ...]) -> None:
    if not methods:
        raise ValueError("no method given; name what to enable, for example enable(pipe, HiDiffusion()).")
    for method in methods:
        if isinstance(method, type) or not isinstance(method, Method):
            raise TypeError(f"{method!r} is not a method; give an instance, for example HiDiffusion().")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise MethodConflictError(f"{name!r} is given {names.count(name)} times in one call; give it once.")


def _restore(session: Session, previous: dict, schedule: Schedule | None) -> None:
    for name, on in list(session.enabled.items()):
        if previous.get(name) is not on:
            session.remove(name)
    for name, on in previous.items():
        if name not in session.enabled:
            session.install(on.method, on.plan)
    session.enabled = {name: session.enabled[name] for name in previous}
    session.schedule = schedule
    session.close_if_empty()


def _forget_compiled(target: Any) -> None:
    """Compiled code does not notice hooks that come or go (dynamo does not guard them): have it traced again."""
    if _is_compiled(_outer_denoiser(target)):
        torch.compiler.reset()


@contextmanager
def eager(denoiser: nn.Module) -> Iterator[None]:
    """Run compiled code of ``denoiser`` as plain Python for a block of code, then as compiled again."""
    if not _is_compiled(denoiser):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _is_compiled(denoiser: nn.Module) -> bool:
    """Whether it, or a block of it, is called through ``torch.compile``."""
    wrapped = (
        getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in denoiser.modules()
    )
    return any(wrapped)
