"""The tab that draws a picture, plain and with a method side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from diffusion_attn.cli import comparison, generate
from diffusion_attn.cli.request import read_request
from diffusion_attn.ui.jobs import Job
from diffusion_attn.ui.options import MethodChooser
from diffusion_attn.ui.parts import (
    PROMPTS,
    RunOptions,
    command_line,
    command_line_box,
    connect,
    filled,
    run_and_cancel,
    shown_picture,
)
from diffusion_attn.ui.previews import Previews, by_step
from diffusion_attn.ui.studio import Studio

TITLE = "Generate"
_EXAMPLES = [(PROMPTS[0], "linfusion", ""), (PROMPTS[1], "hidiffusion", "128"), (PROMPTS[2], "agent", "192x128")]


def add_tab(studio: Studio, model: Any) -> None:
    """Add the tab; ``model`` is the page's choice of models."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(PROMPTS[0], label="What to draw", lines=2, autofocus=True)
            chooser = MethodChooser("linfusion")
            options = RunOptions()
            compare = gr.Checkbox(True, label="draw it without the method too, to compare")
            gr.Examples(
                [list(row) for row in _EXAMPLES],
                [prompt, chooser.method, options.size],
                label="For example",
                api_visibility="private",
            )
        with gr.Column(scale=3, min_width=300):
            buttons = run_and_cancel("Draw")
            shown = []
            with gr.Row():
                for name in ("plain", "with the method"):
                    with gr.Column(min_width=220) as column:
                        shown.append((column, shown_picture(name), gr.Markdown()))
    command = command_line_box()
    status = buttons[2]
    places = dict(zip((True, False), shown, strict=True))

    def draw(job: Job, *values: Any) -> Iterator[dict[Any, Any]]:
        model_, prompt_, compare_, *rest = values
        asked = {"model": model_, **options.read(rest[: len(options.inputs)], studio)}
        asked |= chooser.read(rest[len(options.inputs) :])
        asked["compare"] = bool(compare_ and asked["method"])
        prompts = [filled(prompt_, "What to draw")]
        request = read_request(studio.arguments(generate, prompt=prompts, **asked))
        plain_shown = asked["compare"] or not asked["method"]
        yield {
            status: "Loading the model.",
            command: None,
            **{image: None for _, image, _ in shown},
            **{words: "" for _, _, words in shown},
            places[True][0]: gr.Column(visible=plain_shown),
            places[False][0]: gr.Column(visible=bool(asked["method"])),
        }

        def work() -> dict[Any, Any]:
            pipe = studio.load(model_)
            made = generate.prepare(request, pipe)
            studio.check_limits(made.size, made.settings["steps"])
            last: dict[Any, Any] = {}
            with job.watching(pipe):
                if request.compare:
                    generate.warm_up(made)
                for name, methods in made.variants.items():
                    _, image, words = places[name == "plain"]

                    def tell(done: int, picture: Any, name: str = name, image: Any = image) -> None:
                        text = f"{name}: step {done} of {made.settings['steps']}"
                        job.tell({status: text, **({image: picture} if picture else {})})

                    [(text, number)] = request.pictures
                    watch = by_step(pipe, Previews(made.size, tell))
                    _, record = generate.draw(made, methods, 0, text, number, **watch)
                    last = {
                        image: gr.Image(str(request.output / record["file"]), label=name),
                        words: "  \n".join(comparison.label(record)),
                    }
                    job.tell(last)
            return {**last, options.seed: request.seed, command: line}

        line = command_line("generate", prompts, asked)
        yield from job.run(work)

    connect(
        studio,
        TITLE,
        buttons,
        draw,
        [model, prompt, compare, *options.inputs, *chooser.inputs],
        [*(part for parts in shown for part in parts), options.seed, command],
    )
