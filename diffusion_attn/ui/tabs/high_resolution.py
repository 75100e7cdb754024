"""The tab that draws or enlarges a picture stage by stage, each a larger one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_attn.cli import files, generate, ladder, oracle, upscale
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
from diffusion_attn.ui.previews import by_step
from diffusion_attn.ui.studio import Studio

TITLE = "High resolution"
_PROMPT = "What to draw, or what the picture shows"


def add_tab(studio: Studio, model: Any) -> None:
    """Add the tab; ``model`` is the page's choice of models."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(PROMPTS[0], label=_PROMPT, lines=2)
            picture = gr.Image(
                type="filepath",
                label="A picture to enlarge; without one, it is drawn",
                height=210,
                sources=["upload", "clipboard"],
            )
            rule = gr.Dropdown(list(ladder.PRESETS), value="auto", label="Ladder", info="how a picture grows")
            chooser = MethodChooser()
            options = RunOptions("256")
            strength = gr.Slider(0, 1, 0, step=0.05, label="Strength", info="of larger stages; 0: as the ladder says")
        with gr.Column(scale=3, min_width=300):
            buttons = run_and_cancel("Draw")
            stages = gr.Gallery(
                label="Stages",
                columns=3,
                fit_columns=False,
                height=270,
                object_fit="contain",
                interactive=False,
                buttons=["download"],
            )
            result = shown_picture("Result", 512)
            words = gr.Markdown()
    command = command_line_box()
    status = buttons[2]

    def draw(job: Job, *values: Any) -> Iterator[dict[Any, Any]]:
        model_, prompt_, picture_, rule_, strength_, *rest = values
        asked = {"model": model_, **options.read(rest[: len(options.inputs)], studio), "ladder": rule_}
        asked |= {"strength": strength_ or None, **chooser.read(rest[len(options.inputs) :])}
        request: Any
        if picture_:
            asked["prompt"] = prompt_
            request = upscale.read_request(studio.arguments(upscale, image=[picture_], **asked))
            studio.check_limits(request.sizes[0], None)
            request.args.image = [Path(picture_).name]  # which is all that a picture's settings have to tell
            line = command_line("upscale", request.args.image, asked)
        else:
            prompts = [filled(prompt_, _PROMPT)]
            request = read_request(studio.arguments(generate, prompt=prompts, **asked))
            line = command_line("generate", prompts, asked)
        yield {status: "Loading the model.", command: None, stages: None, result: None, words: ""}

        def work() -> dict[Any, Any]:
            pipe = studio.load(model_)
            watch = _Watch(job, status, stages)
            with job.watching(pipe):
                if picture_:
                    files.prepare_folder(Path(request.args.output))
                    studio.check_run(pipe, request.args, request.sizes[0])
                    [(path, record, _)] = upscale.enlarge(pipe, request, **watch.call(pipe))
                else:
                    made = generate.prepare(request, pipe)
                    studio.check_limits(made.size, made.settings["steps"])
                    [methods] = made.variants.values()
                    [(text, number)] = request.pictures
                    _, record = generate.draw(made, methods, 0, text, number, **watch.call(pipe))
                    path = request.output / record["file"]
            return {
                result: str(path),
                words: _words(record),
                options.seed: record["seed"],
                command: line,
            }

        yield from job.run(work)

    connect(
        studio,
        TITLE,
        buttons,
        draw,
        [model, prompt, picture, rule, strength, *options.inputs, *chooser.inputs],
        [stages, result, words, options.seed, command],
    )


class _Watch:
    """Tells of the stages and steps of a run."""

    def __init__(self, job: Job, status: Any, stages: Any) -> None:
        self.job, self.status, self.stages = job, status, stages
        self.finished: list[tuple[str, str]] = []
        self.steps = 0

    def call(self, pipe: Any) -> dict[str, Any]:
        """The arguments of the run that let it be watched."""
        return {"callback_on_stage_end": self.stage, **by_step(pipe, self.step)}

    def step(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.steps += 1
        self.job.tell({self.status: f"stage {len(self.finished) + 1}: step {self.steps}"})
        return kwargs

    def stage(self, done: Any) -> None:
        self.steps = 0
        stage, methods = done.stage, "+".join(done.methods) or "plain"
        caption = f"{stage.width}x{stage.height}, {methods}"
        self.finished.append((str(done.files[0]), caption))
        self.job.tell({self.stages: list(self.finished), self.status: f"stage {len(self.finished)} is done"})


def _words(record: dict[str, Any]) -> str:
    count = len(record["stages"])
    seconds = sum(stage["seconds"] for stage in record["stages"])
    lines = [f"{seconds:.1f} s in {count} stage{'s' if count > 1 else ''}"]
    judged = record["oracle"]
    return "  \n".join([*lines, *([oracle.in_words(judged["judgement"])] if judged else [])])
