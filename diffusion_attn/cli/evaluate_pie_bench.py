"""Measure ways to edit pictures on PIE-Bench, or on drawn scenes laid out like it."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from diffusion_attn.cli import files, inversions, models, vimaedit
from diffusion_attn.cli.edit import METHODS
from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.quiet import silence
from diffusion_attn.cli.request import (
    add_model_arguments,
    check_numbers,
    check_shares,
    parse_size,
    pick_device,
    pick_dtype,
)
from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.reading import read_json
from diffusion_attn.metrics.cost import measure
from diffusion_attn.metrics.pie_bench import COLUMNS, KINDS, EditScorer, Item, load, means

BASELINES = ("copy", "vae")
"""Rows that are always there: the picture as it is, and what the autoencoder alone makes of it."""

_DRAWN = 60  # edits, without --data
_SEED = 1234  # the benchmark's
_OWN = ("exact", "iou", "seconds", "peak_mb")  # numbers beside the benchmark's

Edit = tuple[Image.Image, "torch.Tensor | None"]
"""A picture, and where the method let it change, ``(h, w)`` bool."""


def add_arguments(parser: Any) -> None:
    """Add the arguments of ``diffusion-attn evaluate pie-bench``."""
    parser.usage = "diffusion-attn evaluate pie-bench [--data FOLDER] [--method NAME ...] [options]"
    add = parser.add_argument
    add("--data", type=str, metavar="FOLDER", help=f"PIE-Bench_v1; by default {_DRAWN} edits of drawn scenes")
    add("--method", nargs="+", choices=METHODS, default=["vimaedit", "direct"], help="beside copy and vae")
    add_model_arguments(parser)
    add("--count", type=int, help="items, from the first; by default all")
    add("--type", nargs="+", type=int, metavar="N", help=f"only edits of these types, 0 to {len(KINDS) - 1}")
    add("--steps", type=int, help="denoising steps; by default what the model recommends")
    add("--guidance", type=float, help="guidance scale; by default what the model recommends")
    add("--cross", type=float, default=vimaedit.CROSS, help="share of the steps in which words take the source's maps")
    add("--self", type=float, default=vimaedit.SELF, help="the same for self-attention")
    models.add_word_maps_argument(parser)
    add("--seed", type=int, default=_SEED, help="of vimaedit's noise")
    add("--size", type=str, metavar="N|WxH", help="pixels that pictures are edited at; by default the native size")
    vimaedit.add_arguments(parser)
    add("--clip", type=str, metavar="ID_OR_FOLDER", help="for the CLIP scores; the benchmark's is ViT-L/14 of OpenAI")
    add("--dino", type=str, metavar="ID_OR_FOLDER", help="for the structure distance; facebook/dino-vitb8")
    add("--lpips", action="store_true", help="LPIPS too, whose network torchvision loads")
    add("--jpeg", action="store_true", help="one JPEG round trip of edited pictures, which published numbers have")
    add("--output", type=str, default="outputs/pie-bench", metavar="DIR", help="folder; what is there is gone on with")
    add("--quiet", action="store_true", help="show nothing but the error, if there is one")


def run(args: Any) -> int:
    """Measure what the parsed ``args`` ask for and return the exit code.

    Raises:
        DiffusionAttnError: an argument, the data, a model or the folder stands against it.
    """
    if find_spec("torchmetrics") is None:
        raise CommandError("evaluate needs torchmetrics, which is not installed; pip install diffusion-attn[metrics].")
    check_numbers(args, {"count": 1, "steps": 1, "guidance": 0, "seed": 0, "cross": 0, "self": 0, "ip_scale": 0})
    check_shares(args, "cross", "self")
    wrong = [kind for kind in args.type or () if not 0 <= kind < len(KINDS)]
    if wrong:
        raise CommandError(f"--type {wrong[0]}: expected 0 to {len(KINDS) - 1}.")
    size = None if args.size is None else parse_size(args.size)
    device = pick_device(args.device)
    models.check_model(args.model)
    output = Path(args.output).expanduser()
    files.prepare_folder(output)
    items = _items(args, output)
    names = [*BASELINES, *args.method]
    with silence(args.quiet):
        scorer = EditScorer.load(dino=args.dino, clip=args.clip, lpips=args.lpips, device=device)
        stock = models.load_model(args.model, pick_dtype(args.dtype, device), device)
        models.check_unet(stock, args.model)
        models.show_everything(stock)
        stock.set_progress_bar_config(disable=True)
        size = size or models.native_size(stock)
        models.check_size(stock, size)
        settings = {
            **models.run_settings(stock, args, size),
            "dtype": str(stock.unet.dtype).removeprefix("torch."),
            "maps": list(models.word_maps_of(stock, args.model, size, args.maps)),
            "networks": {"clip": args.clip, "dino": args.dino, "lpips": args.lpips},
            **{name: args[name] for name in ("cross", "self", "seed", "jpeg", "ip_adapter", "ip_scale", "ip_clip")},
        }
        editors = _Editors(stock, args, settings)
        rows = []
        with tqdm(total=len(items) * len(names), desc="edits", unit="edit", disable=args.quiet) as bar:
            for name in names:
                for item in items:
                    rows.append(_row(name, item, editors, scorer, size, settings, output))
                    bar.update()
    table = summarise(rows, names)
    files.save_json(output / "pie-bench.json", {"settings": settings, "items": len(items), "methods": table})
    files.save_text(output / "pie-bench.csv", _as_csv(rows))
    files.save_text(output / "pie-bench.md", f"{as_table(table)}\n\n{by_kind(table)}\n")
    if not args.quiet:
        skipped = f"left out: {', '.join(scorer.missing)} (see --clip, --dino, --lpips)\n" if scorer.missing else ""
        notes = sum(row["note"] is not None for row in rows)
        wordless = f"{notes} edits were made without their words, see pie-bench.csv\n" if notes else ""
        print(f"{as_table(table)}\n{skipped}{wordless}{output}")
    return 0


def _items(args: Any, output: Path) -> list[Item]:
    """The items that are asked for; drawn ones are written first."""
    folder = args.data
    if folder is None:
        from diffusion_attn.shapes.edits import write_edits
        from diffusion_attn.shapes.models import available

        if args.model not in available():
            raise CommandError(
                "--data is needed: the drawn scenes are for embedded models; give the folder of PIE-Bench_v1."
            )
        folder = str(output / "data")
        write_edits(folder, _DRAWN)
    items = [item for item in load(folder) if args.type is None or item.kind in args.type][: args.count]
    if not items:
        raise CommandError(f"--type {args.type}: {folder!r} has no such items.")
    return items


class _Editors:
    """Every way to edit an item at the size of the model."""

    def __init__(self, stock: Any, args: Any, settings: dict[str, Any]) -> None:
        self.stock, self.args, self.settings = stock, args, settings
        self._made: tuple[str, Any] = ("", None)  # the pipeline in use

    def prepare(self, name: str) -> None:
        """Load what a method needs, which is not its cost."""
        if name != "copy":
            self._pipe("vimaedit" if name == "vimaedit" else "p2p")

    def edit(self, name: str, item: Item, image: Image.Image) -> Edit:
        """The picture ``image`` of ``item``, edited by the method called ``name``."""
        if name == "copy":
            return image, None
        if name == "vae":
            pipe = self._pipe("p2p")
            return pipe.decode_latents(pipe.encode_image(image), "pil")[0], None
        result = self._directly(item, image) if name == "vimaedit" else self._inverted(name, item, image)
        mask = None if result.blend_mask is None or item.blend_words is None else result.blend_mask[0, 0]
        return result.images[0], mask

    def _directly(self, item: Item, image: Image.Image) -> Any:
        return self._pipe("vimaedit")(
            image,
            item.source_prompt,
            item.target_prompt,
            item.blend_words,
            num_inference_steps=self.settings["steps"],
            guidance_scale=self.settings["guidance"],
            cross_replace_steps=self.settings["cross"],
            self_replace_steps=self.settings["self"],
            ip_adapter_scale=self.settings["ip_scale"],
            map_size=self.settings["maps"],
            generator=torch.Generator().manual_seed(self.settings["seed"]),
        )

    def _inverted(self, name: str, item: Item, image: Image.Image) -> Any:
        pipe, guidance = self._pipe("p2p"), self.settings["guidance"]
        words = item.blend_words[:1] if item.blend_words is not None else ()
        # Without a word to learn, what is left of DPL is null-text inversion.
        method = "null-text" if name == "dpl" and not words else name
        steps = self.settings["steps"]
        inversion = inversions.invert(pipe, image, item.source_prompt, method, words, steps=steps, guidance=guidance)
        return pipe(
            target_prompt=item.target_prompt,
            inversion=inversion,
            guidance_scale=guidance,
            edit_type="refine",
            cross_replace_steps=self.settings["cross"],
            self_replace_steps=self.settings["self"],
            blend_words=item.blend_words,
            map_size=self.settings["maps"],
        )

    def _pipe(self, name: str) -> Any:
        from diffusion_attn.editing.network import has_adapters
        from diffusion_attn.pipelines import DPLPipeline

        known, pipe = self._made
        if known == name:
            return pipe
        # Prompt-to-Prompt is to be measured without the adapter, which stays in the UNet.
        if has_adapters(self.stock.unet):
            self.stock.unload_ip_adapter()
        pipe = vimaedit.load(self.stock, self.args) if name == "vimaedit" else DPLPipeline.from_pipe(self.stock)
        self._made = (name, pipe)
        return pipe


def _row(
    name: str, item: Item, editors: _Editors, scorer: EditScorer, size: Any, settings: dict[str, Any], output: Path
) -> dict[str, Any]:
    """The numbers of one edit, made now or by an earlier run.

    Raises:
        CommandError: an earlier run has made them with other settings.
    """
    folder = output / name
    path = folder / f"{item.name}.json"
    # Other data under the same names must not be taken for finished work.
    told = (item.source_prompt, item.target_prompt, item.blend_words, item.code)
    digest = hashlib.sha256(item.path.read_bytes() + repr(told).encode()).hexdigest()[:16]
    settings = {**settings, "item": digest}
    if path.is_file():
        known = _known(path)
        if known.get("settings") != settings:
            raise CommandError(
                f"--output {str(output)!r} holds edits of other data or made with other settings ({path.name} of "
                f"{name}); name another folder, or ask for the same."
            )
        return known["row"]
    files.prepare_folder(folder)
    picture = item.image()
    at_size = picture if picture.size == size else picture.resize(size)
    note = None
    editors.prepare(name)
    with measure(editors.stock.unet.device) as cost:
        try:
            edited, mask = editors.edit(name, item, at_size)
        except (DiffusionAttnError, ValueError) as error:
            if item.blend_words is None:
                raise
            # Words that look nowhere, or are cut off; the benchmark has items without words, which are edited too.
            note = str(error)
            edited, mask = editors.edit(name, replace(item, blend_words=None), at_size)
    edited = edited if edited.size == picture.size else edited.resize(picture.size, Image.Resampling.LANCZOS)
    if settings["jpeg"]:
        edited = _round_trip(edited)
    row = {
        "method": name,
        "item": item.name,
        "type": item.kind,
        **{column: value if math.isfinite(value) else str(value) for column, value in scorer(item, edited).items()},
        "exact": _exact(edited, item.target_prompt),
        "iou": None if mask is None else _overlap(mask, item, picture),
        "seconds": cost.seconds,
        "peak_mb": cost.peak_bytes / 1e6,
        "note": note,
    }
    files.save_png(folder / f"{item.name}.png", edited, {"method": name, **settings})
    files.save_json(path, {"settings": settings, "row": row})
    return row


def _known(path: Path) -> dict[str, Any]:
    """What an earlier run has written of an edit.

    Raises:
        CommandError: it is damaged.
    """
    try:
        known = read_json(path)
        row = known["row"]
        if row.keys() != {"method", "item", "type", "note", *COLUMNS, *_OWN}:
            raise ValueError("its row has other columns")
        summarise([row], [row["method"]])  # which fails at anything but numbers
    except Exception as error:
        raise CommandError(f"{str(path)!r} is damaged ({error}); remove it to edit that picture again.") from error
    return known


def _round_trip(image: Image.Image) -> Image.Image:
    """As a JPEG of Pillow's default quality keeps it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return Image.open(buffer).convert("RGB")


def _exact(image: Image.Image, prompt: str) -> bool | None:
    """Whether an oracle reads exactly the prompt; ``None`` for pictures of something else than shapes."""
    from diffusion_attn.shapes import CaptionError, judge

    try:
        return judge(image, prompt).exact
    except CaptionError:
        return None


def _overlap(mask: torch.Tensor, item: Item, picture: Image.Image) -> float:
    """Intersection over union of a method's mask with the annotated one, without border."""
    size = (picture.height, picture.width)
    found = F.interpolate(mask[None, None].float().cpu(), size)[0, 0] > 0
    known = item.mask(size, border=False) > 0
    return float((found & known).sum() / (found | known).sum())


def summarise(rows: Iterable[dict[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """For each method the means of all items and of those of each type; ``None`` where no item has a number."""
    rows = list(rows)

    def of(part: list[dict[str, Any]]) -> dict[str, Any]:
        numbers: dict[str, Any] = means([{name: float(row[name]) for name in COLUMNS} for row in part])
        for name in _OWN:
            values = [row[name] for row in part if row[name] is not None]
            numbers[name] = fmean(values) if values else math.nan
        return {"items": len(part), **{k: v if math.isfinite(v) else None for k, v in numbers.items()}}

    table = {}
    for name in names:
        own = [row for row in rows if row["method"] == name]
        kinds = sorted({row["type"] for row in own})
        table[name] = {**of(own), "types": {KINDS[kind]: of([r for r in own if r["type"] == kind]) for kind in kinds}}
    return table


_PRINTED: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(("structure", "psnr", "lpips", "mse", "ssim", "clip_whole", "clip_edited"), "{:.2f}".format),
    "exact": "{:.1%}".format,
    "iou": "{:.3f}".format,
    "seconds": "{:.2f}".format,
    "peak_mb": "{:.0f}".format,
}


def as_table(table: dict[str, Any]) -> str:
    """A Markdown table of the methods, with the columns that any of them has a number in."""
    return _markdown({"method": list(table)}, list(table.values()))


def by_kind(table: dict[str, Any]) -> str:
    """The same for each type of edit."""
    cells = [(kind, name, part) for name, row in table.items() for kind, part in row["types"].items()]
    cells.sort(key=lambda cell: KINDS.index(cell[0]))
    first = {"type": [kind for kind, _, _ in cells], "method": [name for _, name, _ in cells]}
    return _markdown(first, [part for _, _, part in cells])


def _markdown(first: dict[str, list[str]], rows: list[dict[str, Any]]) -> str:
    shown = [name for name in _PRINTED if any(row[name] is not None for row in rows)]
    lines = [[*first, "items", *(name.replace("_", " ") for name in shown)]]
    lines.append(["---"] * len(first) + ["---:"] * (1 + len(shown)))
    for index, row in enumerate(rows):
        numbers = ["" if row[name] is None else _PRINTED[name](row[name]) for name in shown]
        lines.append([*(column[index] for column in first.values()), str(row["items"]), *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _as_csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
