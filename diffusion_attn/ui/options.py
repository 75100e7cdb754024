"""Widgets for the options of methods, drawn from their dataclasses."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from diffusion_attn.cli.method_options import command_line_type, describe, read_docstring
from diffusion_attn.methods import METHODS

NONE = "none"
"""The choice of no method."""


@dataclass(frozen=True)
class Option:
    """A widget, and the field of a method that it stands for."""

    method: str
    field: str
    default: Any
    widget: Any


class MethodChooser:
    """A choice of methods; below it, the options of the one that is chosen."""

    def __init__(self, chosen: str = NONE) -> None:
        self.method = gr.Dropdown([NONE, *METHODS], value=chosen, label="Method")
        idea = gr.Markdown(_idea(chosen), elem_classes="idea")
        self._groups: dict[str, Any] = {}
        self.options: list[Option] = []
        with gr.Accordion("Options of the method", open=False, visible=chosen != NONE) as accordion:
            for name in METHODS:
                with gr.Column(visible=name == chosen) as self._groups[name]:
                    self.options += _widgets(name)

        def show(name: str) -> list[Any]:
            """What is seen with the method of a name."""
            groups = [gr.Column(visible=name == each) for each in self._groups]
            return [_idea(name), gr.Accordion(visible=name != NONE), *groups]

        self.method.change(
            show, self.method, [idea, accordion, *self._groups.values()], queue=False, api_visibility="private"
        )

    @property
    def inputs(self) -> list[Any]:
        """What a handler takes; `read` reads it."""
        return [self.method, *(option.widget for option in self.options)]

    def read(self, values: list[Any]) -> dict[str, Any]:
        """What ``values`` of the `inputs` come to as arguments of a command: the method, and options given to it."""
        name, *rest = values
        if name == NONE:
            return {"method": []}
        given = {
            option.field: value
            for option, value in zip(self.options, rest, strict=True)
            if option.method == name and value not in (None, "", option.default)
        }
        return {"method": [name], **({name: given} if given else {})}


def _idea(name: str) -> str:
    return "The plain model." if name == NONE else describe(METHODS[name])


def _widgets(name: str) -> Iterator[Option]:
    method = METHODS[name]
    docs = {key: text for base in reversed(method.__mro__) for key, text in read_docstring(base)[1].items()}
    hints = typing.get_type_hints(method)
    for field in dataclasses.fields(method):
        kind = command_line_type(hints[field.name])
        if kind is not None and field.metadata.get("option", True):
            yield Option(
                name, field.name, field.default, _widget(field.name, kind, field.default, docs.get(field.name))
            )


def _widget(name: str, kind: Any, default: Any, text: str | None) -> Any:
    label = name.replace("_", " ")
    if kind is bool:
        return gr.Checkbox(default, label=label, info=text)
    if typing.get_origin(kind) is Literal:
        return gr.Dropdown(list(typing.get_args(kind)), value=default, label=label, info=text)
    if kind in (int, float):
        return gr.Number(default, label=label, info=text, precision=0 if kind is int else None)
    optional = type(None) in typing.get_args(kind) and isinstance(kind, types.UnionType)
    empty = "the method decides" if optional and default is None else json.dumps(default)
    return gr.Textbox("", label=label, info=text, placeholder=empty)
