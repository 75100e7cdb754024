"""Bipartite matching of the tokens of a grid, to merge similar ones (ToMe for SD, arXiv 2303.17604, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffusion_attn.core.errors import GridError

_SCORES = 2**22
"""Similarities held at once for each item of the batch: there are ``tokens**2 / cell`` of them in all."""


@dataclass(frozen=True)
class TokenMatch:
    """Which tokens go together: a plan for sequences of one length, made once and used for any number of them.

    Attributes:
        tokens: length of the sequences that it serves.
        merged: groups that `merge` forms of each, numbered ``(batch, tokens)``; ``None``: every token is its own.
        merged_tokens: how many groups these are.
        agent: groups that `agents` forms of each, numbered ``(batch, tokens)``; ``None``: not asked for.
        agent_tokens: how many groups these are.
    """

    tokens: int
    merged: torch.Tensor | None
    merged_tokens: int
    agent: torch.Tensor | None = None
    agent_tokens: int = 0

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of each group: ``(batch, merged_tokens, channels)`` from ``(batch, tokens, channels)``.

        Groups stand in the order of their one token that has not moved. Sums are taken in float32, on CUDA in an order
        that varies from call to call unless ``torch.use_deterministic_algorithms(True)`` is set.

        Raises:
            GridError: ``x`` has another number of sequences or tokens.
        """
        self._check(x, self.tokens, self.merged)
        return x if self.merged is None else _means(x, self.merged, self.merged_tokens)

    def unmerge(self, x: torch.Tensor) -> torch.Tensor:
        """To each token what its group has: ``(batch, tokens, channels)`` from ``(batch, merged_tokens, channels)``.

        Raises:
            GridError: ``x`` has another number of sequences or tokens.
        """
        self._check(x, self.merged_tokens, self.merged)
        if self.merged is None:
            return x
        return x.flatten(0, 1).index_select(0, _rows(self.merged, x.shape[1])).unflatten(0, self.merged.shape)

    def agents(self, x: torch.Tensor) -> torch.Tensor | None:
        """The means of the coarser groups, ``(batch, agent_tokens, channels)``, or ``None`` where there are none.

        Raises:
            GridError: ``x`` has another number of sequences or tokens.
        """
        self._check(x, self.tokens, self.agent)
        if not self.agent_tokens:
            return None
        return x if self.agent is None else _means(x, self.agent, self.agent_tokens)

    def _check(self, x: torch.Tensor, tokens: int, groups: torch.Tensor | None) -> None:
        batch = len(x) if groups is None else len(groups)
        if tuple(x.shape[:2]) != (batch, tokens):
            raise GridError(
                f"x is {len(x)} sequences of {x.shape[1]} tokens, and this matching is for {batch} of {tokens}; match "
                "the sequences that are to be merged (feed-forward chunking, for one, hands over parts of them)."
            )


@torch.no_grad()
def match_tokens(
    metric: torch.Tensor,
    *,
    grid: tuple[int, int],
    stride: tuple[int, int],
    merge: int,
    agents: int | None = None,
    cell_choice: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TokenMatch:
    """Match each token with the most similar one of a sparse set, and find those that lose least by being merged.

    The grid is cut into whole cells of ``stride``; one token of each is a destination. Every other token is sent to the
    destination with which its cosine similarity is largest, the earliest of equals. Those most similar come first:
    ``merge`` of them are merged, the rest are left alone. Rows and columns past the last whole cell hold no
    destination; a grid smaller than a cell has none at all, so that nothing can be merged.

    Shapes depend on the arguments alone, never on values, and no more than ``2**22`` similarities are held at once for
    each item of the batch.

    Args:
        metric: ``(batch, tokens, channels)``, any float dtype, tokens in raster order of ``grid``; zeros are allowed.
        grid: ``(height, width)`` in tokens.
        stride: ``(rows, columns)`` of a cell.
        merge: number of tokens to merge away, cut to what can be: ``merge(x)`` has that many fewer.
        agents: the same for the second, coarser matching of the same ranking that ``agents(x)`` is (AgentSD, arXiv
            2312.08874, section 4.3); ``None``: not needed.
        cell_choice: ``(height // rows, width // columns)`` long, ``row * columns + column`` of the destination inside
            each cell, the same for the whole batch.
        generator: draws ``cell_choice`` where it is not given, on the generator's device. With neither it is the
            top-left token of each cell.

    Raises:
        GridError: the tokens are not those of ``grid``.
        ValueError: the stride, the counts or the choice are not what they should be.
    """
    (height, width), (rows, columns) = grid, stride
    tokens = height * width
    if metric.shape[1] != tokens:
        raise GridError(
            f"grid={tuple(grid)} holds {tokens} tokens, but metric has {metric.shape[1]}; give the (height, width) of "
            "its token grid."
        )
    if rows < 1 or columns < 1:
        raise ValueError(f"stride={tuple(stride)}: expected (rows, columns) of a cell, each at least 1.")
    if merge < 0 or (agents is not None and agents < 0):
        raise ValueError(f"merge={merge}, agents={agents}: expected numbers of tokens, none below zero.")
    cells = height // rows, width // columns
    destinations = cells[0] * cells[1]
    sources = tokens - destinations if destinations else 0
    merge, fewer = min(merge, sources), min(agents or 0, sources)
    agent_tokens = 0 if agents is None else tokens - fewer
    if not merge and not fewer:
        return TokenMatch(tokens, None, tokens, None, agent_tokens)

    choice = _choose(cells, stride, cell_choice, generator, metric.device)
    top = torch.arange(cells[0], device=metric.device)[:, None] * rows + choice // columns
    left = torch.arange(cells[1], device=metric.device) * columns + choice % columns
    destination = (top * width + left).flatten()
    is_destination = torch.zeros(tokens, dtype=torch.bool, device=metric.device).index_fill(0, destination, True)
    source = is_destination.byte().argsort(stable=True)[:sources]

    best, nearest = _most_similar(F.normalize(metric.float(), dim=-1).to(metric.dtype), source, destination)
    ranking = best.argsort(dim=-1, descending=True, stable=True)

    def groups(count: int) -> torch.Tensor | None:
        """Merge the first ``count`` of the ranking."""
        if not count:
            return None
        first = ranking[:, :count]
        leader = torch.arange(tokens, device=metric.device).repeat(len(metric), 1)
        stays = torch.ones_like(leader).scatter(1, source[first], 0)
        leader = leader.scatter(1, source[first], destination[nearest.gather(1, first)])
        return (stays.cumsum(1) - 1).gather(1, leader)

    return TokenMatch(tokens, groups(merge), tokens - merge, groups(fewer), agent_tokens)


def _choose(
    cells: tuple[int, int],
    stride: tuple[int, int],
    cell_choice: torch.Tensor | None,
    generator: torch.Generator | None,
    device: torch.device,
) -> torch.Tensor:
    if cell_choice is None and generator is None:
        return torch.zeros(cells, dtype=torch.long, device=device)
    if cell_choice is None:
        assert generator is not None
        return torch.randint(stride[0] * stride[1], cells, generator=generator, device=generator.device).to(device)
    if tuple(cell_choice.shape) != cells or cell_choice.is_floating_point():
        raise ValueError(
            f"cell_choice is {cell_choice.dtype} of shape {tuple(cell_choice.shape)}: expected whole numbers of shape "
            f"{cells}, one for each whole cell of the grid."
        )
    return cell_choice.to(device)


def _most_similar(
    metric: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each source its largest similarity, and which destination that is; both ``(batch, sources)``."""
    targets = metric[:, destination].transpose(1, 2)
    rows = max(1, _SCORES // len(destination))
    found = [(metric[:, part] @ targets).max(dim=-1) for part in source.split(rows)]
    return torch.cat([x.values for x in found], 1), torch.cat([x.indices for x in found], 1)


def _rows(groups: torch.Tensor, count: int) -> torch.Tensor:
    """Where each token's group is once batch and groups, ``count`` to an item, are one dimension."""
    return (groups + torch.arange(len(groups), device=groups.device)[:, None] * count).flatten()


def _means(x: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    rows = _rows(groups, count)
    sums = torch.zeros(len(x) * count, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    sums.index_add_(0, rows, x.flatten(0, 1).to(sums.dtype))
    sizes = torch.zeros_like(sums[:, :1]).index_add_(0, rows, torch.ones_like(rows, dtype=sums.dtype)[:, None])
    return (sums / sizes).to(x.dtype).unflatten(0, (len(x), count))
