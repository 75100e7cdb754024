"""What the tabs share: the options of a run, how work is begun, stopped and told of, and what is typed for the same."""

from __future__ import annotations

import html
import math
import random
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from diffusion_attn.cli.errors import CommandError, sentence
from diffusion_attn.cli.method_options import typed
from diffusion_attn.cli.request import parse_size
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.ui.jobs import Cancelled
from diffusion_attn.ui.studio import Studio, is_given

READY = "Ready."
CANCELLED = "Cancelled."
REFUSED = "That was refused before it began: a picture or a value cannot be read, or too many runs are waiting."
PROMPTS = (
    "a large red star above a blue ring on a white background",
    "a small green circle left of a large purple cross on a yellow background",
    "a large orange triangle on a black background",
)


class RunOptions:
    """Widgets for the size of a picture, its seed, steps and guidance.

    Args:
        size: in pixels, to begin with; empty for the model's native size.
        new_seeds: whether a new seed can be asked for each time.
    """

    def __init__(self, size: str = "", new_seeds: bool = True) -> None:
        with gr.Row():
            self.size = gr.Textbox(
                size, label="Size", placeholder="native", info="128 or 192x128 pixels", min_width=120
            )
            self.seed = gr.Number(0, label="Seed", info="of the noise", precision=0, min_width=120)
        self.new_seed = gr.Checkbox(False, label="a new seed each time", visible=new_seeds)
        with gr.Accordion("Steps and guidance", open=False), gr.Row():
            self.steps = number_field("Steps", "what the model recommends")
            self.guidance = number_field("Guidance", "what the model recommends")

    @property
    def inputs(self) -> list[Any]:
        """What a handler takes; `read` reads it."""
        return [self.size, self.seed, self.new_seed, self.steps, self.guidance]

    def read(self, values: Sequence[Any], studio: Studio) -> dict[str, Any]:
        """What ``values`` of the `inputs` come to as arguments of a command.

        Raises:
            CommandError: one is not what it should be, or beyond the limits of the page.
        """
        size, seed, new, steps, guidance = values
        size = (size or "").strip()
        steps = whole(number(steps, "Steps"), "steps")
        studio.check_limits(parse_size(size) if size else None, steps)
        seed = random.randrange(2**31) if new else whole(seed, "the seed") or 0
        return {"size": size, "steps": steps, "guidance": number(guidance, "Guidance"), "seed": seed}


def number_field(label: str, empty: str) -> Any:
    """A field for a number that may be left out; `number` reads it. A Number would fill itself with zero.

    Args:
        empty: what holds then.
    """
    return gr.Textbox("", label=label, placeholder=empty, min_width=120)


def number(text: str | None, label: str) -> float | None:
    """The number in a field; ``None`` if it is empty.

    Raises:
        CommandError: it is no number.
    """
    if not text or not text.strip():
        return None
    try:
        return float(text)
    except ValueError as error:
        raise CommandError(f"{label!r} is {text!r}; give a number, or leave it empty.") from error


def whole(value: float | None, name: str) -> int | None:
    """A number from a widget as an int; ``None`` for none.

    Raises:
        CommandError: it is no whole number.
    """
    if value is None:
        return None
    if not math.isfinite(value) or value != int(value):
        raise CommandError(f"{name} is {value}; give a whole number.")
    return int(value)


def filled(value: str | None, label: str) -> str:
    """What stands in the field with a label.

    Raises:
        CommandError: nothing.
    """
    if not value or not value.strip():
        raise CommandError(f"{label!r} is empty; fill it in, or take an example.")
    return value


def words_of(text: str | None) -> list[str]:
    """The words in a field for several."""
    return re.split(r"[\s,]+", text.strip()) if text and text.strip() else []


def command_line(command: str, positional: Sequence[str], options: Mapping[str, Any]) -> str:
    """What is typed in a terminal for what was asked for on the page; options that are empty are left out."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, Mapping):
            for option, each in value.items():
                words += [f"{flag}.{option}", typed(each)]
        elif isinstance(value, list):
            words += [flag, *map(str, value)] if value else []
        elif is_given(value):
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    # Words that begin with a dash are options to a parser, except after two dashes.
    dashed = any(word.startswith("-") for word in positional)
    words = [*words, "--", *positional] if dashed else [*positional, *words]
    return shlex.join(["diffusion-attn", command, *words])


def command_line_box() -> Any:
    """Where that is shown."""
    return gr.Textbox(label="The same on the command line", interactive=False, lines=1, max_lines=4, buttons=["copy"])


def shown_picture(label: str, height: int = 320) -> Any:
    """A place for a picture that was made, to look at and to download."""
    return gr.Image(
        type="filepath",
        label=label,
        interactive=False,
        height=height,
        min_width=200,
        buttons=["download", "fullscreen"],
        elem_classes="shown",
    )


def tell(error: BaseException) -> str:
    """What a visitor is told of an error, in one sentence: options are fields here, and uploads have no folder."""
    if not isinstance(error, (DiffusionAttnError, ValueError, OSError)):
        traceback.print_exception(error, file=sys.stderr)
    text = re.sub(r"(?<![\w-])--(?!folder|max-)(?=[a-z])", "", sentence(error))
    text = re.sub(rf"{re.escape(get_upload_folder())}/\w+/", "", text)
    text = text.replace("; see help.", ".")
    return text.replace("; add debug to see where it comes from", "; the terminal shows where it comes from")


def status_line(text: str, wrong: bool = False) -> str:
    """The line that tells how far it is, as HTML."""
    return f'<div class="{"wrong" if wrong else ""}" role="status">{html.escape(text)}</div>'


Buttons = tuple[Any, Any, Any]


def run_and_cancel(what: str) -> Buttons:
    """The button that begins, the one that stops, and the line that tells how far it is."""
    with gr.Row():
        run = gr.Button(what, variant="primary", min_width=120)
        cancel = gr.Button("Cancel", min_width=80)
    return run, cancel, gr.HTML(status_line(READY), elem_classes="status")


def connect(
    studio: Studio,
    tab: str,
    buttons: Buttons,
    handler: Callable[..., Iterator[dict[Any, Any]]],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
) -> None:
    """Let the buttons begin and stop ``handler``.

    Args:
        handler: is called with the `Job` and the values of ``inputs``, and gives values of ``outputs``. All handlers of
            a page wait in one queue, whose jobs run one at a time.
    """
    run, cancel, status = buttons

    def ask(request: gr.Request) -> str:
        try:
            studio.ask(request.session_hash, tab)
        except CommandError as error:
            raise gr.Error(str(error), duration=5, print_exception=False) from error
        return status_line("Waiting for its turn.")

    def told(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        try:
            with studio.job(request.session_hash, tab) as job:
                for update in handler(job, *values):
                    yield {**update, status: status_line(update[status])} if status in update else update
                yield {status: status_line(" ".join(["Done.", *job.notes]))}
        except Cancelled:
            yield {status: status_line(CANCELLED)}
        except Exception as error:
            yield {status: status_line(tell(error), wrong=True)}

    def refused(request: gr.Request) -> Any:
        """Where it fails before `told` is called: gradio could not read a picture or a value, or its queue is full."""
        return status_line(REFUSED, wrong=True) if studio.drop(request.session_hash, tab) else gr.skip()

    def stop(request: gr.Request) -> Any:
        # A job that runs says itself when it has ended, which an answer from here might come after.
        return status_line(CANCELLED) if studio.cancel(request.session_hash, tab) else gr.skip()

    quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    work: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    asked = run.click(ask, None, status, **quick)
    ran = asked.success(told, list(inputs), [*outputs, status], **work, **{**quick, "queue": True})
    ran.failure(refused, None, status, **quick)
    cancel.click(stop, None, status, **quick)
