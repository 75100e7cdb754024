"""ViMAEdit at the command line: its image adapter, and the CLIP that the adapter's pictures are read by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_attn.cli import models
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.core.tensors import open_tensors

CROSS, SELF = 0.4, 0.6
"""``--cross`` and ``--self`` unless they are given."""

_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def add_arguments(parser: Any) -> None:
    """Add what says where the adapter and its CLIP come from."""
    add = parser.add_argument
    add(
        "--ip-adapter",
        type=str,
        metavar="FILE",
        help="with vimaedit: a file of weights, or OWNER/NAME/FOLDER/FILE on the Hub; shapes-sd has its own",
    )
    add("--ip-scale", type=float, default=0.4, help="with vimaedit: how strong the adapter is, 0 for not at all")
    add("--ip-clip", type=str, metavar="ID_OR_FOLDER", help=f"with vimaedit: the adapter's CLIP, by default {_CLIP}")


@contextmanager
def loaded(stock: Any, args: Any) -> Iterator[Any]:
    """The pipeline of `load`, for a block of code; after it the UNet of ``stock`` has no adapter any more."""
    from diffusion_attn.editing.network import has_adapters

    try:
        yield load(stock, args)
    finally:
        if has_adapters(stock.unet):
            stock.unload_ip_adapter()


def load(stock: Any, args: Any) -> Any:
    """The pipeline around the components of ``stock``, into whose UNet the adapter is loaded.

    Raises:
        CommandError: the adapter or its CLIP cannot be loaded.
    """
    from diffusion_attn.pipelines import ViMAEditPipeline
    from diffusion_attn.shapes.models import CLIP, IP_ADAPTER

    adapter, clip = args.ip_adapter, args.ip_clip or _CLIP
    if adapter is None and args.model == "shapes-sd":
        adapter, clip = str(CLIP / IP_ADAPTER), args.ip_clip or str(CLIP)
    if adapter is None or args.ip_scale == 0:
        if args.ip_scale and not args.quiet:
            print("edited without image guidance; --ip-adapter names one", file=sys.stderr)
        return ViMAEditPipeline.from_pipe(stock)
    path = Path(adapter).expanduser()
    if path.is_file():
        _check_file(path)
        folder, subfolder = str(path.parent), ""
    else:
        parts = adapter.split("/")
        if len(parts) < 3 or not adapter.endswith(".safetensors"):
            raise CommandError(
                f"--ip-adapter {adapter!r} is not a file here; give one, or OWNER/NAME/FOLDER/FILE.safetensors on the "
                "Hub, for example h94/IP-Adapter/models/ip-adapter_sd15.safetensors."
            )
        folder, subfolder = "/".join(parts[:2]), "/".join(parts[2:-1])
    try:
        stock.load_ip_adapter(folder, subfolder=subfolder, weight_name=path.name, image_encoder_folder=None)
        pipe = ViMAEditPipeline.from_pipe(stock)
        pipe.load_clip(clip)
    except Exception as error:  # loaders raise whatever the broken file or the connection made them raise
        raise CommandError(
            f"--ip-adapter {adapter!r} with the CLIP {clip!r} could not be loaded ({models.reason(error)}); check the "
            "names and the connection, or give --ip-scale 0 to edit without."
        ) from error
    return pipe


def _check_file(path: Path) -> None:
    """Refuse weights of something else, which a loader would find out about by a missing key.

    Raises:
        CommandError: it is no file of an IP-Adapter.
        CheckpointFormatError: it cannot be read.
    """
    if path.suffix != ".safetensors":  # by the name the loader decides what to read it as
        raise CommandError(f"--ip-adapter {str(path)!r} is not a safetensors file by its name; give one.")
    with open_tensors(path) as file:
        parts = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
    if parts != {"image_proj", "ip_adapter"}:
        raise CommandError(
            f"--ip-adapter {str(path)!r} holds other weights than an IP-Adapter's image_proj and ip_adapter; give a "
            "file such as ip-adapter_sd15.safetensors."
        )
