"""Open a page in the browser that makes, enlarges, edits and compares pictures, and shows what words attend to."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusion_attn.cli import files
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import DTYPES, check_numbers

_LOCAL = "127.0.0.1"


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn ui``."""
    add = parser.add_argument
    add(
        "--output", type=str, default="outputs/ui", metavar="DIR", help="folder of all pictures, one in it for each run"
    )
    add("--folder", nargs="+", action="extend", default=[], metavar="DIR", help="diffusers folders the page may load")
    add("--host", type=str, default=_LOCAL, help=f"address; by default {_LOCAL}, which no other machine can reach")
    add("--port", type=int, help="by default the first from 7860 on that is free")
    add("--share", action="store_true", help="a public address for 72 hours, by way of gradio's servers")
    add("--no-browser", action="store_true", help="do not open the page")
    add("--max-side", type=int, default=2048, metavar="N", help="pixels of a picture's longer side, at most")
    add("--max-steps", type=int, default=100, metavar="N", help="denoising steps, at most")
    add("--dtype", choices=list(DTYPES), help="of the weights; by default float16 on CUDA, float32 elsewhere")
    add("--device", type=str, help="for example cpu, cuda, cuda:1, mps; by default the best there is")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Serve the page until it is interrupted.

    Raises:
        CommandError: gradio is not installed, or an argument is not what it should be.
    """
    if find_spec("gradio") is None:
        raise CommandError("the page needs gradio, which is not installed; pip install 'diffusion-attn[ui]'.")
    check_numbers(args, {"max_side": 1, "max_steps": 1, "port": 1})
    for folder in args.folder:
        if not (Path(folder).expanduser() / "model_index.json").is_file():
            raise CommandError(
                f"--folder {folder!r} is no diffusers pipeline; give folders that save_pretrained wrote."
            )
    _check_address(args.host, args.port)
    output = Path(args.output).expanduser()
    files.prepare_folder(output)
    with silence():
        from diffusion_attn.ui.studio import Studio

        studio = Studio(output, args.folder, args.device, args.dtype, args.max_side, args.max_steps)

        from diffusion_attn.ui.page import launch  # loads all the rest
    launch(studio, args.host, args.port, share=args.share, inbrowser=not args.no_browser, quiet=args.quiet)
    return 0


def _check_address(host: str, port: int | None) -> None:
    """Refuse an address before anything is loaded, where gradio would try a hundred ports.

    Raises:
        CommandError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port or 0), family=family).close()
    except (OSError, OverflowError) as error:
        where = f"--host {host}" + (f" --port {port}" if port else "")
        raise CommandError(f"{where}: the page cannot be there ({error}); give another, or leave them out.") from error
