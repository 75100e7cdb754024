"""The tab that draws a picture and shows what each word of its prompt attends to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from diffusion_attn.cli import attention_map, files
from diffusion_attn.editing import AttentionMaps
from diffusion_attn.ui.jobs import Job
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

TITLE = "Attention"
_ALL = "all levels"
_KEEP = 1800  # seconds, for the maps take memory
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Recorded:
    """A picture and its maps, which a visitor looks at."""

    maps: AttentionMaps
    words: list[str]
    picture: Image.Image
    folder: Path
    settings: dict[str, Any]

    def level(self, name: str) -> AttentionMaps:
        """The maps of one level, or of all."""
        return next((maps for factor, maps in self.maps.levels.items() if _name(factor) == name), self.maps)


def add_tab(studio: Studio, model: Any) -> None:
    """Add the tab; ``model`` is the page's choice of models."""
    recorded = gr.State(None, time_to_live=_KEEP)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(PROMPTS[0], label="What to draw", lines=2)
            options = RunOptions()
        with gr.Column(scale=3, min_width=300):
            buttons = run_and_cancel("Draw and look")
            word = gr.Radio([], label="Word", info="click one to see what it looks at", elem_classes="words")
            with gr.Row():
                step = gr.Slider(0, 1, 0, step=1, label="Step", info="0: the mean of all steps", min_width=150)
                level = gr.Dropdown([_ALL], value=_ALL, label="Level", info="of the denoiser", min_width=150)
            with gr.Row():
                image, heat = shown_picture("Picture"), shown_picture("Heat map")
    command = command_line_box()
    status = buttons[2]

    def draw(job: Job, *values: Any) -> Iterator[dict[Any, Any]]:
        model_, prompt_, *rest = values
        prompt_ = " ".join(filled(prompt_, "What to draw").split())
        asked = {"model": model_, **options.read(rest, studio)}
        args = studio.arguments(attention_map, prompt=prompt_, **asked)
        request = attention_map.read_request(args)
        yield {status: "Loading the model.", command: None, image: None, heat: None, recorded: None}

        def work() -> dict[Any, Any]:
            pipe = studio.load(model_)
            made = attention_map.prepare(pipe, request)
            studio.check_limits(tuple(made["size"]), made["steps"])

            def tell(done: int, picture: Any) -> None:
                job.tell({status: f"step {done} of {made['steps']}", **({image: picture} if picture else {})})

            watch = by_step(pipe, Previews(tuple(made["size"]), tell))
            with job.watching(pipe):
                picture, maps = attention_map.draw(pipe, request, made, levels=True, **watch)
            folder = Path(args.output)
            files.prepare_folder(folder)
            files.save_png(folder / "picture.png", picture, made)
            seen = Recorded(maps, request.words, picture, folder, made)
            first = next((word for word in request.words if word.lower() not in _ARTICLES), request.words[0])
            levels = [_ALL, *map(_name, maps.levels)]
            return {
                recorded: seen,
                image: str(folder / "picture.png"),
                heat: show(seen, first, 0, _ALL),
                word: gr.Radio(request.words, value=first),
                step: gr.Slider(maximum=maps.steps, value=0),
                level: gr.Dropdown(levels, value=_ALL),
                options.seed: made["seed"],
                command: command_line("attention-map", [prompt_], asked),
            }

        yield from job.run(work)

    def show(seen: Recorded | None, word_: str | None, step_: int, level_: str) -> str | None:
        """The file of a heat map."""
        if seen is None or word_ is None:
            return None
        one = seen.level(level_)
        which = int(step_) - 1 if step_ and step_ <= one.steps else None
        number = seen.words.index(word_)
        path = seen.folder / f"{number:02d}-{files.slug(word_)}-{files.slug(level_)}-step{int(step_)}.png"
        settings = {**seen.settings, "word": word_, "step": step_ or "all", "level": level_}
        times = max(1, 512 // max(seen.picture.size))  # of a small picture, so that the map on it is smooth
        larger = seen.picture.resize((seen.picture.width * times, seen.picture.height * times))
        files.save_png(path, one.heatmap(word_, step=which, over=larger), settings)
        return str(path)

    # One after the other, since equal files of two would be copied to one place while the first is read.
    quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    for choice in (word, step, level):
        choice.input(show, [recorded, word, step, level], heat, concurrency_id="maps", concurrency_limit=1, **quick)
    connect(
        studio,
        TITLE,
        buttons,
        draw,
        [model, prompt, *options.inputs],
        [recorded, image, heat, word, step, level, options.seed, command],
    )


def _name(factor: int) -> str:
    return "as fine as the latent" if factor == 1 else f"{factor} times coarser than the latent"
