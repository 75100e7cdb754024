"""What `generate` is asked for, checked as far as it can be before a model is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_attn.cli import ladder
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.files import prepare_folder
from diffusion_attn.cli.method_options import add_methods, build_methods, check_names
from diffusion_attn.cli.models import Size, check_model
from diffusion_attn.core.method import Method
from diffusion_attn.core.reading import LARGEST_JSON, read_text

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LARGEST_SEED = 2**63 - 1
LARGEST_SIDE = 999_999
"""Pixels; six digits."""


@dataclass(frozen=True)
class Request:
    """The arguments of `generate`, valid and with defaults filled in; ``None`` is left to the model.

    ``size`` is ``(width, height)`` in pixels. A method whose weights depend on the model is a function of the pipeline.
    ``ladder`` has the options of the ladder, ``None``: the picture is drawn at once.
    """

    prompts: tuple[str, ...]
    model: str
    methods: tuple[Method | Callable[[Any], Method], ...]
    base_methods: tuple[Method | Callable[[Any], Method], ...]
    ladder: Any
    base_scale: float
    size: Size | None
    steps: int | None
    guidance: float | None
    seed: int
    num_images: int
    output: Path
    compare: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """``(prompt, seed)`` of each picture: image ``i`` of each prompt is drawn from ``seed + i``."""
        return [(prompt, self.seed + i) for prompt in self.prompts for i in range(self.num_images)]


def add_request_arguments(parser: Any) -> None:
    """Add the arguments that `read_request` reads."""
    add = parser.add_argument
    add("prompt", type=str, nargs="*", metavar="PROMPT", help="what to draw; one or more")
    add("--prompts", type=str, metavar="FILE", help="text file of further prompts, one a line")
    add_model_arguments(parser)
    add_methods(parser)
    add("--size", type=str, metavar="N|WxH", help="pixels, 128 or 192x128 (wide x high); by default the native size")
    add("--steps", type=int, help="denoising steps; by default what the model recommends")
    add("--guidance", type=float, help="guidance scale, 1 is none; by default what the model recommends")
    add("--seed", type=int, default=0, help="image i of each prompt is drawn from seed + i")
    add("--num-images", type=int, default=1, metavar="N", help="images per prompt")
    add("--output", type=str, default="outputs", metavar="DIR", help="folder of the pictures")
    ladder.add_ladder_arguments(parser)
    add("--base-method", nargs="+", action="extend", default=[], metavar="NAME", help="methods of the ladder's base")
    add("--base-scale", type=float, default=1.0, metavar="X", help="the base's sides by the native ones")
    add("--compare", action="store_true", help="draw everything without the methods too, side by side in one picture")


def add_model_arguments(parser: Any, name: str = "--model") -> None:
    """Add which model is loaded, by the option ``name``, and where and in which type."""
    add = parser.add_argument
    add(
        name,
        type=str,
        default="shapes-sd",
        metavar="ID_OR_FOLDER",
        help="an embedded model, a local diffusers folder or a Hub id",
    )
    add("--dtype", choices=list(DTYPES), help="of the weights; by default float16 on CUDA, float32 elsewhere")
    add("--device", type=str, help="for example cpu, cuda, cuda:1, mps; by default the best there is")


def read_request(args: Any) -> Request:
    """The parsed arguments as a `Request`; makes the output folder.

    Raises:
        CommandError: an argument is not what it should be.
    """
    check_names(args.method)
    check_names(args.base_method)
    prompts = (*(args.prompt or ()), *read_prompts(args.prompts))
    if not prompts:
        raise CommandError("no prompt is given; name at least one, or a file with --prompts.")
    ladder.check_ladder(args)
    if args.ladder is None and (args.base_method or args.base_scale != 1.0):
        raise CommandError("--base-method and --base-scale belong to a ladder; add --ladder auto, or leave them out.")
    check_numbers(args, {"base_scale": 0.25})
    names = [*dict.fromkeys((*args.method, *args.base_method))]
    built = dict(zip(names, build_methods(names, args), strict=True))
    methods, base_methods = (tuple(built[name] for name in chosen) for chosen in (args.method, args.base_method))
    if args.compare and not methods:
        raise CommandError("--compare needs something to compare the plain model with; name it with --method.")
    size = None if args.size is None else parse_size(args.size)
    check_numbers(args, {"steps": 1, "num_images": 1, "seed": 0, "guidance": 0})
    if args.seed + args.num_images - 1 > _LARGEST_SEED:
        raise CommandError(f"--seed {args.seed}: the last image's seed is above {_LARGEST_SEED}; give a smaller one.")
    device = pick_device(args.device)
    check_model(args.model)
    output = Path(args.output).expanduser()
    prepare_folder(output)
    return Request(
        prompts=prompts,
        model=args.model,
        methods=methods,
        base_methods=base_methods,
        ladder=None if args.ladder is None else args,
        base_scale=args.base_scale,
        size=size,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        num_images=args.num_images,
        output=output,
        compare=args.compare,
        dtype=pick_dtype(args.dtype, device),
        device=device,
    )


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type of the weights called ``name``, by default half precision on CUDA, else float32."""
    return DTYPES[name or ("float16" if device.type == "cuda" else "float32")]


def check_numbers(args: Any, least: Mapping[str, float]) -> None:
    """Refuse numbers of ``args`` below the ``least``, where they are given.

    Raises:
        CommandError: one of them is, or is none.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not (value >= bound and math.isfinite(value)):
            raise CommandError(f"--{name.replace('_', '-')} {value}: expected {bound} or more.")


def check_shares(args: Any, *names: str) -> None:
    """Refuse shares of the steps above 1, where they are given.

    Raises:
        CommandError: one of them is.
    """
    for name in names:
        if (args[name] or 0) > 1:
            raise CommandError(f"--{name} {args[name]}: expected a share of the steps, 0 to 1.")


def parse_size(text: str, option: str = "--size") -> Size:
    """``"128"`` or ``"192x128"``, given as ``option``, as ``(width, height)`` in pixels.

    Raises:
        CommandError: it is neither.
    """
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.strip().lower(), re.ASCII)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(size):
        raise CommandError(f"{option} {text!r}: expected pixels as N or WIDTHxHEIGHT, for example 128 or 192x128.")
    return size


def read_prompts(path: str | None) -> list[str]:
    """The prompts of a text file, one a line without what surrounds it; none without a file.

    Raises:
        CommandError: it cannot be read.
    """
    if path is None:
        return []
    try:
        lines = read_text(Path(path).expanduser(), LARGEST_JSON).removeprefix("\ufeff").splitlines()
    except OSError as error:
        raise CommandError(f"--prompts {path!r} cannot be read ({error.strerror}); give a text file.") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"--prompts {path!r} is not UTF-8 text; save it as such.") from error
    except ValueError as error:
        raise CommandError(f"--prompts {path!r} cannot be read ({error}); give a smaller file.") from error
    return [line.strip() for line in lines if line.strip()]


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``, by default the best there is.

    Raises:
        CommandError: there is none of that name.
    """
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name!r} is no device; give for example cpu, cuda, cuda:1 or mps.") from error
    there = {"cuda": cuda > (device.index or 0), "mps": mps, "meta": False}
    if not there.get(device.type, True):
        raise CommandError(f"--device {name!r} is not on this machine; see diffusion-attn info, or leave it out.")
    return device
