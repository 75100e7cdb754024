"""Token merging for Stable Diffusion: similar tokens share one self-attention (ToMe for SD, arXiv 2303.17604).

Tokens of the finest level are merged before each self-attention and given back after it, at every step. No weights, no
training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_attn.core.context import StepContext
from diffusion_attn.methods.agent.merging import Merging
from diffusion_attn.methods.agent.setting import Setting, Size


@dataclass(frozen=True)
class TokenMerging(Merging):
    """Options of token merging, beside those of `Merging`; the defaults are those of its authors.

    A bare denoiser that is enabled without ``timesteps`` makes the same draw at every step, with ``rng="keyed"``.

    Args:
        ratio: share of the tokens that is merged away; ``stride`` limits what can be.
        stride: (rows, columns) of the cells of which each keeps one token.
    """

    name: ClassVar[str] = "token_merging"

    ratio: float = 0.5
    stride: Size = (2, 2)

    def phases(self) -> dict[str, Setting]:
        """The one setting of the whole run."""
        return {"every step": Setting(self.ratio, self.stride)}

    def setting(self, context: StepContext) -> Setting:
        """The setting of a forward pass."""
        return self.phases()["every step"]
