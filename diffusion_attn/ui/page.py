"""The page: the choice of a model, and the tabs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from diffusion_attn.ui.studio import Studio
from diffusion_attn.ui.tabs import attention, compare, edit, generate, high_resolution
from diffusion_attn.version import __version__

TABS = (generate, high_resolution, edit, attention, compare)
_CSS = """
.gradio-container {max-width: 1280px !important}
.status {min-height: 1.6em}
.status .wrong {color: var(--error-text-color, #b91c1c)}
.shown img {width: 100% !important; height: 100% !important; object-fit: contain}
.numbers {overflow-x: auto}
.numbers th, .numbers td {padding: 4px 6px !important; white-space: nowrap; font-size: 12px}
footer {display: none !important}
"""
_MOST_WAITING = 16
_LARGEST_UPLOAD = "64mb"
_DELETE_UPLOADS = (3600, 86400)  # every hour those older than a day, and all at the end


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    with gr.Blocks(title="diffusion-attn", analytics_enabled=False, delete_cache=_DELETE_UPLOADS) as page:
        with gr.Row():
            gr.Markdown(f"# diffusion-attn\nAttention methods for diffusers pipelines, version {__version__}.")
            model = gr.Dropdown(
                studio.models,
                value=studio.models[0],
                allow_custom_value=True,
                label="Model",
                info="an embedded one, or a Hub id such as stabilityai/stable-diffusion-xl-base-1.0",
            )
        for module in TABS:
            with gr.Tab(module.TITLE):
                module.add_tab(studio, model)
        page.unload(_leaving(studio))
    return page.queue(max_size=_MOST_WAITING, default_concurrency_limit=1, api_open=False)


def _leaving(studio: Studio) -> Any:
    def leave(request: gr.Request) -> None:
        studio.leave(request.session_hash)

    return leave


def launch(studio: Studio, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> Any:
    """Serve the page of a studio.

    Args:
        host, port: where; ``None``: the first port from 7860 on that is free.
        options: further ones of ``gradio.Blocks.launch``, such as ``share=True`` or ``prevent_thread_lock=True``.

    Returns:
        What ``launch`` returns: application, local address, public address.

    Raises:
        OSError: the port is taken.
    """
    studio.output.mkdir(parents=True, exist_ok=True)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return build(studio).launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=_CSS,
        allowed_paths=[str(studio.output)],
        max_file_size=_LARGEST_UPLOAD,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        **{"share": False, "quiet": True, **options},
    )
