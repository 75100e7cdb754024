"""The tab that edits a picture by editing the prompt that describes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from diffusion_attn.cli import edit, files, oracle
from diffusion_attn.cli.quiet import silence
from diffusion_attn.shapes.edits import SceneEdit, scene_edits
from diffusion_attn.ui.jobs import Job
from diffusion_attn.ui.parts import (
    RunOptions,
    command_line,
    command_line_box,
    connect,
    filled,
    number,
    number_field,
    run_and_cancel,
    shown_picture,
    words_of,
)
from diffusion_attn.ui.studio import Studio

TITLE = "Edit"
_PICTURE, _SOURCE, _TARGET = "Picture, cut to the size below", "What the picture shows", "What it is to show"
_METHODS = {
    "direct": "direct: quick, keeps the rest of the picture best",
    "p2p": "p2p: plain inversion, drifts",
    "null-text": "null-text: learns an empty prompt for each step, slow",
    "dpl": "dpl: learns the nouns too, slowest",
    "vimaedit": "vimaedit: without inversion, guided by the picture itself",
}
_EXAMPLES = [example for example in scene_edits(24, seed=1) if example.kind != "reweight"]
_TINT = (255, 0, 160)
_SIDE = 256


def add_tab(studio: Studio, model: Any) -> None:
    """Add the tab; ``model`` is the page's choice of models."""
    turn = itertools.cycle(_EXAMPLES)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = gr.Image(
                type="filepath",
                format="png",
                label=_PICTURE,
                height=240,
                sources=["upload", "clipboard"],
            )
            example = gr.Button("Another drawn example", size="sm")
            before, after = _EXAMPLES[0].prompts
            source = gr.Textbox(before, label=_SOURCE)
            target = gr.Textbox(after, label=_TARGET)
            method = gr.Dropdown([(text, name) for name, text in _METHODS.items()], value="direct", label="Method")
            words = gr.Textbox("", label="Words to learn", info="the nouns of the picture", visible=False)
            mask = gr.Image(
                type="filepath",
                label="Mask: white where it may change",
                height=210,
                visible=False,
                sources=["upload", "clipboard"],
            )
            blend = gr.Textbox(
                _blend(_EXAMPLES[0]),
                label="Change only where",
                info="one word of each prompt, such as circle star; empty: anywhere",
            )
            with gr.Accordion("How far", open=False):
                weights = gr.Textbox("", label="Weights of words", info="such as large=2 red=0.5")
                with gr.Row():
                    cross = number_field("Words follow for", "a share of the steps; the method's own")
                    self_ = number_field("Layout follows for", "a share of the steps; the method's own")
            options = RunOptions(new_seeds=False)
            options.seed.visible = False
        with gr.Column(scale=3, min_width=300):
            buttons = run_and_cancel("Edit")
            slider = gr.ImageSlider(
                type="filepath", label="Before and after", interactive=False, elem_classes="shown", height=400
            )
            with gr.Row():
                result, overlay = shown_picture("Edited", 280), shown_picture("Where it could change", 280)
            verdict = gr.Markdown()
    command = command_line_box()
    status = buttons[2]

    def draw_example() -> tuple[Any, ...]:
        drawn = next(turn)
        return _drawn(drawn), *drawn.prompts, _blend(drawn), " ".join(dict.fromkeys(drawn.words))

    def choose(name: str, text: str, known: str) -> tuple[Any, Any, Any]:
        # Nouns are the last words of what a caption names; a visitor corrects them for other prompts.
        guess = known or (text.split() or [""])[-1]
        direct = name == "vimaedit"  # which draws noise of its own, and takes a mask
        return gr.Textbox(guess, visible=name == "dpl"), gr.Image(visible=direct), gr.Number(visible=direct)

    gr.on(None, lambda: _drawn(_EXAMPLES[0]), None, picture, api_visibility="private", show_progress="hidden")
    quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    next(turn)
    example.click(draw_example, None, [picture, source, target, blend, words], **quick)
    method.change(choose, [method, source, words], [words, mask, options.seed], **quick)

    def run(job: Job, *values: Any) -> Iterator[dict[Any, Any]]:
        model_, picture_, source_, target_, method_, words_, mask_, blend_, weights_, cross_, own, *rest = values
        asked = {
            "source": filled(source_, _SOURCE),
            "target": [filled(target_, _TARGET)],
            "model": model_,
            "method": method_,
            "words": words_of(words_) if method_ == "dpl" else None,
            "mask": mask_ if method_ == "vimaedit" else None,
            "blend": words_of(blend_),
            "weights": words_of(weights_),
            "cross": number(cross_, "Words follow for"),
            "self": number(own, "Layout follows for"),
            **options.read(rest, studio),
        }
        args = studio.arguments(edit, image=filled(picture_, _PICTURE), **asked)
        request = edit.read_request(args)
        # Names are all that a picture's settings have to tell.
        args.image = Path(picture_).name
        if args.mask:
            args.mask = asked["mask"] = Path(args.mask).name
        yield {status: "Loading the model.", command: None, slider: None, result: None, overlay: None, verdict: ""}

        def work() -> dict[Any, Any]:
            pipe = studio.load(model_)
            passes = itertools.count(1)
            with job.watching(pipe, lambda: job.tell({status: f"pass {next(passes)} of the model"})):
                studio.check_run(pipe, args, request.size)
                with silence():
                    edited = edit.perform(pipe, request)
            folder = Path(args.output)
            files.prepare_folder(folder)
            before_path = folder / "before.png"
            mask_path = str(folder / "mask.png") if edited.result.blend_mask is not None else None
            files.save_png(before_path, edited.image, {"image": args.image, "source": source_})
            [(path, record, after_)] = edit.save(edited, folder)
            if mask_path is not None:
                files.save_png(Path(mask_path), tinted(after_, edited.result.blend_mask[0, 0]), edited.settings)
            judged = record["oracle"]
            return {
                slider: (str(before_path), str(path)),
                result: str(path),
                overlay: gr.Image(mask_path, visible=mask_path is not None),
                verdict: oracle.in_words(judged["judgement"]) if judged else "",
                command: command_line("edit", [args.image], asked),
            }

        yield from job.run(work)

    connect(
        studio,
        TITLE,
        buttons,
        run,
        [model, picture, source, target, method, words, mask, blend, weights, cross, self_, *options.inputs],
        [slider, result, overlay, verdict, command],
    )


def tinted(picture: Image.Image, mask: torch.Tensor) -> Image.Image:
    """A picture with a colour laid on where ``mask``, ``(h, w)`` bool, is true."""
    where = Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 128).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, _TINT), picture.convert("RGB"), where)


def _drawn(example: SceneEdit) -> Image.Image:
    return example.image(_SIDE)


def _blend(example: SceneEdit) -> str:
    """The words that name what changes; none where something comes out of nothing."""
    [before], [after] = example.blend_words
    return "" if example.kind == "insert" else f"{before} {after}"
