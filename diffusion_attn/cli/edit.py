"""Edit a picture by editing the prompt that describes it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from diffusion_attn.cli import files, inversions, models, oracle, vimaedit
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.pictures import Cell, Row, fit_cell, labelled_grid
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import (
    add_model_arguments,
    check_numbers,
    check_shares,
    parse_size,
    pick_device,
    pick_dtype,
)

METHODS = (*inversions.METHODS, "vimaedit")
_CROSS, _SELF = 0.8, 0.4


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn edit``."""
    parser.usage = "diffusion-attn edit IMAGE --source PROMPT --target PROMPT [PROMPT ...] [--method NAME] [options]"
    add = parser.add_argument
    add("image", type=str, help="the picture to edit")
    add("--source", type=str, required=True, metavar="PROMPT", help="describes the picture")
    add("--target", nargs="+", type=str, required=True, metavar="PROMPT", help="the edited prompt, or several")
    add(
        "--method",
        choices=METHODS,
        default="direct",
        help="how the picture is inverted before Prompt-to-Prompt, or ViMAEdit, which needs no inversion",
    )
    add("--words", nargs="+", type=str, metavar="WORD", help="with dpl: the nouns of --source to learn")
    add(
        "--blend", nargs=2, type=str, metavar="WORD", help="change only where these words of source and target are seen"
    )
    models.add_word_maps_argument(parser)
    add("--weights", nargs="+", type=str, metavar="WORD=FACTOR", help="multiply the attention to words of the target")
    own = f"by default {_CROSS}, with vimaedit {vimaedit.CROSS}"
    add("--cross", type=float, help=f"share of the steps in which words take the source's attention, {own}")
    own = f"by default {_SELF}, with vimaedit {vimaedit.SELF}"
    add("--self", type=float, help=f"the same for self-attention, which holds the layout, {own}")
    add("--mask", type=str, metavar="FILE", help="with vimaedit: white where it may change; with --blend, only there")
    add("--seed", type=int, default=0, help="with vimaedit: of its noise")
    vimaedit.add_arguments(parser)
    add("--inversion", type=str, metavar="FILE", help="use this inversion; made there first if it is not there")
    add("--output", type=str, default="outputs", metavar="DIR", help="folder of the pictures")
    add_model_arguments(parser)
    add("--size", type=str, metavar="N|WxH", help="pixels, to which the picture is cut; by default the native size")
    add("--steps", type=int, help="denoising steps; by default what the model recommends")
    add("--guidance", type=float, help="guidance scale, 1 is none; by default what the model recommends")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Edit as the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, the model, the picture or the folder stands against it.
    """
    request = read_request(args)
    device = pick_device(args.device)
    models.check_model(args.model)
    output = Path(args.output).expanduser()
    files.prepare_folder(output)
    if args.inversion is not None:
        files.prepare_folder(Path(args.inversion).expanduser().parent, "--inversion in")
    with silence(args.quiet):
        stock = models.load_model(args.model, pick_dtype(args.dtype, device), device)
        stock.set_progress_bar_config(disable=args.quiet)
        edited = perform(stock, request)
    columns = ["picture", "reconstruction"]
    cells = [Cell(fit_cell(edited.image), ()), Cell(fit_cell(edited.result.source[0]), ())]
    for path, record, picture in save(edited, output):
        judged = record["oracle"]
        columns.append(record["target"])
        cells.append(Cell(fit_cell(picture), (oracle.in_words(judged["judgement"]),) if judged else ()))
        if not args.quiet:
            print(path)
    grid = labelled_grid(columns, [Row(f"{args.source} ({args.method})", tuple(cells))])
    files.save_png(output / f"comparison-{args.method}.png", grid, edited.settings)
    return 0


@dataclass(frozen=True)
class Request:
    """The parsed arguments, valid, with their pictures opened."""

    args: Any
    image: Image.Image
    mask: Image.Image | None
    size: models.Size | None
    weights: dict[str, float] | None


@dataclass(frozen=True)
class Edited:
    """The pipeline's ``result``, the picture as it was cut for it, and what is written beside each edit."""

    result: Any
    image: Image.Image
    targets: tuple[str, ...]
    settings: dict[str, Any]
    cost: Any


def read_request(args: Any) -> Request:
    """The parsed arguments as a `Request`.

    Raises:
        CommandError: an argument is not what it should be, or a picture cannot be opened.
    """
    weights = _weights(args)
    _check_words(args, weights)
    check_numbers(args, {"steps": 1, "guidance": 0, "cross": 0, "self": 0, "seed": 0, "ip_scale": 0})
    check_shares(args, "cross", "self")
    size = None if args.size is None else parse_size(args.size)
    image = files.open_picture(args.image)
    mask = None if args.mask is None else files.open_picture(args.mask)
    if mask is not None and mask.size != image.size:
        raise CommandError(
            f"--mask {args.mask!r} is {mask.size} pixels, and the picture {image.size}; give one as large."
        )
    return Request(args, image, mask, size, weights)


def perform(stock: Any, request: Request) -> Edited:
    """Edit by the model of the pipeline ``stock``.

    Raises:
        DiffusionAttnError: the model or the size stands against it.
    """
    args = request.args
    models.check_unet(stock, args.model)
    size = request.size or models.native_size(stock)
    models.check_size(stock, size)
    direct = args.method == "vimaedit"
    image, mask = ImageOps.fit(request.image, size), request.mask and ImageOps.fit(request.mask, size)
    settings = {
        "image": args.image,
        "source": args.source,
        "method": args.method,
        "words": args.words or [],
        **models.run_settings(stock, args, size),
        "cross": _given(args.cross, vimaedit.CROSS if direct else _CROSS),
        "self": _given(args["self"], vimaedit.SELF if direct else _SELF),
        "blend": args.blend,
        "maps": list(models.word_maps_of(stock, args.model, size, args.maps)),
        "weights": request.weights,
    }
    if direct:
        settings |= {name: args[name] for name in ("seed", "mask", "ip_adapter", "ip_scale", "ip_clip")}
        result, cost = _edit_directly(stock, image, mask, args, settings)
    else:
        result, cost = _edit_inverted(stock, image, args, settings)
    return Edited(result, image, tuple(args.target), settings, cost)


def save(edited: Edited, folder: Path) -> Iterator[tuple[Path, dict[str, Any], Image.Image]]:
    """Write each edit into ``folder``; gives its file, what is written beside it, and the picture."""
    method = edited.settings["method"]
    for index, (prompt, picture) in enumerate(zip(edited.targets, edited.result.images, strict=True)):
        name = f"{index:04d}-{files.slug(prompt)}-{method}"
        judged = oracle.consult(picture, prompt)
        record = {"file": f"{name}.png", **edited.settings, "target": prompt, "cost": edited.cost, "oracle": judged}
        files.save_json(folder / f"{name}.json", record)
        files.save_png(folder / f"{name}.png", picture, record)
        yield folder / f"{name}.png", record, picture


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _edit_inverted(stock: Any, image: Image.Image, args: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The edits by Prompt-to-Prompt, and what the inversion has cost."""
    from diffusion_attn.pipelines import DPLPipeline

    pipe = DPLPipeline.from_pipe(stock)
    inversion = _invert(pipe, image, args, settings)
    result = pipe(
        target_prompt=args.target,
        inversion=inversion,
        guidance_scale=settings["guidance"],
        cross_replace_steps=settings["cross"],
        self_replace_steps=settings["self"],
        word_weights=settings["weights"],
        map_size=settings["maps"],
        blend_words=args.blend and [args.blend[0], *[args.blend[1]] * len(args.target)],
    )
    return result, inversion.cost


def _edit_directly(
    stock: Any, image: Image.Image, mask: Image.Image | None, args: Any, settings: dict[str, Any]
) -> tuple[Any, Any]:
    """The edits by ViMAEdit, whose only cost is their own."""
    import torch

    with vimaedit.loaded(stock, args) as pipe:
        result = pipe(
            image,
            args.source,
            args.target,
            args.blend and tuple(args.blend),
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            cross_replace_steps=settings["cross"],
            self_replace_steps=settings["self"],
            word_weights=[_of_words(settings["weights"], target) for target in args.target],
            map_size=settings["maps"],
            ip_adapter_scale=args.ip_scale,
            edit_mask=mask,
            edit_mask_mode="replace" if args.blend is None else "intersect",
            # One of its own for each, so that an edit does not depend on what else is asked for.
            generator=[torch.Generator().manual_seed(args.seed) for _ in args.target],
        )
    return result, {}


def _of_words(weights: dict[str, float] | None, target: str) -> dict[str, float] | None:
    """The weights of the words that ``target`` has."""
    return {word: factor for word, factor in (weights or {}).items() if word in target.split(" ")} or None


def _invert(pipe: Any, image: Image.Image, args: Any, settings: dict[str, Any]) -> Any:
    """The inversion of ``--inversion``, or one that is made and kept there; what was interrupted is finished."""
    from diffusion_attn.editing.inversion import Inversion

    path = None if args.inversion is None else Path(args.inversion).expanduser()
    made = {name: settings[name] for name in ("source", "method", "words", "size", "steps", "guidance")}
    made["pixels"] = hashlib.sha256(image.tobytes()).hexdigest()[:16]
    begun = None
    if path is not None and path.is_file():
        begun = Inversion.load(path)
        known = begun.settings.get("edit")
        if known != made:
            raise CommandError(
                f"--inversion {args.inversion!r} was made with {known}, and {made} is asked for; name another file, or "
                "ask for the same."
            )
        if begun.finished:
            return begun
    inversion = inversions.invert(
        pipe,
        image,
        args.source,
        args.method,
        args.words or [],
        steps=settings["steps"],
        guidance=settings["guidance"],
        begun=begun,
        checkpoint=path,
        settings={"edit": made},
    )
    if path is not None:
        inversion.save(path)
    return inversion


def _weights(args: Any) -> dict[str, float] | None:
    """``--weights`` as a mapping.

    Raises:
        CommandError: one is not of the form WORD=FACTOR.
    """
    weights = {}
    for text in args.weights or ():
        word, sign, factor = text.rpartition("=")
        try:
            weights[word] = float(factor)
        except ValueError:
            sign = ""
        if not sign or not word or not math.isfinite(weights[word]):
            raise CommandError(f"--weights {text!r}: expected WORD=FACTOR, for example large=2.")
    return weights or None


def _check_words(args: Any, weights: dict[str, float] | None) -> None:
    """Refuse words that are not in their prompts, before anything is loaded.

    Raises:
        CommandError: there is one.
    """
    if args.method == "dpl" and not args.words:
        raise CommandError("--method dpl learns the nouns of --source; name them with --words.")
    if args.method != "dpl" and args.words:
        raise CommandError(f"--words is for --method dpl, and --method is {args.method}; leave one of them out.")
    inverting = {"--inversion": args.inversion}
    direct = {"--mask": args.mask, "--ip-adapter": args.ip_adapter, "--ip-clip": args.ip_clip}
    for option, value in (inverting if args.method == "vimaedit" else direct).items():
        if value is not None:
            raise CommandError(f"{option} {value!r} is not for --method {args.method}; leave one of them out.")
    asked = [("--words", word, [args.source]) for word in args.words or ()]
    asked += [("--weights", word, args.target) for word in weights or ()]
    if args.blend:
        if len(args.blend) != 2:
            raise CommandError(
                f"--blend {' '.join(args.blend)!r}: expected a word of the source and one of the target."
            )
        asked.append(("--blend", args.blend[0], [args.source]))
        asked += [("--blend", args.blend[1], [target]) for target in args.target]
    for option, word, prompts in asked:
        if not any(word in prompt.split(" ") for prompt in prompts):
            raise CommandError(f"{option} {word!r} is not a word of {' or '.join(map(repr, prompts))}.")
