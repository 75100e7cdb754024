"""The configs that plans are made from: of well-known models, that come with the package, and of any other's files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.planning.forecast import on_meta

_FOLDER = Path(__file__).parent / "configs"
_TEXT_TOKENS = {"FluxTransformer2DModel": 512, "SD3Transformer2DModel": 333, "UNet2DConditionModel": 77}


@dataclass(frozen=True)
class Layout:
    """A model without weights: the configs of its parts as diffusers writes them, and the length of its prompts."""

    denoiser_config: dict[str, Any]
    vae_config: dict[str, Any]
    text_tokens: int

    @property
    def family(self) -> str:
        """The class of the denoiser."""
        return self.denoiser_config["_class_name"]

    @property
    def scale(self) -> int:
        """Pixels to a latent cell, along each side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def denoiser(self, dtype: torch.dtype) -> Any:
        """The denoiser on the meta device."""
        return _build(self.denoiser_config, dtype)

    def vae(self, dtype: torch.dtype) -> Any:
        """The autoencoder on the meta device."""
        return _build(self.vae_config, dtype)


def known() -> list[str]:
    """The names of the models whose configs come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_layout(model: str, **hub: Any) -> Layout:
    """The layout of a model, from its config files; no weights are read.

    Args:
        model: one of `known`, an embedded model, a local diffusers folder or a Hub id, looked for in this order.
        hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ...

    Raises:
        UnsupportedModelError: it has no denoiser, or one that no plan can be made for.
        OSError: a file is not there.
    """
    if model in known():
        stored = json.loads((_FOLDER / f"{model}.json").read_text(encoding="utf-8"))
        return Layout(stored["denoiser"], stored["vae"], stored["text_tokens"])
    from diffusers import AutoencoderKL, DiffusionPipeline

    from diffusion_attn.shapes.models import FOLDER, available

    where = FOLDER / model if model in available() else Path(model).expanduser()
    path = str(where) if where.is_dir() else model
    index = DiffusionPipeline.load_config(path, **hub)
    part = next((name for name in ("unet", "transformer") if name in index), None)
    name = index[part][-1] if part and isinstance(index[part], list) and index[part] else "nothing"
    if not isinstance(name, str) or name not in _TEXT_TOKENS:
        raise UnsupportedModelError(
            f"the model {model!r} has {name} for a denoiser; plans are made for {', '.join(_TEXT_TOKENS)}."
        )
    # load_config is the same for every class.
    denoiser, vae = (AutoencoderKL.load_config(path, subfolder=folder, **hub) for folder in (part, "vae"))
    found = denoiser.get("_class_name"), vae.get("_class_name")
    if found != (name, "AutoencoderKL") or not isinstance(vae.get("block_out_channels"), list):
        raise UnsupportedModelError(
            f"the configs of the model {model!r} are of {found[0]} and {found[1]}, or damaged; plans are made of "
            f"{name} and AutoencoderKL."
        )
    return Layout(denoiser, vae, _TEXT_TOKENS[name])


def _build(config: dict[str, Any], dtype: torch.dtype) -> Any:
    import diffusers

    name = config["_class_name"]
    try:
        return on_meta(getattr(diffusers, name), config, dtype)
    except Exception as error:  # diffusers' models raise whatever their values made them raise
        raise UnsupportedModelError(f"the config of a {name} cannot be built ({error}); get it again.") from error
