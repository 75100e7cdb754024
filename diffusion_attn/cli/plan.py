"""Predict memory and FLOPs of a model and the methods at a size, and say what fits; no weights are read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.files import prepare_folder, save_json
from diffusion_attn.cli.method_options import NO_WEIGHTS, add_methods, check_names
from diffusion_attn.cli.models import Size, check_model, reason
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import DTYPES, check_numbers, parse_size
from diffusion_attn.core.errors import DiffusionAttnError, MethodConflictError, UnsupportedModelError
from diffusion_attn.core.method import Method
from diffusion_attn.methods import METHODS, Clear, LinFusion
from diffusion_attn.methods.clear.method import BASES
from diffusion_attn.planning.forecast import Forecast, forecast, forecast_decode, weight_bytes
from diffusion_attn.planning.inputs import token_grids
from diffusion_attn.planning.layouts import Layout, known, load_layout

_GIB = 2**30
_UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": _GIB}
_SWITCHES = "low_memory"  # goes beside every other method


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn plan``."""
    # The generated usage would name every option of every method.
    parser.usage = "diffusion-attn plan --model NAME [--size WxH] [--method NAME ...] [--memory 24GB] [options]"
    add = parser.add_argument
    add(
        "--model",
        type=str,
        default="shapes-sd",
        metavar="NAME",
        help=f"{', '.join(known())}, an embedded model, a local diffusers folder or a Hub id (whose configs are read)",
    )
    add_methods(parser)
    add("--size", type=str, metavar="N|WxH", help="pixels, 128 or 192x128 (wide x high); by default the native size")
    add("--memory", type=str, metavar="24GB", help="of the device, in MB, GB, MiB or GiB; by default the GPU's, if any")
    add("--dtype", choices=list(DTYPES), help="of the weights; by default float16, bfloat16 for FLUX and SD3")
    add("--batch", type=int, help="pictures times guidance branches in one call; by default 2, 1 for FLUX")
    add("--json", type=str, metavar="FILE", help="write the plan to a file, too")


def run(args: Any) -> int:
    """Print the plan that the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, the model or the size stands against it.
    """
    check_names(args.method)
    if args.weights not in (None, NO_WEIGHTS):
        raise CommandError(
            f"--weights {args.weights!r}: a plan reads no weights and counts with those that are published; leave it "
            f"out, or give {NO_WEIGHTS!r} for the model's own."
        )
    size = None if args.size is None else parse_size(args.size)
    check_numbers(args, {"batch": 1})
    memory = parse_memory(args.memory)
    _check_model(args.model)
    if args.json is not None:
        prepare_folder(Path(args.json).expanduser().parent, "--json")
    with silence():
        plan = _Plan.of(args, _load(args.model), size, memory)
        rows, refused = plan.methods(args)
        decoding = plan.decoding()
    print(plan.describe(rows, refused, decoding))
    if args.json is not None:
        save_json(Path(args.json).expanduser(), plan.as_dict(rows, refused, decoding))
    return 0


@dataclass(frozen=True)
class _Row:
    """One way of working: what it costs, and with the weights of all that is on the device in bytes."""

    name: str
    cost: Forecast
    total: int


def parse_memory(text: str | None) -> int | None:
    """``"24GB"`` in bytes; by default what the first GPU has, ``None`` without one.

    Raises:
        CommandError: it is no amount of memory.
    """
    if text is None:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([mg]i?b)", text.strip().lower(), re.ASCII)
    if not match or not float(match[1]):
        raise CommandError(f"--memory {text!r}: expected an amount such as 24GB, 22.5GiB or 8000MB.")
    return int(float(match[1]) * _UNITS[match[2]])


def _check_model(model: str) -> None:
    if model in known():
        return
    try:
        check_model(model)
    except CommandError as error:
        raise CommandError(f"{error} Of these a plan needs no files: {', '.join(known())}.") from error


def _load(model: str) -> Layout:
    try:
        return load_layout(model)
    except DiffusionAttnError:
        raise
    except Exception as error:  # loaders raise whatever the broken file or the connection made them raise
        raise CommandError(
            f"--model {model!r}: its configs could not be read ({reason(error)}); check the name and the connection, "
            f"or give one of {', '.join(known())}."
        ) from error


@dataclass(frozen=True)
class _Plan:
    """What is planned: ``size`` is ``(width, height)`` in pixels, ``memory`` in bytes; the parts have no data."""

    model: str
    layout: Layout
    denoiser: Any
    vae: Any
    size: Size
    batch: int
    memory: int | None

    @classmethod
    def of(cls, args: Any, layout: Layout, size: Size | None, memory: int | None) -> _Plan:
        """The plan that the parsed ``args`` ask for, with what they leave open filled in.

        Raises:
            CommandError: the model cannot draw the size.
        """
        unet = layout.family.startswith("UNet")
        dtype = DTYPES[args.dtype or ("float16" if unet else "bfloat16")]
        # SDXL's pipeline decodes in float32 what it has drawn in float16.
        upcast = layout.denoiser_config.get("addition_embed_type") == "text_time" and dtype == torch.float16
        step = math.lcm(layout.scale * (1 if unet else 2), 8)
        size = size or _native_size(layout)
        if any(side % step for side in size):
            width, height = (max(step, round(side / step) * step) for side in size)
            raise CommandError(
                f"--size {size[0]}x{size[1]}: sides have to be multiples of {step} pixels with this model; the nearest "
                f"such size is {width}x{height}."
            )
        vae = layout.vae(torch.float32 if upcast and layout.vae_config.get("force_upcast", True) else dtype)
        batch = args.batch or (1 if layout.family.startswith("Flux") else 2)
        return cls(args.model, layout, layout.denoiser(dtype), vae, size, batch, memory)

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width in latent cells."""
        return self.size[1] // self.layout.scale, self.size[0] // self.layout.scale

    def methods(self, args: Any) -> tuple[list[_Row], dict[str, str]]:
        """What each combination of methods costs, and why others do not serve.

        The plain model; each method on its own; all that are asked for together; and `_SWITCHES` beside each of these.

        Raises:
            CommandError: a method refuses its options, or the model the size.
        """
        asked = [name for name in args.method if name != _SWITCHES]
        alone = asked if args.method else [name for name in METHODS if name != _SWITCHES]
        choices = [(), *((name,) for name in alone), *([tuple(asked)] if len(asked) > 1 else [])]
        rows, refused = [], {}
        height, width = self.cells
        for names in [(*names, *also) for names in choices for also in ((), (_SWITCHES,))]:
            label = " + ".join(names) or "plain"
            try:
                methods = tuple(_build(name, args, self.denoiser) for name in names)
                cost = forecast(
                    self.denoiser,
                    height=height,
                    width=width,
                    text_tokens=self.layout.text_tokens,
                    batch=self.batch,
                    methods=methods,
                )
                rows.append(_Row(label, cost, cost.total_bytes + weight_bytes(self.vae)))
            except (UnsupportedModelError, MethodConflictError) as error:
                if names in ((), (_SWITCHES,)):
                    raise
                if asked and _SWITCHES not in names:
                    refused[label] = str(error)
            except (TypeError, ValueError) as error:
                what = f"--method {label}" if names else f"--size {self.size[0]}x{self.size[1]}"
                raise CommandError(f"{what}: {error}") from error
        return rows, refused

    def decoding(self) -> list[_Row]:
        """What decoding the picture costs, at once and in tiles, while the denoiser stays where it is."""
        rows = []
        height, width = self.cells
        for tiled in (False, True):
            cost = forecast_decode(self.vae, height=height, width=width, tiled=tiled)
            name = f"VAE decode{', tiled' if tiled else ''}, {_short(self.vae.dtype)}"
            rows.append(_Row(name, cost, cost.total_bytes + weight_bytes(self.denoiser)))
        return rows

    # ---- told

    def describe(self, rows: list[_Row], refused: dict[str, str], decoding: list[_Row]) -> str:
        """The plan as lines of text."""
        (width, height), dtype = self.size, _short(self.denoiser.dtype)
        grids = token_grids(self.denoiser, self.cells)
        tokens = ", ".join(f"{rows} x {columns} = {rows * columns}" for rows, columns in grids)
        parameters = sum(x.numel() for x in self.denoiser.parameters()) / 1e6
        table = [["method", "GFLOP per step", "attention", "activations GiB", "total GiB", "fits"]]
        table += [
            [
                row.name,
                f"{row.cost.flops / 1e9:,.{0 if row.cost.flops > 1e11 else 2}f}",
                f"{row.cost.attention_share:.1%}",
                *(f"{size / _GIB:.{2 if size > _GIB else 4}f}" for size in (row.cost.activation_bytes, row.total)),
                {True: "yes", False: "no", None: "-"}[self.fits(row)],
            ]
            for row in (*rows, *decoding)
        ]
        return "\n".join(
            [
                f"{self.model}, {width}x{height} pixels, {dtype}, batch {self.batch}: {self.layout.family} of "
                f"{parameters:,.1f} million parameters",
                f"tokens by attention level: {tokens}; text: {self.layout.text_tokens}",
                "",
                _align(table),
                *(f"{name} does not serve: {text}" for name, text in refused.items()),
                "",
                "Totals are of the weights of denoiser, method and VAE, and the most that is in use beside them. Not "
                "among them: text encoders (offload them), what the device's own libraries and its allocator need.",
                self.conclusion(rows, decoding),
            ]
        )

    def as_dict(self, rows: list[_Row], refused: dict[str, str], decoding: list[_Row]) -> dict[str, Any]:
        """The plan, ready for JSON."""

        def told(row: _Row) -> dict[str, Any]:
            return {"name": row.name, **asdict(row.cost), "total_bytes": row.total, "fits": self.fits(row)}

        return {
            "model": self.model,
            "size": list(self.size),
            "dtype": _short(self.denoiser.dtype),
            "batch": self.batch,
            "memory_bytes": self.memory,
            "token_grids": token_grids(self.denoiser, self.cells),
            "text_tokens": self.layout.text_tokens,
            "methods": [told(row) for row in rows],
            "refused": refused,
            "decoding": [told(row) for row in decoding],
            "conclusion": self.conclusion(rows, decoding),
        }

    def fits(self, row: _Row) -> bool | None:
        """Whether a row fits the memory; ``None``: that is not known."""
        return None if self.memory is None else row.total <= self.memory

    def conclusion(self, rows: list[_Row], decoding: list[_Row]) -> str:
        """What fits, and what to try if nothing does, in a sentence."""
        least = min(rows, key=lambda row: row.total)
        if self.memory is None:
            return (
                f"Least memory to draw in: {least.name}, {least.total / _GIB:.2f} GiB; tell what there is with "
                "--memory, for example --memory 24GB."
            )
        there = f"{self.memory / _GIB:.2f} GiB"
        fitting = [row.name for row in rows if self.fits(row)]
        if not fitting:
            weights = least.total - least.cost.activation_bytes
            remedy = (
                "offload the weights (pipe.enable_model_cpu_offload, or enable_sequential_cpu_offload)"
                if least.cost.activation_bytes < self.memory
                else "ask for a smaller --size"
            )
            return (
                f"Nothing fits {there}: the least is {least.name} with {least.total / _GIB:.2f} GiB, of which "
                f"{weights / _GIB:.2f} are weights; {remedy}."
            )
        whole, tiled = decoding
        if self.fits(whole):
            decode = "the VAE decodes at once"
        elif self.fits(tiled):
            decode = "decode in tiles, pipe.vae.enable_tiling()"
        else:
            decode = (
                "decode in tiles and with the denoiser off the device, or on the CPU: the VAE does not fit beside it"
            )
        return f"In {there} fit: {', '.join(fitting)}; {decode}."


def _native_size(layout: Layout) -> Size:
    """Width and height in pixels; FLUX's transformer records none, its autoencoder does."""
    cells, scale = layout.denoiser_config.get("sample_size"), layout.scale
    if cells is None:
        cells, scale = layout.vae_config["sample_size"], 1
    height, width = (cells, cells) if isinstance(cells, int) else cells
    return width * scale, height * scale


def _build(name: str, args: Any, denoiser: Any) -> Method:
    """The method with the options in ``args``, and weights, without data, of the published sizes."""
    method, options = METHODS[name], vars(args[name]) if name in args else {}
    if method is LinFusion:
        xl = denoiser.config.get("addition_embed_type") == "text_time"
        return LinFusion.for_model(denoiser, (lambda width: width // 16) if xl else None, **options)
    if method is Clear and args.weights != NO_WEIGHTS:
        structure = tuple(denoiser.config.get(x) for x in ("num_layers", "num_single_layers", "num_attention_heads"))
        if structure in BASES:
            return Clear.for_model(denoiser, **{"radius": BASES[structure][1], **options})
    return method(**options)


def _align(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
