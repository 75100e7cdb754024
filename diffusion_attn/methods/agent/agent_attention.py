"""AgentSD: self-attention of merged tokens through a few agents, then plain token merging (arXiv 2312.08874).

Similar tokens are merged before each self-attention of the finest level and given back after it. In the early steps
the merged tokens attend through agents, which are more strongly merged tokens. No weights, no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_attn.core.context import StepContext
from diffusion_attn.core.errors import UnsupportedModelError
from diffusion_attn.core.method import Plan, Target
from diffusion_attn.methods.agent.merging import Merging
from diffusion_attn.methods.agent.pooled import PooledAgents, is_joint
from diffusion_attn.methods.agent.setting import Setting, Size


@dataclass(frozen=True)
class AgentAttention(Merging):
    """Options of AgentSD, beside those of `Merging`; the defaults are those of its best published row.

    Args:
        ratio: share of the tokens that is merged away before self-attention.
        agent_ratio: share that is merged away to make agents, in the early phase; ``stride`` limits it, and agents work
            only while there are fewer than half as many as merged tokens.
        stride: (rows, columns) of the cells of which each keeps one token, in the early phase.
        late_stride, late_agent_ratio: the same for the late phase, which by default has no agents.
        switch: share of the run (0 to 1) after which the late phase begins.
        second_scale_power: scale of the second softmax as a power of the first's; below 1 is sharper.
        shortcut: share of the values that is added to what the agents give.
        experimental: serve FLUX and SD3, too, where image tokens attend in the early phase through averages of their
            queries over cells of ``stride``. Nobody has trained or judged this; other options have no meaning there.
    """

    name: ClassVar[str] = "agent"

    ratio: float = 0.4
    agent_ratio: float = 0.95
    stride: Size = (4, 4)
    late_stride: Size = (2, 2)
    late_agent_ratio: float = 0.5
    switch: float = 0.4
    second_scale_power: float = 0.3
    shortcut: float = 0.075
    experimental: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.switch <= 1:
            raise ValueError(f"switch={self.switch}: expected a share of the run between 0 and 1.")

    def phases(self) -> dict[str, Setting]:
        """The settings of both phases."""
        power, shortcut = self.second_scale_power, self.shortcut
        return {
            "early": Setting(self.ratio, self.stride, self.agent_ratio, power, shortcut),
            "late": Setting(self.ratio, self.late_stride, self.late_agent_ratio, power, shortcut),
        }

    def setting(self, context: StepContext) -> Setting:
        """The setting of a forward pass."""
        return self.phases()["late" if context.step >= self.switch * context.steps else "early"]

    def plan(self, target: Target) -> Plan:
        """Find the layers; see `Merging.plan`.

        Raises:
            UnsupportedModelError: beside its reasons, the run's schedule is not known, or FLUX and SD3 are not asked
                for as an experiment.
        """
        plan = self._plan_joint(target) if is_joint(target.denoiser) else super().plan(target)
        if not target.scheduled:
            raise UnsupportedModelError(
                "AgentAttention depends on the step, and a bare denoiser does not know the run's schedule; enable it "
                "through the pipeline, or pass timesteps= (1-D tensor, noisiest first)."
            )
        return plan

    def _plan_joint(self, target: Target) -> Plan:
        if not self.experimental:
            raise UnsupportedModelError(
                f"AgentAttention is made for UNets, and this is a {type(target.denoiser).__name__}: its form for FLUX "
                "and SD3 is an experiment that has to be asked for, AgentAttention(experimental=True). Local attention "
                "(CLEAR) is what is known to serve large pictures there."
            )
        return PooledAgents(self, target.denoiser).plan(target)
