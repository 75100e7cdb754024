"""The model of ``--model``: found, loaded, and asked for its native size and defaults."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from diffusion_attn.cli.errors import CommandError
from diffusion_attn.cli.quiet import silence
from diffusion_attn.core import sizes
from diffusion_attn.core.errors import UnsupportedModelError, is_out_of_memory
from diffusion_attn.core.loading import WEIGHTS_ONLY, find_model
from diffusion_attn.methods.checkpoints import local_folder

Size = tuple[int, int]
"""Width and height in pixels."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NEEDED = ("prompt", "width", "height", "num_inference_steps", "generator")
_EMBEDDED_STEPS = 30
_EMBEDDED_GUIDANCE = {"shapes-flux": 3.0, "shapes-sd": 2.0}  # what their cards recommend


def check_model(model: str, option: str = "--model") -> None:
    """Refuse, before anything is loaded, a ``model``, given as ``option``, that cannot be one.

    Raises:
        CommandError: it is neither an embedded model, nor a diffusers folder, nor of the form of a Hub id.
    """
    from diffusion_attn.shapes.models import available

    path = Path(model).expanduser()
    if model in available() or (path / "model_index.json").is_file():
        return
    if path.is_dir():
        raise CommandError(
            f"{option} {model!r} is a folder without model_index.json, so not a diffusers pipeline; give the folder "
            "that save_pretrained wrote."
        )
    if not is_hub_id(model):
        raise CommandError(
            f"{option} {model!r} was not found: it is no folder here, and no embedded model (there are: "
            f"{', '.join(available()) or 'none'}); give one of these, or a Hub id of the form owner/name."
        )


def check_weights(weights: str, option: str) -> None:
    """Refuse, before anything is loaded, ``weights`` of a method, given as ``option``, that cannot be any.

    Raises:
        CommandError: they are neither here, nor come with the package, nor have the form of a Hub id.
    """
    here = Path(weights).expanduser().is_file() or local_folder(weights) is not None
    if not here and not is_hub_id(weights):
        raise CommandError(
            f"{option} {weights!r} was not found: there is no such folder or file here; give one that is there, or a "
            "Hub id of the form owner/name."
        )


def load_model(model: str, dtype: Any, device: Any, option: str = "--model") -> Any:
    """Load a pipeline, given as ``option``, onto ``device``: an embedded one, a folder's or the Hub's, in this order.

    Raises:
        CommandError: it cannot be loaded.
        UnsupportedModelError: it does not make pictures from prompts.
    """
    from diffusion_attn.shapes.models import load_pipeline

    path = Path(model).expanduser()
    try:
        if _is_embedded(model):
            with silence():  # it takes a moment only, not worth several progress bars
                pipe = load_pipeline(model, dtype=dtype)
        else:
            from diffusers import DiffusionPipeline

            pipe = DiffusionPipeline.from_pretrained(find_model(model), dtype=dtype, **WEIGHTS_ONLY)
        pipe.to(device)
    except Exception as error:  # loaders raise whatever the broken file or the connection made them raise
        if is_out_of_memory(error):
            raise
        remedy = "check the folder" if path.is_dir() else "check the name and the connection, or give a local folder"
        raise CommandError(f"{option} {model!r} could not be loaded ({reason(error)}); {remedy}.") from error
    missing = [name for name in _NEEDED if name not in parameters_of(pipe)]
    if missing:
        raise UnsupportedModelError(
            f"{option} {model!r} is a {type(pipe).__name__}, whose call takes no {missing[0]!r}; give a text-to-image "
            "pipeline."
        )
    return pipe


def check_unet(pipe: Any, model: str) -> None:
    """Refuse a pipeline, given as ``--model``, whose pictures cannot be edited.

    Raises:
        UnsupportedModelError: it has no UNet.
    """
    if getattr(pipe, "unet", None) is None:
        raise UnsupportedModelError(
            f"--model {model!r} is a {type(pipe).__name__}; edit takes Stable Diffusion 1, 2 or XL, such as the "
            "embedded shapes-sd."
        )


def add_word_maps_argument(parser: Any) -> None:
    """Add where words are looked for."""
    parser.add_argument(
        "--maps",
        type=int,
        choices=(1, 2, 4, 8),
        metavar="N",
        help="words are looked for in attention N times smaller than the latent; by default 4, for shapes-sd 1",
    )


def show_everything(pipe: Any) -> None:
    """Take off a pipeline's safety checker: the black pictures it gives are no data to learn or measure from."""
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None


def native_size(pipe: Any) -> Size:
    """Width and height in pixels that the model was trained at.

    Raises:
        CommandError: the model does not tell.
    """
    size = sizes.native_size(pipe)
    if size is None:
        raise CommandError("--size is needed: this model does not record the size it was trained at.")
    return size[1], size[0]


def check_size(pipe: Any, size: Size, option: str = "--size") -> None:
    """Refuse sizes, given as ``option``, that the model cannot draw.

    Raises:
        CommandError: names the nearest size that it can.
    """
    step = sizes.size_multiple(pipe)
    if any(side % step for side in size):
        width, height = (max(step, round(side / step) * step) for side in size)
        raise CommandError(
            f"{option} {size[0]}x{size[1]}: sides have to be multiples of {step} pixels with this model; the nearest "
            f"such size is {width}x{height}."
        )


def default_steps(pipe: Any, model: str) -> int:
    """Steps of a run unless ``--steps`` says otherwise: the pipeline's own default, fewer for embedded models."""
    return _EMBEDDED_STEPS if _is_embedded(model) else parameters_of(pipe)["num_inference_steps"].default


def run_settings(pipe: Any, args: Any, size: Size) -> dict[str, Any]:
    """What is written beside the pictures of a run: ``model``, ``size``, ``steps`` and ``guidance``.

    Args:
        pipe: the model.
        args: have ``model``, ``steps`` and ``guidance``, the latter two ``None`` for the model's defaults.
        size: width and height in pixels.

    Raises:
        CommandError: guidance is asked of a pipeline that has none.
    """
    return {
        "model": args.model,
        "size": list(size),
        "steps": args.steps or default_steps(pipe, args.model),
        "guidance": guidance_of(pipe, args.model, args.guidance),
    }


def word_maps_of(pipe: Any, model: str, size: Size, factor: int | None) -> Size:
    """``(height, width)`` of the maps in which words are looked for, in a picture of ``size`` ``(width, height)``.

    Args:
        factor: by how much each side is smaller than the latent's; ``None``: 4, but for embedded models, whose words
            look at single cells of the finest level, 1.
    """
    from diffusion_attn.editing.layers import reduced

    width, height = (side // pipe.vae_scale_factor for side in size)
    return reduced((height, width), factor or (1 if _is_embedded(model) else 4))


def guidance_of(pipe: Any, model: str, asked: float | None) -> float | None:
    """The guidance scale of a run: what is ``asked``, else the model's default; ``None`` if there is no such thing.

    Raises:
        CommandError: one is asked of a pipeline that has none.
    """
    parameter = parameters_of(pipe).get("guidance_scale")
    if parameter is None and asked is not None:
        raise CommandError(f"--guidance {asked}: a {type(pipe).__name__} takes no guidance scale; leave it out.")
    if asked is not None or parameter is None:
        return asked
    if _is_embedded(model):
        return _EMBEDDED_GUIDANCE[model]
    # Without that input (FLUX.1-schnell) guidance costs a second evaluation, which nobody has asked for.
    takes_it = getattr(pipe, "transformer", None) is None or pipe.transformer.config.get("guidance_embeds", True)
    return parameter.default if takes_it else 1.0


def is_hub_id(name: str) -> bool:
    """Whether a name could be one; ``outputs/student`` could."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def _is_embedded(model: str) -> bool:
    from diffusion_attn.shapes.models import available

    return model in available()


def parameters_of(pipe: Any) -> Any:
    """The parameters of a pipeline's call, by name."""
    return inspect.signature(pipe.__call__).parameters


def reason(error: Exception) -> str:
    """The first clause of a loader's message, which may run over many lines."""
    message = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"\. | \(", message)[0][:300].rstrip(".")
