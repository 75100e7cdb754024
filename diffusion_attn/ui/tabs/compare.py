"""The tab that measures methods beside the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_attn.bench.table import bench_table, notes
from diffusion_attn.cli import bench, files
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.methods import METHODS
from diffusion_attn.ui.jobs import Job
from diffusion_attn.ui.parts import command_line_box, connect, run_and_cancel, shown_picture, whole, words_of
from diffusion_attn.ui.studio import Studio

TITLE = "Compare"
_MOST = 20


def add_tab(studio: Studio, model: Any) -> None:
    """Add the tab; ``model`` is the page's choice of models."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.Markdown("Time, memory and pictures of every method beside the plain model, measured on this machine.")
            methods = gr.CheckboxGroup(list(METHODS), value=list(METHODS), label="Methods", info="those that apply run")
            sizes = gr.Textbox("64 128", label="Sizes", info="pixels, such as 64 128 or 192x128")
            with gr.Row():
                repeats = gr.Number(3, label="Rounds", info="that are timed", min_width=120)
                quality = gr.Number(2, label="Pictures", info="drawn by each", min_width=120)
                steps = gr.Number(10, label="Steps", info="of each run", min_width=120)
        with gr.Column(scale=3, min_width=300):
            buttons = run_and_cancel("Measure")
            picture = shown_picture("Plot", 300)
            numbers = gr.Markdown(elem_classes="numbers")
            download = gr.DownloadButton("Numbers as JSON", visible=False, size="sm")
    command = command_line_box()
    status = buttons[2]

    def measure(job: Job, *values: Any) -> Iterator[dict[Any, Any]]:
        model_, methods_, sizes_, repeats_, quality_, steps_ = values
        asked = {
            "model": model_,
            "methods": list(methods_),
            "sizes": words_of(sizes_),
            "repeats": whole(repeats_, "rounds"),
            "quality": whole(quality_, "pictures"),
            "steps": whole(steps_, "steps"),
        }
        if not methods_:
            raise CommandError("no method is chosen; tick one at least.")
        if set(methods_) == set(METHODS):
            asked["methods"] = ["all"]  # of which those that do not apply are left out
        request = bench.read_request(studio.arguments(bench, **asked))
        for name, number in (
            ("sizes", len(request.sizes)),
            *((name, asked[name] or 0) for name in ("repeats", "quality")),
        ):
            if number > _MOST:
                raise CommandError(f"{number} {name} are too many for this page; ask for {_MOST} at most.")
        for size in request.sizes:
            studio.check_limits(size, asked["steps"])
        path = Path(request.args.output) / bench.file_name(model_, studio.device, studio.dtype)
        yield {status: "Loading the model.", command: None, picture: None, numbers: "", download: gr.skip()}

        def progress(done: int, total: int, what: str) -> None:
            job.tell({status: f"{done} of {total}: {what}"})

        def keep(result: dict[str, Any]) -> None:
            drawn = bench.save_plot(result, path.with_suffix(".png"))
            job.tell({numbers: bench_table(result), picture: str(drawn[0]) if drawn else None})

        def work() -> dict[Any, Any]:
            pipe = studio.load(model_)
            files.prepare_folder(path.parent)
            studio.check_run(pipe, request.args, request.sizes[0] if request.sizes else None)
            with job.watching(pipe):
                result = bench.measure(pipe, request, path, progress=progress, keep=keep)
            drawn = bench.save_plot(result, path.with_suffix(".png"))
            return {
                numbers: "\n\n".join([bench_table(result), *notes(result)]),
                picture: str(drawn[0]) if drawn else None,
                download: gr.DownloadButton(value=str(path), visible=True),
                command: result["commands"][-1],
            }

        yield from job.run(work)

    connect(
        studio,
        TITLE,
        buttons,
        measure,
        [model, methods, sizes, repeats, quality, steps],
        [picture, numbers, download, command],
    )
