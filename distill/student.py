"""The student: a method whose weights are trained in place of a part of the teacher."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from diffusion_attn.core.method import Method
from diffusion_attn.distill.config import MethodConfig
from diffusion_attn.methods import METHODS


class Student(Method, Protocol):
    """What distillation asks of a method beyond `Method`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The live tensors that the enabled model computes with."""
        ...

    def attentions(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules, by name, whose outputs are to be the teacher's."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the weights in place."""
        ...

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights in the published format."""
        ...


def build_student(config: MethodConfig, denoiser: nn.Module) -> Student:
    """The student of ``denoiser``, pinned to float32 whatever the teacher runs in: from given weights, else its own.

    Raises:
        DiffusionAttnError: the weights cannot be loaded, or the method does not serve this denoiser.
    """
    method: Any = METHODS[config.name]
    given = {"radius": config.radius, "down_factor": config.down_factor}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if config.weights is not None:
        student = method.from_pretrained(config.weights, **options)
    else:
        if config.mid_divisor > 1:
            options["mid_dim"] = lambda width: max(1, width // config.mid_divisor)
        student = method.for_model(denoiser, **options)
    return dataclasses.replace(student.to(torch.float32), dtype=torch.float32)


class StudentModel(nn.Module):
    """The denoiser and the weights in training as one module, which is what data-parallel wrappers want to see.

    Args:
        denoiser: frozen; the student's method has to be enabled on it when this is called.
        student: whose parameters are trained.
    """

    def __init__(self, denoiser: nn.Module, student: Student) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.trained = nn.ParameterList(student.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The student's prediction for the denoiser's own arguments."""
        return self.denoiser(*args, **kwargs, return_dict=False)[0]
