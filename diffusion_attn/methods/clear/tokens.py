"""Where the tokens of a forward pass lie: read from the call's own arguments, and brought into the kernels' order.

Everything in these models but attention treats tokens alone, and positions come with them. So their order is changed
once, where they enter the transformer, and back where they leave it, instead of in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import GridError, UnsupportedModelError
from diffusion_attn.core.joint_layout import hand_on, read_grid
from diffusion_attn.core.method import Attachment
from diffusion_attn.core.session import bind_call
from diffusion_attn.methods.clear.rule import Rule
from diffusion_attn.ops.local_attention import choose_backend
from diffusion_attn.ops.local_rule import Disc, tile_order


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward pass.

    Attributes:
        text: how many tokens of text there are.
        grid: ``(height, width)`` in image tokens.
        order: ``(image tokens,)`` long, which of the given tokens is at each place inside the model, or ``None``:
            they stay as given.
        tiled: inside the model image tokens are in `tile_order`, else in raster order.
        cells: ``(cells, tokens)`` long, the image tokens, inside the model, of each cell that is pooled.
        sizes: ``(4,)`` long on the CPU: ``text``, ``grid`` and ``tiled`` once more.
    """

    text: int
    grid: tuple[int, int]
    order: torch.Tensor | None = None
    tiled: bool = False
    cells: torch.Tensor | None = None
    sizes: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        # All the numbers as data, for compiled code that must not depend on them.
        object.__setattr__(self, "sizes", torch.tensor([self.text, *self.grid, int(self.tiled)]))

    def arrange(self, x: Any) -> Any:
        """``(batch, image tokens, channels)``, or several, or ``None``, from the caller's order into the model's."""
        if x is None or self.order is None:
            return x
        if not isinstance(x, torch.Tensor):
            return [self.arrange(part) for part in x]
        return x.index_select(-2, self.order.to(x.device))

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Back into the caller's order."""
        return x if self.order is None else x.index_select(-2, self.order.argsort().to(x.device))


class TokenReader:
    """Reads `Tokens` before each forward pass of a transformer, arranges them, and restores the result.

    Args:
        rule: of the attention.
        head_dim: of the transformer.
    """

    def __init__(self, rule: Rule, head_dim: int) -> None:
        self.rule, self.head_dim = rule, head_dim
        self.now = Tokens(0, (0, 0))  # of the forward pass in progress

    def install(self, attachment: Attachment, transformer: nn.Module) -> None:
        """Register the hooks."""
        raise NotImplementedError

    def _tokens(self, text: int, grid: tuple[int, int], raster: torch.Tensor | None, like: torch.Tensor) -> Tokens:
        """``raster``: position in the grid of each given token, ``None`` where they are in raster order."""
        # In training the teacher's layers are compared with the student's, token by token.
        tiled = self._uses_flex(like) and not Disc(grid, self.rule.radius).covers and not torch.is_grad_enabled()
        cells = find_cells(grid, self.rule.down_factor, tiled, like.device) if self.rule.down_factor > 1 else None
        given = None if raster is None else raster.argsort()
        if not tiled:
            return Tokens(text, grid, given, cells=cells)
        inside = tile_order(grid, like.device)
        return Tokens(text, grid, inside if given is None else given.to(like.device)[inside], True, cells)

    def _uses_flex(self, like: torch.Tensor) -> bool:
        asked = self.rule.backend
        return (choose_backend(like.new_empty(0, self.head_dim)) if asked == "auto" else asked) == "flex"


class FluxTokens(TokenReader):
    """FLUX.1: the grid is in ``img_ids``, whatever order they come in."""

    def install(self, attachment: Attachment, transformer: nn.Module) -> None:
        """Hooks on the transformer."""
        attachment.before(transformer, self.enter, kwargs=True)
        attachment.after(transformer, self.leave)

    @torch.compiler.disable
    def enter(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook."""
        call = bind_call(transformer, args, kwargs)
        image_ids, text_ids = (call[name] for name in ("img_ids", "txt_ids"))
        image_ids = image_ids[0] if image_ids.ndim == 3 else image_ids
        grid, raster = read_grid(image_ids)
        tokens = self.now = self._tokens(text_ids.shape[-2], grid, raster, call["hidden_states"])
        arranged = {name: tokens.arrange(call[name]) for name in _PER_TOKEN if name in call}
        return (), hand_on({**call, "img_ids": tokens.arrange(image_ids), **arranged}, local_tokens=tokens)

    @torch.compiler.disable
    def leave(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook."""
        sample = self.now.restore(output[0])
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


_PER_TOKEN = ("hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")


class SD3Tokens(TokenReader):
    """Stable Diffusion 3 and 3.5: the grid is the latents', and positions are added where they become tokens."""

    def install(self, attachment: Attachment, transformer: nn.Module) -> None:
        """Hooks on the transformer, and where tokens are made and given back."""
        attachment.before(transformer, self.enter, kwargs=True)
        attachment.after(transformer.get_submodule("pos_embed"), self.embedded)
        attachment.after(transformer.get_submodule("proj_out"), self.projected)

    @torch.compiler.disable
    def enter(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook."""
        call = bind_call(transformer, args, kwargs)
        latents, patch = call["hidden_states"], transformer.config.patch_size
        height, width = (side // patch for side in latents.shape[-2:])
        tokens = self.now = self._tokens(call["encoder_hidden_states"].shape[1], (height, width), None, latents)
        name = "block_controlnet_hidden_states"
        return (), hand_on({**call, name: tokens.arrange(call.get(name))}, local_tokens=tokens)

    @torch.compiler.disable
    def embedded(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Forward hook where latents have become tokens."""
        return self.now.arrange(output)

    @torch.compiler.disable
    def projected(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Forward hook before tokens become latents."""
        return self.now.restore(output)


def find_cells(grid: tuple[int, int], factor: int, tiled: bool, device: torch.device | None) -> torch.Tensor:
    """``(cells, factor * factor)`` long: the tokens of each cell of ``factor`` rows and columns, row by row.

    Args:
        grid: height and width in tokens.
        factor: side of a cell.
        tiled: tokens are in `tile_order`, else in raster order.
        device: of the result.

    Raises:
        GridError: the grid does not consist of such cells.
    """
    height, width = grid
    if height % factor or width % factor:
        raise GridError(
            f"the image has {height} x {width} tokens, and down_factor={factor} pools cells of that side; make "
            f"both multiples of {factor} tokens (of 16 pixels in FLUX and SD3)."
        )
    place = tile_order(grid, device).argsort() if tiled else torch.arange(height * width, device=device)
    blocks = place.view(height // factor, factor, width // factor, factor).transpose(1, 2)
    return blocks.reshape(-1, factor * factor)


def reader_for(transformer: Any) -> type[TokenReader]:
    """The reader of a transformer's family.

    Raises:
        UnsupportedModelError: there is none.
    """
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    families: Sequence[tuple[type, type[TokenReader]]] = (
        (FluxTransformer2DModel, FluxTokens),
        (SD3Transformer2DModel, SD3Tokens),
    )
    for family, reader in families:
        if isinstance(transformer, family):
            return reader
    raise UnsupportedModelError(
        f"Clear serves the transformers of FLUX.1 and Stable Diffusion 3, and this is a {type(transformer).__name__}; "
        "for UNets linear attention (LinFusion) and HiDiffusion are what serve large pictures."
    )
