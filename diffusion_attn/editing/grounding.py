"""Where in a picture the words are: masks made of attention maps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_ITERATIONS = 300
"""Of one k-means run, which stands still long before."""


@torch.no_grad()
def kmeans(points: torch.Tensor, clusters: int = 5, *, restarts: int = 10, seed: int = 1) -> torch.Tensor:
    """Lloyd's algorithm from k-means++ starts (Arthur and Vassilvitskii, 2007); the best run by squared distance.

    Args:
        points: ``(M, D)``, any float dtype.
        clusters: how many to look for; there are fewer where points are too few or equal.
        restarts: runs from different starts.
        seed: of an own generator, the same for every device.

    Returns:
        ``(M,)`` long, the cluster of each point.

    Raises:
        ValueError: ``points`` is empty or not two-dimensional, or ``clusters`` or ``restarts`` is below 1.
    """
    if points.dim() != 2 or not len(points):
        raise ValueError(f"points has the shape {tuple(points.shape)}: expected (points, features), one point or more.")
    if clusters < 1 or restarts < 1:
        raise ValueError(f"clusters={clusters}, restarts={restarts}: expected at least 1 of each.")
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    points = points - points.mean(0)  # distances are differences of squares: the closer to 0, the more digits are left
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(points, _spread(points, clusters, generator)) for _ in range(restarts)]
    return min(runs, key=lambda run: run[0])[1]


def background_mask(
    self_map: torch.Tensor, cross_maps: torch.Tensor, clusters: int = 5, threshold: float = 0.2
) -> torch.Tensor:
    """Segments of the self-attention in which no noun is strong. Source: DPL's supplement; arXiv 2309.15664.

    The rows of ``self_map`` are clustered; a cluster is background unless the mean over it of some noun's map,
    normalised to ``(map - |min|) / max``, exceeds ``threshold``.

    Args:
        self_map: ``(HW, HW)``, averaged over steps, layers and heads.
        cross_maps: ``(H / s, W / s, nouns)`` for a whole number ``s``, averaged likewise, one column for each noun.
        clusters: segments to look for.
        threshold: of the mean.

    Returns:
        ``(H, W)`` bool, True on the background, which may be empty.

    Raises:
        ValueError: the sizes of the maps do not go together, or there is no noun.
    """
    pixels, cells = len(self_map), math.prod(cross_maps.shape[:2])
    scale = math.isqrt(pixels // max(cells, 1))
    if (
        self_map.shape != (pixels, pixels)
        or cross_maps.dim() != 3
        or not cross_maps.numel()
        or scale**2 * cells != pixels
    ):
        raise ValueError(
            f"self_map {tuple(self_map.shape)} and cross_maps {tuple(cross_maps.shape)}: expected (HW, HW) and "
            "(H / s, W / s, nouns), for a whole number s and at least one noun."
        )
    labels = kmeans(self_map, clusters)
    lowest, highest = cross_maps.amin((0, 1)), cross_maps.amax((0, 1))
    strength = (cross_maps - lowest.abs()) / torch.where(highest > 0, highest, 1)
    strength = strength.repeat_interleave(scale, 0).repeat_interleave(scale, 1).flatten(0, 1).float()
    member = F.one_hot(labels, clusters).to(strength)
    scores = member.T @ strength / member.sum(0).clamp(min=1)[:, None]
    return (scores.amax(1) <= threshold)[labels].unflatten(0, (cross_maps.shape[0] * scale, -1))


def propagate(word_map: torch.Tensor, affinity: torch.Tensor, gamma: float, iterations: int) -> torch.Tensor:
    """Spread a word's map over what the self-attention holds together: ``m <- gamma m + (1 - gamma) S m``, repeated.

    Source: ViMAEdit, editing area grounding; arXiv 2410.10496.

    Args:
        word_map: ``(B, 1, H, W)``.
        affinity: ``S``, ``(B, HW, HW)``, rows summing to 1, so that values stay in their range.
        gamma: what a pixel keeps of its own, 0 to 1.
        iterations: how often; 0 leaves the map as it is.

    Raises:
        ValueError: the shapes do not go together, or a number is out of its range.
    """
    pixels = word_map.shape[-2] * word_map.shape[-1]
    if word_map.dim() != 4 or affinity.shape != (len(word_map), pixels, pixels):
        raise ValueError(
            f"word_map {tuple(word_map.shape)} and affinity {tuple(affinity.shape)}: expected (B, 1, H, W) and "
            "(B, HW, HW); resize the map to the affinity's grid."
        )
    if not 0 <= gamma <= 1 or iterations < 0:
        raise ValueError(f"gamma={gamma}, iterations={iterations}: expected 0 to 1, and 0 or more.")
    flat = word_map.flatten(2).mT
    for _ in range(iterations):
        flat = gamma * flat + (1 - gamma) * affinity.to(flat.dtype) @ flat
    return flat.mT.reshape(word_map.shape)


def union_mask(source: torch.Tensor, target: torch.Tensor, threshold: float, size: tuple[int, int]) -> torch.Tensor:
    """Where the map of the source or that of the target, each brought to 0..1, is above ``threshold``.

    Source: ViMAEdit, editing area grounding; arXiv 2410.10496.

    Args:
        source: ``(pairs, 1, H, W)``.
        target: ``(pairs, 1, H, W)``.
        threshold: 0 to 1.
        size: ``(height, width)`` of the mask, reached by nearest neighbours.

    Returns:
        ``(pairs, 1, *size)`` bool; a constant map adds nothing.

    Raises:
        ValueError: the maps have different shapes, or not four dimensions.
    """
    if source.dim() != 4 or source.shape != target.shape:
        raise ValueError(
            f"source {tuple(source.shape)} and target {tuple(target.shape)}: expected two maps of one shape "
            "(pairs, 1, H, W)."
        )
    return _above(source, threshold, size) | _above(target, threshold, size)


def local_blend_mask(
    word_maps: torch.Tensor, threshold: float, size: tuple[int, int], pool: bool = True
) -> torch.Tensor:
    """Where an edit may change a picture: where the words of its prompt, or those of the source, are strong.

    Maps are divided by their maximum. Words that must not change are subtracted as
    ``mask & ~local_blend_mask(..., pool=False)``. Source: the local blend of Prompt-to-Prompt's code; arXiv 2208.01626.

    Args:
        word_maps: ``(1 + T, 1, H, W)``, summed over a row's words, the source's first.
        threshold: 0 to 1.
        size: ``(height, width)`` of the mask, reached by nearest neighbours.
        pool: let every pixel be as strong as the strongest of its 3x3 neighbourhood.

    Returns:
        ``(1 + T, 1, *size)`` bool.

    Raises:
        ValueError: ``word_maps`` is not of four dimensions.
    """
    if word_maps.dim() != 4:
        raise ValueError(f"word_maps has the shape {tuple(word_maps.shape)}: expected (1 + targets, 1, H, W).")
    if pool:
        word_maps = F.max_pool2d(word_maps, 3, stride=1, padding=1)
    maps = F.interpolate(word_maps, size=size)
    mask = maps > threshold * maps.amax((-2, -1), keepdim=True)
    return mask | mask[:1]


def _above(maps: torch.Tensor, threshold: float, size: tuple[int, int]) -> torch.Tensor:
    maps = F.interpolate(maps, size=size)
    lowest, highest = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    # Multiplied out: divided by the range of a constant map, 0 / 0 would be hidden in the comparison.
    return maps - lowest > threshold * (highest - lowest)


def _spread(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each next centre is a point, drawn in proportion to its squared distance from those there are."""
    centers, weights = points[:0], torch.ones(len(points))
    for _ in range(clusters):
        # Where every point is a centre already, any will do: its cluster stays empty.
        drawn = torch.multinomial(weights + (weights.sum() == 0), 1, generator=generator)
        centers = torch.cat([centers, points[drawn.to(points.device)]])
        weights = torch.cdist(points, centers).amin(1).square().cpu()
    return centers


def _lloyd(points: torch.Tensor, centers: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The sum of squared distances, and the cluster of each point."""
    labels = None
    for _ in range(_ITERATIONS):
        distances, nearest = torch.cdist(points, centers).min(1)
        if labels is not None and torch.equal(labels, nearest):
            break
        labels = nearest
        member = F.one_hot(labels, len(centers)).to(points)
        sizes = member.sum(0)[:, None]
        centers = torch.where(sizes > 0, member.T @ points / sizes.clamp(min=1), centers)
    return float(distances.square().sum()), nearest
