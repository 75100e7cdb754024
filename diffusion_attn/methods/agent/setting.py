"""How tokens are merged in one phase of a run, and what that comes to on a grid."""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """The numbers of one phase.

    Attributes:
        ratio: share of the tokens that is merged away.
        stride: ``(rows, columns)`` of the cells of which each keeps one token.
        agent_ratio: share of the tokens that is merged away to make agents; ``None``: no agents.
        second_scale_power: the second softmax has the scale of the first to this power.
        shortcut: share of the values that is added to what the agents give.
    """

    ratio: float
    stride: Size
    agent_ratio: float | None = None
    second_scale_power: float = 1.0
    shortcut: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.stride, list):
            object.__setattr__(self, "stride", tuple(self.stride))

    def check(self, phase: str) -> None:
        """Make sure that the numbers of ``phase`` are what they should be.

        Raises:
            ValueError: one is not.
        """
        for name, share in (("ratio", self.ratio), ("agent_ratio", self.agent_ratio or 0)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share!r} ({phase}): expected a share of the tokens between 0 and 1.")
        pair = isinstance(self.stride, tuple) and len(self.stride) == 2
        if not pair or not all(isinstance(side, int) and side >= 1 for side in self.stride):
            raise ValueError(
                f"stride={self.stride!r} ({phase}): expected (rows, columns) of a cell, whole numbers of at least 1."
            )

    def counts(self, grid: Size) -> Counts:
        """What becomes of the tokens of ``grid``.

        Agents are worth their second softmax only while there are fewer than half as many of them as merged tokens
        (AgentSD does without them otherwise).
        """
        tokens = grid[0] * grid[1]
        cells = grid[0] // self.stride[0], grid[1] // self.stride[1]
        sources = tokens - cells[0] * cells[1] if cells[0] * cells[1] else 0
        merge = min(sources, int(tokens * self.ratio))
        fewer = min(sources, int(tokens * self.agent_ratio)) if self.agent_ratio is not None else 0
        active = bool(merge) and 2 * (tokens - fewer) < tokens - merge
        return Counts(tokens, cells, merge, fewer if active else None)


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens: of a grid with so many ``cells``, ``merge`` are merged away, and ``fewer`` to make agents."""

    tokens: int
    cells: Size
    merge: int
    fewer: int | None

    def __str__(self) -> str:
        if not self.merge:
            return f"{self.tokens} tokens, none merged"
        agents = "no agents" if self.fewer is None else f"{self.tokens - self.fewer} agents"
        return f"{self.tokens} tokens merged to {self.tokens - self.merge}, {agents}"
