"""Agent attention in FLUX and SD3, an experiment: agents are averages of the image's queries over cells of the grid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from diffusion_attn.core.context import StepContext
from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.joint_layout import attentions, hand_on, read_grid
from diffusion_attn.core.method import Attachment, Plan, Target
from diffusion_attn.core.processors import check_exact
from diffusion_attn.core.session import bind_call
from diffusion_attn.methods.agent.setting import Size
from diffusion_attn.ops.agent_attention import joint_agent_attention, pool_agents
from diffusion_attn.processors.joint import JointAttnProcessor, rotated

if TYPE_CHECKING:
    from diffusion_attn.methods.agent.agent_attention import AgentAttention

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgentTokens:
    """The agents of one forward pass.

    Attributes:
        grid: ``(height, width)`` in image tokens.
        size: ``(height, width)`` of the agents' own grid.
        order: ``(image tokens,)`` long, which token is at each place of the raster; ``None``: they are in its order.
        rotary: ``(cos, sin)`` of FLUX's embedding at the centres of the agents' cells; ``None``: SD3 has none.
    """

    grid: Size
    size: Size
    order: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None


class PooledAgentProcessor(JointAttnProcessor):
    """Attention through the agents that come with the call, exact attention where none do."""

    # Models drop arguments that this signature does not name.
    def __call__(
        self, attn: Any, *args: Any, agent_tokens: AgentTokens | None = None, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the stock processors, with the agents of this forward pass."""
        return super().__call__(attn, *args, agent_tokens=agent_tokens, **kwargs)

    def rotate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        agent_tokens: AgentTokens | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions into query and key, and agents behind the queries.

        Agents are averaged before positions are applied: an average of rotated queries would mix phases.
        """
        turned, key = super().rotate(query, key, rotary)
        if agent_tokens is None:
            return turned, key
        height, width = agent_tokens.grid
        image = query[:, query.shape[1] - height * width :]
        if agent_tokens.order is not None:
            image = image[:, agent_tokens.order]
        agents = pool_agents(image.transpose(1, 2), grid=agent_tokens.grid, size=agent_tokens.size).transpose(1, 2)
        return torch.cat([turned, rotated(agents, agent_tokens.rotary)], dim=1), key

    def attend(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        agent_tokens: AgentTokens | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of ``query``, without the agents at its end.

        Raises:
            UnsupportedModelError: there is a mask, or tokens are spread over devices.
        """
        if agent_tokens is None:
            return self.attend_exactly(query, key, value, attention_mask)
        if attention_mask is not None or self._parallel_config is not None:
            raise UnsupportedModelError(
                "agent attention knows no attention masks, and needs all tokens on one device; drop the mask, run "
                "without enable_parallelism, or disable the method."
            )
        tokens, image = key.shape[1], agent_tokens.grid[0] * agent_tokens.grid[1]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, agents = query.split([tokens, query.shape[2] - tokens], dim=2)
        out = joint_agent_attention(query, key, value, agents, text_tokens=tokens - image)
        return out.transpose(1, 2)


class PooledAgents:
    """Agent attention on a transformer: what is checked, and the hook that hands out agents in the early phase."""

    context: Callable[[], StepContext]

    def __init__(self, options: AgentAttention, transformer: Any) -> None:
        self.options, self.transformer = options, transformer
        self._told: set[Size] = set()

    def plan(self, target: Target) -> Plan:
        """Find the layers; see `Method.plan`."""
        layers = dict(attentions(self.transformer))
        for name, attn in layers.items():
            if not isinstance(attn.processor, PooledAgentProcessor):
                check_exact(name, attn.processor)
        note = (
            f"experimental: for the first {self.options.switch:.0%} of the steps image tokens attend through one agent "
            f"for each {self.options.stride[0]} x {self.options.stride[1]} of them; nobody has trained or judged this."
        )
        remedy = f"leave {self.options.name!r} out"
        return Plan(list(layers), self.install, frozenset(layers), remedy, notes=(note,))

    def install(self, attachment: Attachment) -> None:
        """Register everything; see `Plan.install`."""
        self.context = attachment.context
        attachment.before(self.transformer, self.begin, kwargs=True)
        for name, attn in attentions(self.transformer):
            attachment.process(name, attn, PooledAgentProcessor())

    @torch.compiler.disable
    def begin(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before a forward pass of the early phase: where the agents are."""
        context = self.context()
        if context.step >= self.options.switch * context.steps:
            return None
        call = bind_call(transformer, args, kwargs)
        ids = call.get("img_ids")
        if ids is not None:
            ids = ids[0] if ids.ndim == 3 else ids
            grid, raster = read_grid(ids)
            order = None if raster is None else raster.argsort()
        else:
            height, width = call["hidden_states"].shape[-2:]
            patch = transformer.config.patch_size
            grid, order = (height // patch, width // patch), None
        size = math.ceil(grid[0] / self.options.stride[0]), math.ceil(grid[1] / self.options.stride[1])
        fewer = 2 * size[0] * size[1] < grid[0] * grid[1]
        if grid not in self._told:
            self._told.add(grid)
            logger.info("agents on %d x %d: %s", *grid, f"{size[0] * size[1]} agents" if fewer else "not worth it")
        if not fewer:
            return None
        rotary = None if ids is None else transformer.pos_embed(_centres(ids, grid, size, order))
        return (), hand_on(call, agent_tokens=AgentTokens(grid, size, order, rotary))


def _centres(ids: torch.Tensor, grid: Size, size: Size, order: torch.Tensor | None) -> torch.Tensor:
    """FLUX's ids ``(agents, 3)`` of the agents: the means of their tokens'."""
    raster = (ids if order is None else ids[order]).float()
    return F.adaptive_avg_pool2d(raster.T.unflatten(1, grid), size).flatten(1).T


def is_joint(denoiser: nn.Module) -> bool:
    """Whether a denoiser is a transformer that this serves."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    return isinstance(denoiser, (FluxTransformer2DModel, SD3Transformer2DModel))
