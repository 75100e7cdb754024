"""CLEAR: attention inside a disc around each image token, for FLUX and Stable Diffusion 3 (arXiv 2412.16112).

Published weights for FLUX.1-dev load unchanged, and serve FLUX.1-schnell; without weights the rule alone is applied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import nn

from diffusion_attn.core.errors import CheckpointFormatError, UnsupportedModelError
from diffusion_attn.core.joint_layout import attentions
from diffusion_attn.core.method import Attachment, Plan, Target
from diffusion_attn.core.processors import check_exact
from diffusion_attn.core.tensors import read_tensors
from diffusion_attn.methods import checkpoints
from diffusion_attn.methods.clear.layers import ClearLayer, ClearWeights, linears
from diffusion_attn.methods.clear.processor import ClearProcessor
from diffusion_attn.methods.clear.rule import Rule
from diffusion_attn.methods.clear.tokens import FluxTokens, reader_for
from diffusion_attn.methods.stand_in import base_layer, check_place, check_projections, place_layer
from diffusion_attn.ops.local_attention import Backend

PUBLISHED = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?\.safetensors")
"""The name of a published file, which alone tells the radius."""


@dataclass(frozen=True, eq=False)
class Clear:
    """Local attention in all layers of a diffusion transformer: cost grows with the image, not with its square.

    An image token sees the text and the image tokens whose distance is below ``radius``; text sees everything. Made as
    it is, with the model's own weights, or by `from_pretrained`, `for_pipeline` or `for_model` with weights that were
    trained for the rule. Those stand in for the model's while enabled, which stay where they are; memory: 3.6 GB on top
    for FLUX.1 in 16 bit.

    Args:
        radius: of the disc, in image tokens (16 x 16 pixels each in FLUX and SD3). Published weights: 8, 16, 32.
        down_factor: above 1, image tokens also see weighted sums of keys and values over cells of so many rows and
            columns, which helps small radii, and costs (the number of tokens / down_factor) squared. Published: 4.
        proportional: scale scores with the logarithm of the sequence's length, for images larger than those of the
            training; its authors use it in image-to-image runs.
        ntk_factor: factor of the rotary embedding's base (FLUX); 10 in its authors' runs above 1024 pixels.
        backend: of the attention, see `diffusion_attn.ops.local_attention`.
        base_weights: where the model keeps idle projections while enabled: ``"device"``; ``"cpu"`` or ``"disk"`` frees
            about as much memory as the weights take (and does nothing under offloading, which moves them itself); move
            the pipeline to its device before, ``to`` takes them along.
        weights: the layers' weights; its parameters are the live tensors that the enabled model computes with.
        source: where the weights come from, for the record.
        dtype: of the weights while enabled: ``None`` casts them, in place, to the model's; a trainer pins
            ``torch.float32`` and runs a 16-bit model under autocast.
    """

    name: ClassVar[str] = "clear"

    radius: int = 16
    down_factor: int = 1
    proportional: bool = False
    ntk_factor: float = 1.0
    backend: Backend = "auto"
    base_weights: str = "device"
    weights: ClearWeights | None = field(default=None, repr=False, metadata={"option": False})
    source: str | None = field(default=None, metadata={"option": False})
    dtype: torch.dtype | None = field(default=None, repr=False, metadata={"option": False})

    def __post_init__(self) -> None:
        for option in ("radius", "down_factor"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise ValueError(f"{option}={value!r}: expected a whole number, 1 or more.")
        if not self.ntk_factor > 0:
            raise ValueError(f"ntk_factor={self.ntk_factor!r}: expected a number above 0; 1 changes nothing.")
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend={self.backend!r}: expected one of {', '.join(get_args(Backend))}.")
        check_place(self.base_weights)
        if self.weights is not None and (factor := _pooled(self.weights)) != self.down_factor:
            raise ValueError(
                f"down_factor={self.down_factor}: the weights are of down_factor={factor}; load others, or leave it."
            )

    # ---- made

    @classmethod
    def from_pretrained(
        cls,
        id_or_file: str | os.PathLike[str],
        radius: int | None = None,
        down_factor: int | None = None,
        **options: Any,
    ) -> Clear:
        """Load weights in the published format, in the dtype they are stored in.

        Args:
            id_or_file: a Hub id such as ``"Huage001/CLEAR"``, a local folder, or a file.
            radius: which file of several; for a file of another name than the published ones, what it was trained for.
            down_factor: which file of several, of one radius the one without pooling by default; checked against the
                weights.
            options: of the class, and of the Hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ...

        Raises:
            ValueError: the radius cannot be told from a name and is not given, or contradicts it.
            CheckpointFormatError: keys are missing, unexpected or of another shape, or the file cannot be read.
            DiffusionAttnError: nothing is there.
        """
        own = {option.name for option in fields(cls)} - {"weights", "source", "dtype", "radius", "down_factor"}
        hub = {name: options.pop(name) for name in list(options) if name not in own}
        # What is wrong with options shows before anything is loaded.
        cls(1 if radius is None else radius, 1 if down_factor is None else down_factor, **options)
        checkpoints.check_hub_options(hub)
        path, radius, expected = _find(id_or_file, radius, down_factor, hub)
        tensors = read_tensors(path)
        weights, found = ClearWeights.parse(tensors, f"CLEAR weights in {path.name!r}")
        if expected is not None and found != expected:
            raise CheckpointFormatError(
                f"{path.name!r} holds weights of down_factor={found}, and down_factor={expected} was expected; give "
                "down_factor as it is, or the other file."
            )
        checkpoints.check_tensors(tensors, weights.published(), f"CLEAR weights in {path.name!r}")
        weights.adopt(tensors)
        return cls(radius, found, **options, weights=weights, source=f"{id_or_file} ({path.name})")

    @classmethod
    def for_pipeline(cls, pipe: Any, *, radius: int | None = None, down_factor: int = 1, **options: Any) -> Clear:
        """Load the published weights that belong to a pipeline's transformer, as its structure tells.

        Args:
            pipe: a pipeline or transformer.
            radius: as published; by default 16 for FLUX.1, and 8 for the embedded shapes-flux.
            down_factor: as published: 4 beside 1 for FLUX.1, and 2 for shapes-flux.
            options: as for `from_pretrained`.

        Raises:
            UnsupportedModelError: there are none for it.
        """
        transformer = getattr(pipe, "transformer", pipe)
        reader_for(getattr(transformer, "_orig_mod", transformer))
        config = transformer.config
        structure = tuple(config.get(name) for name in ("num_layers", "num_single_layers", "num_attention_heads"))
        if structure not in BASES:
            raise UnsupportedModelError(
                f"no published CLEAR weights belong to this {type(transformer).__name__}, of "
                f"{sum(1 for _ in attentions(transformer))} attention layers; use Clear(radius=...) for the rule "
                "alone, or distil weights (Clear.for_model)."
            )
        source, usual = BASES[structure]
        return cls.from_pretrained(source, usual if radius is None else radius, down_factor, **options)

    @classmethod
    def for_model(cls, transformer: Any, radius: int = 16, down_factor: int = 1, **options: Any) -> Clear:
        """Weights that start from a transformer's own, to be distilled.

        Args:
            transformer: the teacher; its device and dtype are the layers'.
            radius, down_factor, options: of the class.

        Raises:
            UnsupportedModelError: it is not of a family that is served, or quantised.
        """
        from accelerate.utils import align_module_device

        transformer = getattr(transformer, "_orig_mod", transformer)
        reader_for(transformer)
        cls(radius, down_factor, **options)
        layers = []
        for name, attn in attentions(transformer):
            check_projections(name, attn, linears(attn), "Clear")
            base = base_layer(attn.to_q)
            with align_module_device(base):  # under sequential offloading weights are elsewhere between calls
                device, dtype = base.weight.device, base.weight.dtype
            with torch.device("meta"):
                layer = ClearLayer.like(attn, down_factor)
            if down_factor > 1:
                mean = torch.full(layer.spatial_weight.shape, down_factor**-2.0, dtype=dtype, device=device)
                layer.spatial_weight = nn.Parameter(mean)
            layer.start_from(attn)
            layers.append((name, layer))
        return cls(radius, down_factor, **options, weights=ClearWeights.of(layers))

    # ---- weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensors by their published names; none for the rule alone."""
        return {} if self.weights is None else self.weights.published()

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of the published names into the live ones.

        Raises:
            CheckpointFormatError: names or shapes do not agree; nothing is changed then.
        """
        own = self.state_dict()
        checkpoints.check_tensors(state_dict, own, "state_dict")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state_dict[name])

    def parameters(self) -> Iterator[nn.Parameter]:
        """The live parameters, as an optimiser wants them; none for the rule alone."""
        return iter(()) if self.weights is None else self.weights.parameters()

    def to(self, *args: Any, **kwargs: Any) -> Clear:
        """Move or cast the weights in place, as ``torch.nn.Module.to``."""
        if self.weights is not None:
            self.weights.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a file of the published format and name, ``clear_local_RADIUS.safetensors``, into a folder.

        Raises:
            ValueError: there are no weights, only the rule.
        """
        if self.weights is None:
            raise ValueError("Clear without weights has nothing to save; make it with for_model or from_pretrained.")
        checkpoints.write_folder(folder, self.state_dict(), {}, _file_name(self.radius, self.down_factor))

    # ---- enabled, trained

    def plan(self, target: Target) -> Plan:
        """Check that the transformer is served and the weights are its; see `Method.plan`.

        Raises:
            UnsupportedModelError: not a transformer of a family that is served, quantised, or run in parallel.
            CheckpointFormatError: the weights are another model's.
            MethodConflictError: a layer has a processor that is more than stock attention.
        """
        transformer: Any = target.denoiser
        reader = reader_for(transformer)
        if self.ntk_factor != 1 and reader is not FluxTokens:
            raise UnsupportedModelError(
                f"ntk_factor={self.ntk_factor} scales FLUX's rotary embedding, and {type(transformer).__name__} has "
                "none; leave it at 1."
            )
        if getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None) is not None:
            raise UnsupportedModelError(
                "the transformer runs with context parallelism, which gives each device a part of the tokens, and "
                "local attention needs the whole grid; load it without enable_parallelism."
            )
        layers = dict(attentions(transformer))
        if self.weights is not None:
            self._check_weights(layers, type(transformer).__name__)
        for name, attn in layers.items():
            if getattr(attn.processor, "rule", None) is None:  # else this is in force, and about to be replaced
                check_exact(name, attn.processor)
        return Plan(list(layers), _Install(self, transformer), frozenset(layers), "leave Clear out", reads_steps=False)

    def attentions(self, transformer: nn.Module) -> list[tuple[str, nn.Module]]:
        """``(name, attention module)`` of a transformer for each layer, which distillation compares."""
        return list(attentions(transformer))

    def _check_weights(self, layers: dict[str, nn.Module], model: str) -> None:
        for name, attn in layers.items():
            check_projections(name, attn, linears(attn), "Clear")
        with torch.device("meta"):
            fitting = ClearWeights.of((name, ClearLayer.like(attn, self.down_factor)) for name, attn in layers.items())
        checkpoints.check_tensors(self.state_dict(), fitting.published(), f"CLEAR weights for this {model}")


BASES: dict[tuple[Any, ...], tuple[str, int]] = {
    (19, 38, 24): ("Huage001/CLEAR", 16),
    (3, 6, 6): ("shapes-clear", 8),
}
"""Published weights and their usual radius by (double, single) layers and heads."""


@dataclass(frozen=True)
class _Install:
    """Puts a `Clear` in force on a transformer."""

    method: Clear
    transformer: Any

    def __call__(self, attachment: Attachment) -> None:
        method, transformer = self.method, self.transformer
        rule = Rule(method.radius, method.down_factor, method.proportional, method.backend)
        reader = reader_for(transformer)(rule, transformer.config.attention_head_dim)
        reader.install(attachment, transformer)
        if method.ntk_factor != 1:
            attachment.after(transformer.pos_embed, _Stretch(method.ntk_factor))
        own = {} if method.weights is None else dict(method.weights.layers())
        pinned, parked = method.dtype is not None, method.base_weights != "device"
        for name, attn in attentions(transformer):
            layer = own.get(name)
            if layer is not None:
                place_layer(attachment, transformer, attn, layer, linears(attn), method.dtype, method.base_weights)
            processor = ClearProcessor(rule, layer, pinned, parked)
            attachment.when_undone(processor.forget)
            attachment.process(name, attn, processor)


@dataclass(frozen=True)
class _Stretch:
    """Forward hook on FLUX's rotary embedding: the same with ``factor`` times its base."""

    factor: float

    def __call__(self, module: Any, args: tuple, output: Any) -> Any:
        stretched = type(module)(theta=module.theta * self.factor, axes_dim=module.axes_dim)
        return stretched.forward(*args)


def _file_name(radius: int, down_factor: int) -> str:
    return f"clear_local_{radius}{f'_down_{down_factor}' if down_factor > 1 else ''}.safetensors"


def _find(
    id_or_file: str | os.PathLike[str], radius: int | None, factor: int | None, hub: dict[str, Any]
) -> tuple[Path, int, int | None]:
    """The file, its radius, and the down factor that it should have if that is known."""
    path = Path(id_or_file).expanduser()
    folder = checkpoints.local_folder(id_or_file)
    if not path.is_file() and folder is not None and radius is None:
        named = [(file, match) for file in sorted(folder.iterdir()) if (match := PUBLISHED.fullmatch(file.name))]
        if factor is None and len({match[1] for _, match in named}) == 1 and any(not match[2] for _, match in named):
            factor = 1  # as where the radius is given
        files = [file for file, match in named if factor in (None, int(match[2] or 1))]
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            remedy = "the one that is meant, or its radius= and down_factor=" if files else "a folder of CLEAR weights"
            raise CheckpointFormatError(
                f"folder {str(id_or_file)!r} has {len(files)} files of CLEAR's names, and one is needed ({found}); "
                f"give {remedy}."
            )
        path = files[0]
    if not path.is_file():
        if path.suffix == ".safetensors":
            raise CheckpointFormatError(f"there is no file {str(id_or_file)!r}; give one that is there, or a Hub id.")
        if radius is None:
            raise ValueError(
                f"{str(id_or_file)!r} is no folder or file here, and radius is needed to choose among files on the "
                "Hub; give radius=, 8, 16 or 32 as published."
            )
        return checkpoints.locate(id_or_file, _file_name(radius, factor or 1), **hub), radius, factor or 1
    match = PUBLISHED.fullmatch(path.name)
    if match is None and radius is None:
        raise ValueError(
            f"the name {path.name!r} does not tell the radius, and nothing in the file does; give radius=, in tokens."
        )
    told = radius if match is None else int(match[1])
    if radius not in (None, told):
        raise ValueError(
            f"radius={radius}: {path.name!r} was trained for {told}; leave radius out, and use dataclasses.replace "
            "to try the weights with another."
        )
    assert told is not None
    return path, told, factor if match is None else (factor or int(match[2] or 1))


def _pooled(weights: ClearWeights) -> int:
    layers = [layer for _, layer in weights.layers()]
    return int(layers[0].spatial_weight.shape[3]) if hasattr(layers[0], "spatial_weight") else 1
