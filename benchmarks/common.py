"""What benchmarks share: UNet layouts, FLOP counts, other people's methods to compare with, results and tables."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from diffusion_attn.bench.table import table as table
from diffusion_attn.core.reading import read_json
from diffusion_attn.core.session import bind_call
from diffusion_attn.core.unet_layout import attention_levels, mirror
from diffusion_attn.metrics import turns
from diffusion_attn.metrics.cost import Cost
from diffusion_attn.metrics.machine import device_slug
from diffusion_attn.metrics.machine import machine as machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DTYPES = ("float32", "bfloat16", "float16")
TIMESTEPS = torch.arange(981, 0, -20)
"""The 50 timesteps of a DDIM run, noisiest first."""

TRAIN_TIMESTEPS = 1000
DEEP_SHRINK_SHARE = 0.35


@dataclass(frozen=True)
class Layout:
    """A published UNet: ``config`` are the arguments that build it, ``small`` those that make a toy of it."""

    name: str
    family: str
    config: dict[str, Any]
    small: dict[str, Any]

    def build(self, device: str = "meta", dtype: torch.dtype = torch.float32, small: bool = False) -> nn.Module:
        """The UNet with random weights; on the ``meta`` device it has shapes only."""
        torch.manual_seed(0)
        with torch.device(device):
            unet = UNet2DConditionModel(**{**self.config, **(self.small if small else {})}).eval()
        return unet if dtype is torch.float32 else unet.to(dtype)

    def call(
        self, unet: nn.Module, pixels: int | tuple[int, int], step: int = 0, batch: int = 1
    ) -> Callable[[], torch.Tensor]:
        """One evaluation of ``unet`` for pictures of a side or ``(width, height)``, at a step of `TIMESTEPS`."""
        width, height = (pixels, pixels) if isinstance(pixels, int) else pixels
        like = next(unet.parameters())

        def random(*shape: int) -> torch.Tensor:
            """Noise where and as the weights are."""
            return torch.randn(batch, *shape, device=like.device, dtype=like.dtype)

        kwargs: dict[str, Any] = {"encoder_hidden_states": random(77, unet.config.cross_attention_dim)}
        if unet.config.addition_embed_type == "text_time":
            embeds = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            kwargs["added_cond_kwargs"] = {"text_embeds": random(embeds), "time_ids": random(6)}
        sample, timestep = random(4, height // 8, width // 8), int(TIMESTEPS[step])
        return lambda: unet(sample, timestep, return_dict=False, **kwargs)[0]


LAYOUTS = {
    "sd": Layout(
        "SD 1.5",
        "sd",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 32, "attention_head_dim": 4},
    ),
    "sdxl": Layout(
        "SDXL",
        "sdxl",
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            "block_out_channels": (32, 64, 128),
            "transformer_layers_per_block": (1, 2, 2),
            "attention_head_dim": (2, 4, 8),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
    ),
}


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    """The operations of attention, from the shapes of its operands."""
    return sdpa_flop_count(q, k, v)


# torch counts attention on meta tensors and in CUDA's kernels, but not in the one that it uses on a CPU.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def count_flops(call: Callable[[], Any]) -> int:
    """The operations of ``call()``: matrix products and convolutions, multiply and add counted separately."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        call()
    return counter.get_total_flops()


def check_counter(device: str = "meta") -> None:
    """Make sure that attention is counted whichever kernel a device gives it.

    Raises:
        RuntimeError: it is not.
    """
    q = torch.empty(2, 3, 64, 16, device=device)
    counted, expected = count_flops(lambda: F.scaled_dot_product_attention(q, q, q)), 2 * 3 * 64 * 64 * 16 * 4
    if counted != expected:
        raise RuntimeError(
            f"torch {torch.__version__} counts {counted} FLOPs for an attention of {expected} on {device}; add the "
            "formula of the kernel that it uses there."
        )


# ---- times


def in_turns(
    names: list[str],
    repeats: int,
    call: Callable[[str], Any],
    device: str,
    what: str,
    change: Callable[[str], AbstractContextManager] = nullcontext,
    own_time: bool = False,
) -> dict[str, list[Cost]]:
    """Costs of every variant, see `turns.in_turns`; ``own_time`` counts only while the calling thread ran, on a CPU.

    Raises:
        SystemExit: there are other threads whose time ``own_time`` would not count.
    """
    if own_time and not turns.only_thread(device):
        raise SystemExit(
            "own time is that of one thread on a CPU; set OMP_NUM_THREADS=1, or measure on the wall clock."
        )
    clock = time.thread_time if own_time else time.perf_counter
    with tqdm(total=len(names) * (repeats + 1), desc=what) as bar:
        return turns.in_turns(
            names, repeats, call, device, change=change, clock=clock, before_each=lambda name: bar.update()
        )


# ---- other people's methods


@contextmanager
def deep_shrink(unet: nn.Module, factor: int = 2, share: float = DEEP_SHRINK_SHARE) -> Iterator[None]:
    """Kohya's deep shrink: level 1 and below see a feature map shrunk by ``factor`` for the first ``share`` of a run.

    As ComfyUI's ``PatchModelAddDownscale`` does it by default: bicubic, after the downsampler of level 0 once its skip
    is recorded, restored where that skip comes back.
    """
    up = unet.up_blocks[mirror(unet, 1)]
    divisor = 2 ** (len(unet.down_blocks) - 1) * factor
    restored: list[torch.Size] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Decide from the timestep whether this evaluation is shrunk."""
        call = bind_call(module, args, kwargs)
        if any(side % divisor for side in call["sample"].shape[-2:]):
            raise ValueError(
                f"latent of {tuple(call['sample'].shape[-2:])}: deep shrink by {factor} needs multiples of {divisor}."
            )
        timestep = torch.as_tensor(call["timestep"]).flatten()[0]
        restored[:] = [torch.Size()] if timestep >= (1 - share) * TRAIN_TIMESTEPS else []

    def shrink(module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        """Shrink what level 1 gets, not the skip."""
        if not restored:
            return None
        restored[:] = [output[0].shape[-2:]]
        return F.interpolate(output[0], scale_factor=1 / factor, mode="bicubic"), output[1]

    def restore(module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        """Meet the skip at its size."""
        return (F.interpolate(output[0], size=restored[0], mode="bicubic"),) if restored else None

    handles = [
        unet.register_forward_pre_hook(begin, with_kwargs=True),
        unet.down_blocks[0].register_forward_hook(shrink),
        up.attentions[len(up.attentions) - 2].register_forward_hook(restore),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tomesd_version() -> str | None:
    """The version of the package ``tomesd`` where it is installed; only developing needs it."""
    return version("tomesd") if find_spec("tomesd") else None


@contextmanager
def tomesd(unet: nn.Module, ratio: float = 0.5) -> Iterator[None]:
    """Token merging by its authors' own package, at the finest level that has attention."""
    import tomesd as package

    package.apply_patch(unet, ratio=ratio, max_downsample=2 ** attention_levels(unet)[0])
    try:
        yield
    finally:
        package.remove_patch(unet)


# ---- results


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that runs ``module`` with ``arguments`` from the repository root; absolute paths are not told."""
    return shlex.join(["python", "-m", module, *("=".join(map(_portable, arg.split("="))) for arg in arguments)])


def _portable(word: str) -> str:
    """A path of this machine as one inside the repository, or as a bare name outside it."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def default_output(benchmark: str, device: str = "cpu", dtype: str = "float32") -> Path:
    """Where a benchmark's numbers go: the name holds the device, dtype and version of torch."""
    return RESULTS / f"{benchmark}-{device_slug(device)}-{dtype}-torch{torch.__version__.split('+')[0]}.json"


def read_results(path: Path) -> dict[str, Any]:
    """The sections of a result file, none where there is no file yet.

    Raises:
        SystemExit: it is damaged.
    """
    try:
        return dict(read_json(path)) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path} is no file of results ({error}); get it again, or remove it.") from error


def write_section(path: Path, name: str, section: dict[str, Any]) -> None:
    """Put one section in its place in a result file; the file is replaced as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**read_results(path), name: section}, indent=1) + "\n")
    temporary.replace(path)
