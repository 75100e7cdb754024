"""LinFusion: self-attention in linear time, with weights distilled from the model's own (arXiv 2409.02097).

Published checkpoints for Stable Diffusion 1.5, 2.1 and XL load unchanged. The base model's weights are left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion_attn.core.errors import CheckpointFormatError, UnsupportedModelError
from diffusion_attn.core.method import Attachment, Plan, Target
from diffusion_attn.core.processors import check_exact
from diffusion_attn.core.tensors import read_tensors
from diffusion_attn.core.unet_layout import spatial_self_attentions
from diffusion_attn.methods import checkpoints
from diffusion_attn.methods.linfusion.layers import (
    BASES,
    LINEARS,
    LayerConfig,
    LinFusionLayer,
    describe_layers,
    layers_of,
)
from diffusion_attn.methods.linfusion.processor import LinFusionProcessor
from diffusion_attn.methods.stand_in import base_layer, check_place, check_projections, place_layer

MidDim = int | Callable[[int], int | None] | None


@dataclass(frozen=True, eq=False)
class LinFusion:
    """Linear attention in place of every spatial self-attention, with weights of its own.

    Made by `from_pretrained`, `for_pipeline` or `for_model`. The layers hold complete weights (queries, keys, values,
    output, and two small networks on queries and keys): while enabled they stand in for the base model's, which stay
    where they are, so that saving the UNet saves the base model. Memory: the layers' weights come on top, 0.2 GB for
    SD 1.5 and 2.1 and 0.9 GB for SDXL in 16 bit, on the device where the UNet last ran.

    Args:
        layers: what each layer stands in for, in the published order.
        weights: the layers; its parameters are the live tensors that the enabled model computes with.
        source: where the weights come from, for the record.
        base_weights: where the base's idle projections are kept while enabled: ``"device"``; ``"cpu"`` or ``"disk"``
            frees about as much memory as the layers take (and does nothing under offloading, which moves them itself);
            move the pipeline to its device before, ``to`` takes them along.
        dtype: of the layers while enabled: ``None`` casts them, in place, to the UNet's; a trainer pins
            ``torch.float32`` and runs a 16-bit UNet under autocast.
    """

    name: ClassVar[str] = "linfusion"

    layers: tuple[LayerConfig, ...] = field(repr=False, metadata={"option": False})
    weights: nn.ModuleList = field(repr=False, metadata={"option": False})
    source: str | None = field(default=None, metadata={"option": False})
    base_weights: str = "device"
    dtype: torch.dtype | None = field(default=None, repr=False, metadata={"option": False})

    def __post_init__(self) -> None:
        check_place(self.base_weights)

    # ---- made

    @classmethod
    def from_pretrained(
        cls, id_or_dir: str | os.PathLike[str], *, base_weights: str = "device", **hub: Any
    ) -> LinFusion:
        """Load weights in the published format, in the dtype they are stored in.

        Args:
            id_or_dir: a Hub id such as ``"Yuanshi/LinFusion-XL"``, or a local folder.
            base_weights: see the class.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ...

        Raises:
            CheckpointFormatError: files or keys are missing, unexpected, of another shape, or cannot be read.
            DiffusionAttnError: nothing is there.
        """
        check_place(base_weights)
        config = checkpoints.read_json(checkpoints.locate(id_or_dir, "config.json", **hub))
        entries = config.get("modules_list") if isinstance(config, dict) else None
        if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_LAYERS:
            raise CheckpointFormatError(
                f"config.json of {str(id_or_dir)!r} has no modules_list, or one of too many layers, so it does not "
                "describe LinFusion weights; give a folder or Hub id of the published format."
            )
        layers = [LayerConfig.parse(entry) for entry in entries]
        tensors = read_tensors(checkpoints.locate(id_or_dir, checkpoints.WEIGHTS, **hub))
        with torch.device("meta"):
            weights = _build(layers)
        checkpoints.check_tensors(tensors, weights.state_dict(), f"LinFusion weights in {str(id_or_dir)!r}")
        weights.load_state_dict(tensors, assign=True)
        return cls(tuple(layers), weights, str(id_or_dir), base_weights)

    @classmethod
    def for_pipeline(cls, pipe: Any, *, base_weights: str = "device", **hub: Any) -> LinFusion:
        """Load the published weights that belong to a pipeline's UNet, as its structure tells.

        Raises:
            UnsupportedModelError: there are none for it.
        """
        unet = getattr(pipe, "unet", pipe)
        unet = _check_unet(unet)
        layers = layers_of(unet)
        heads = {(layer.dim_n, layer.heads) for layer in layers}
        for base in BASES:
            told = (base.heads, base.layers, base.cross_attention_dim)
            if told == (heads, len(layers), unet.config.cross_attention_dim):
                return cls.from_pretrained(base.weights, base_weights=base_weights, **hub)
        raise UnsupportedModelError(
            f"no published LinFusion weights belong to this UNet: {describe_layers(layers)}; load your own with "
            "LinFusion.from_pretrained, or start new ones with LinFusion.for_model and distil them."
        )

    @classmethod
    def for_model(cls, unet: Any, mid_dim: MidDim = None, *, base_weights: str = "device") -> LinFusion:
        """New layers that start from a UNet's own attention weights, to be distilled.

        The projections add nothing at first, so queries, keys and values are the base model's; only the softmax is
        gone. (The official training script starts from random weights instead.)

        Args:
            unet: the teacher; its device and dtype are the layers'.
            mid_dim: width inside the projections: ``None`` for the layer's own, an int, ``-1`` for no projections, or
                a function of the layer's width (the published XL weights: ``lambda width: width // 16``).

        Raises:
            UnsupportedModelError: it has no spatial self-attention, or quantised ones.
        """
        from accelerate.utils import align_module_device

        unet = _check_unet(unet)
        attentions = dict(spatial_self_attentions(unet))
        layers = []
        for layer in layers_of(unet):
            check_projections(layer.module_name, attentions[layer.module_name], LINEARS, "LinFusion")
            mid = mid_dim(layer.dim_n) if callable(mid_dim) else mid_dim
            layers.append(LayerConfig(layer.module_name, layer.dim_n, layer.heads, mid))
        base = base_layer(attentions[layers[0].module_name].to_q)
        with align_module_device(base):  # under sequential offloading weights are elsewhere between calls
            device, dtype = base.weight.device, base.weight.dtype
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the user's GPUs too
            weights = _build(layers).to(device, dtype)
        for layer, module in zip(layers, weights, strict=True):
            module.start_from(attentions[layer.module_name])  # type: ignore[operator]
        return cls(tuple(layers), weights, None, base_weights)

    # ---- weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensors by their published names, ``"0.to_q.weight"``, ..."""
        return self.weights.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of the published names into the live ones.

        Raises:
            CheckpointFormatError: names or shapes do not agree; nothing is changed then.
        """
        checkpoints.check_tensors(state_dict, self.state_dict(), "state_dict")
        self.weights.load_state_dict(state_dict)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The live parameters, as an optimiser wants them."""
        return self.weights.parameters()

    def to(self, *args: Any, **kwargs: Any) -> LinFusion:
        """Move or cast the layers in place, as ``torch.nn.Module.to``."""
        self.weights.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors`` in the published format."""
        checkpoints.write_folder(folder, self.state_dict(), {"config.json": self.config_text()})

    def config_text(self) -> str:
        """The content of ``config.json``."""
        import diffusers

        config = {
            "_class_name": "LinFusion",
            "_diffusers_version": diffusers.__version__,
            "modules_list": [asdict(layer) for layer in self.layers],
        }
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # ---- enabled, trained

    def plan(self, target: Target) -> Plan:
        """Check that the weights belong to the UNet; see `Method.plan`.

        Raises:
            UnsupportedModelError: not a UNet, or quantised.
            CheckpointFormatError: the weights are another model's.
            MethodConflictError: a layer has a processor that is more than stock attention.
        """
        attentions = dict(spatial_self_attentions(_check_unet(target.denoiser)))
        there = layers_of(target.denoiser)
        wanted, found = (sorted((x.module_name, x.dim_n, x.heads) for x in layers) for layers in (self.layers, there))
        if wanted != found:
            raise CheckpointFormatError(
                f"these LinFusion weights are for {describe_layers(self.layers)}, and the UNet is "
                f"{describe_layers(there)}; give weights that were made for it (LinFusion.for_pipeline(pipe) finds "
                "published ones, if there are any)."
            )
        for name, attn in attentions.items():
            check_projections(name, attn, LINEARS, "LinFusion")
            if not isinstance(attn.processor, LinFusionProcessor):
                check_exact(name, attn.processor)
        names = [layer.module_name for layer in self.layers]
        return Plan(names, _Install(self, target.denoiser), frozenset(names), "leave LinFusion out")

    def attentions(self, unet: nn.Module) -> list[tuple[str, nn.Module]]:
        """``(name, attention module)`` of a UNet for each layer: distillation compares a student's with a teacher's."""
        return [(layer.module_name, unet.get_submodule(layer.module_name)) for layer in self.layers]


@dataclass(frozen=True)
class _Install:
    """Puts a `LinFusion` in force on a UNet."""

    method: LinFusion
    unet: Any

    def __call__(self, attachment: Attachment) -> None:
        pinned, parked = self.method.dtype is not None, self.method.base_weights != "device"
        for config, layer in zip(self.method.layers, self.method.weights, strict=True):
            attn = self.unet.get_submodule(config.module_name)
            assert isinstance(layer, LinFusionLayer)
            place_layer(attachment, self.unet, attn, layer, LINEARS, self.method.dtype, self.method.base_weights)
            processor = LinFusionProcessor(layer, pinned, parked)
            attachment.when_undone(processor.forget)
            attachment.process(config.module_name, attn, processor)


_MOST_LAYERS = 4096


def _build(layers: list[LayerConfig]) -> nn.ModuleList:
    return nn.ModuleList(LinFusionLayer(layer.dim_n, layer.projection_mid_dim) for layer in layers)


def _check_unet(unet: Any) -> Any:
    """The UNet, taken out of its ``torch.compile`` wrapper."""
    from diffusers import UNet2DConditionModel, UNetMotionModel

    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, (UNet2DConditionModel, UNetMotionModel)):
        raise UnsupportedModelError(
            f"LinFusion stands in for the self-attention of UNets, and this is a {type(unet).__name__}; for FLUX and "
            "SD3 local attention (CLEAR) is what serves large pictures."
        )
    if not any(True for _ in spatial_self_attentions(unet)):
        raise UnsupportedModelError("this UNet has no spatial self-attention that LinFusion could stand in for.")
    return unet
