"""The oracle: reads from a picture what is in it.

Colours are read by the nearest palette entry, objects as connected regions that stand out from the background, and
kinds by the overlap of their soft silhouettes with what the renderer would have drawn. What fits nothing is reported
as unreadable, never guessed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image

from diffusion_attn.shapes.renderer import coverage, rgb
from diffusion_attn.shapes.scenes import COLORS, KINDS, SIZES

_WORKING_SIDE = 128  # pixels: the smallest shape is then 29 across, and more would only cost time
_FRAME = 0.02  # of the shorter side: scenes keep their shapes out of it
_FRAME_SHARE = 0.6  # of the frame: a shape that touches the border takes a quarter of it at most
_SPECK = 10  # working pixels: in a picture of four times the training size a small star that was drawn small covers 20
_UNEXPLAINED = 0.01  # of the squared shorter side
_PURE = 0.15  # of a region: even a small, blurred star has more pixels that are purely its colour
_OVERLAP = 0.85  # a square matches a circle of its area by 0.84
_CLEAR = 0.8  # of what the second best kind leaves unmatched is the most that the best may
_RIM = 3  # pixels around a region that its template may touch
_LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2
_SOFT = (0, 1, 2, 4)  # passes of a binomial filter: a generated picture's edges are up to about 1.4 pixels soft
_ROUND = (3, 6)  # passes before edges are made hard again: an autoencoder fills a small star's notches, cuts its tips
_REGROWN = 1.2  # at most this much larger to make up for rounding

_NAMES = tuple(COLORS)
_PALETTE = np.stack([rgb(name) for name in _NAMES])
# Half the distance of the two closest colours (0.22 in RGB of 0..1): nothing is near two of them, and what is further
# than this from the background is no longer background.
_NEAR = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(_PALETTE, 2)) / 2


@dataclass(frozen=True)
class FoundShape:
    """One object of a picture.

    ``kind`` and ``color`` are ``None`` where no kind or colour fits. The centre ``(x, y)`` is in fractions of the
    picture's width and height (0 to 1, y down), ``radius`` in fractions of its shorter side. ``confidence`` is the
    overlap of silhouette and best template, 0 to 1.
    """

    kind: str | None
    color: str | None
    x: float
    y: float
    radius: float
    confidence: float

    @property
    def size(self) -> str:
        """``"small"`` or ``"large"``, divided midway between the two ranges of radii."""
        return "large" if self.radius > _LARGE else "small"


@dataclass(frozen=True)
class Reading:
    """What a picture holds.

    ``background`` is ``None`` where no palette colour dominates the picture's border; then no shapes are looked for.
    ``unexplained`` is the area that is neither background nor part of a found shape, in squared shorter sides.
    """

    background: str | None
    shapes: tuple[FoundShape, ...]
    unexplained: float = 0.0

    @property
    def readable(self) -> bool:
        """Whether the background, each shape's kind and colour, and so the picture as a whole, are understood."""
        known = self.background is not None and all(shape.kind and shape.color for shape in self.shapes)
        return known and self.unexplained <= _UNEXPLAINED


def read(image: Any) -> Reading:
    """Read what a picture holds.

    Args:
        image: a PIL image, a numpy array ``(height, width, 3)`` of uint8 or of floats in 0..1, or a torch tensor
            ``(3, height, width)`` of floats in 0..1. Any size; made for 64 pixels and up.

    Raises:
        TypeError: ``image`` is none of these.
        ValueError: its shape, dtype or range of values is another.
    """
    picture = _as_picture(image)
    factor = max(1, round(min(picture.size) / _WORKING_SIDE))
    width, height = (side / factor for side in picture.size)
    side = min(width, height)
    pixels = np.asarray(picture.reduce(factor), np.float32) / 255

    background, backdrop = _background(pixels)
    if background is None:
        return Reading(None, ())
    labels, colors = _regions(pixels, backdrop, background, _SPECK)
    found = []
    for label, color in enumerate(colors, 1):
        alpha, left, top = _silhouette(pixels, backdrop, labels, label, color)
        kind, x, y, radius, overlap = _recognise(alpha)
        place = (float((left + x) / width), float((top + y) / height), float(radius / side))
        found.append(FoundShape(kind if color else None, color, *place, float(overlap)))
    return Reading(background, tuple(found), float((labels < 0).sum() / side**2))


def _as_picture(image: Any) -> Image.Image:
    expected = "expected a PIL image, a numpy array (height, width, 3) or a torch tensor (3, height, width)"
    if isinstance(image, Image.Image):
        picture = image.convert("RGB")
    elif isinstance(image, np.ndarray):
        picture = _from_array(image, image.shape)
    elif hasattr(image, "detach"):
        array = image.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        picture = _from_array(np.moveaxis(array, 0, -1) if array.ndim == 3 else array, tuple(array.shape), floats=True)
    else:
        raise TypeError(f"image is a {type(image).__name__}: {expected}; open a file with PIL.Image.open.")
    if not all(picture.size):
        raise ValueError(f"image is {picture.width}x{picture.height} pixels: {expected} with at least one pixel.")
    return picture


def _from_array(array: np.ndarray, shape: tuple[int, ...], floats: bool = False) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"image has shape {shape}: expected (height, width, 3) as a numpy array or (3, height, width) as a torch "
            "tensor; pass the images of a batch one by one and drop an alpha channel."
        )
    if array.dtype == np.uint8 and not floats:
        return Image.fromarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"image has dtype {array.dtype}: expected floats in 0..1, or uint8 as a numpy array; divide by 255."
        )
    # Negated, so that nan fails too.
    if array.size and not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        raise ValueError(
            f"image has values from {array.min():.3g} to {array.max():.3g}: expected 0..1; "
            "map -1..1 by (image + 1) / 2 and clip."
        )
    return Image.fromarray(np.round(np.clip(array, 0, 1) * 255).astype(np.uint8))


def _background(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The palette colour that dominates the frame, and what it really looks like in this picture."""
    height, width = pixels.shape[:2]
    thickness = max(1, int(_FRAME * min(height, width)))
    inner = np.zeros((height, width), bool)
    inner[thickness:-thickness, thickness:-thickness] = True
    frame = pixels[~inner]
    near = _distances(frame, _PALETTE) < _NEAR
    best = int(near.sum(0).argmax())
    if near[:, best].mean() < _FRAME_SHARE:
        return None, frame.mean(0)
    return _NAMES[best], np.median(frame[near[:, best]], axis=0)


def _regions(
    pixels: np.ndarray, backdrop: np.ndarray, background: str, speck: float
) -> tuple[np.ndarray, list[str | None]]:
    """Label what stands out from the background, one colour a region.

    Returns:
        ``(height, width)`` labels: 0 background, 1.. regions, -1 neither (pieces below ``speck`` pixels, odd colours);
        and the regions' colours, ``None`` where no palette colour fits.
    """
    outstanding = np.linalg.norm(pixels - backdrop, axis=-1) > _NEAR
    blobs, areas, _ = _connected(outstanding.astype(np.int64))
    owners = np.zeros(blobs.shape, np.int64)
    for blob in np.flatnonzero(areas >= speck) + 1:
        inside = blobs == blob
        owners[inside] = _owners(pixels[inside], backdrop, background, speck)
    pieces, areas, colors = _connected(owners)
    kept = areas >= speck
    numbers = np.concatenate([[0], np.where(kept, np.cumsum(kept), -1)])
    labels = np.where(outstanding & (owners == 0), -1, numbers[pieces])
    return labels, [(*_NAMES, None)[color - 1] for color in colors[kept]]


def _owners(pixels: np.ndarray, backdrop: np.ndarray, background: str, speck: float) -> np.ndarray:
    """The colour that each of a blob's pixels ``(n, 3)`` belongs to, numbered from 1; one past the last: none at all.

    Pixels that are no blend of the background with one of the blob's colours belong to nothing, 0.
    """
    near = _distances(pixels, _PALETTE) < _NEAR
    near[:, _NAMES.index(background)] = False
    main = int(near.sum(0).argmax())
    if near[:, main].mean() < _PURE:
        return np.full(len(pixels), len(_NAMES) + 1)
    # An edge blends with the background and may look like a third colour: only what is no such blend is an object.
    _, off = _blend(pixels, backdrop, _PALETTE[main])
    others = (near & (off > _NEAR / 2)[:, None]).sum(0) >= speck
    colors = np.union1d(np.flatnonzero(others), main)
    off = np.stack([_blend(pixels, backdrop, _PALETTE[color])[1] for color in colors])
    return np.where(off.min(0) < _NEAR, colors[off.argmin(0)] + 1, 0)


def _blend(pixels: np.ndarray, backdrop: np.ndarray, color: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of ``color`` in each pixel, 0 to 1, seen as its blend with ``backdrop``, and how far off that is."""
    axis = color - backdrop
    share = np.clip((pixels - backdrop) @ axis / (axis @ axis), 0, 1)
    return share, np.linalg.norm(pixels - backdrop - share[..., None] * axis, axis=-1)


def _silhouette(
    pixels: np.ndarray, backdrop: np.ndarray, labels: np.ndarray, label: int, color: str | None
) -> tuple[np.ndarray, int, int]:
    """How much of each pixel in a window around a region is the region's colour, 0 to 1; the window's left and top."""
    mask = labels == label
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = max(rows[0] - _RIM, 0), max(columns[0] - _RIM, 0)
    window = np.s_[top : rows[-1] + 1 + _RIM, left : columns[-1] + 1 + _RIM]
    mask, patch = mask[window], pixels[window]
    if color is None:
        tint = np.median(patch[mask], axis=0)
    else:
        pure = mask & (np.linalg.norm(patch - rgb(color), axis=-1) < _NEAR)
        tint = np.median(patch[pure], axis=0) if pure.any() else rgb(color)
    share, off = _blend(patch, backdrop, tint)
    # One pixel around the region holds the faint half of its edge; further out there is only noise.
    reach = _grown(mask) & (mask | (labels[window] <= 0))
    alpha = share * (reach & (off < _NEAR))
    return alpha if alpha.any() else mask.astype(np.float32), left, top


def _recognise(alpha: np.ndarray) -> tuple[str | None, float, float, float, float]:
    """A silhouette's kind, ``None`` if not clear, and the likeliest kind's centre and radius (pixels) and overlap."""
    overlaps, places = _match(alpha)
    second, best = np.argsort(overlaps)[-2:]
    clear = overlaps[best] >= _OVERLAP and 1 - overlaps[best] <= _CLEAR * (1 - overlaps[second])
    return KINDS[best] if clear else None, *places[best], overlaps[best]


def _match(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hold each kind against a silhouette ``(height, width)``, with its centroid and area, as sharp, soft and rounded.

    Returns:
        The kinds' best overlaps ``(kinds,)`` and where they are reached: x, y and radius in pixels, ``(kinds, 3)``.
    """
    height, width = alpha.shape
    area = alpha.sum()
    x, y = alpha.sum(0) @ (np.arange(width) + 0.5) / area, alpha.sum(1) @ (np.arange(height) + 0.5) / area
    unit_area, unit_x, unit_y = np.transpose([_moments(kind) for kind in KINDS])

    def places(radii: np.ndarray) -> np.ndarray:
        return np.stack([x - unit_x * radii, y - unit_y * radii, radii], axis=1)

    def draw(radii: np.ndarray) -> np.ndarray:
        at = zip(KINDS, places(radii), strict=True)
        return np.stack([coverage(kind, x, y, radius, width, height) for kind, (x, y, radius) in at])

    radii = np.sqrt(area / unit_area)
    sharp = draw(radii)
    tried = [(radii, _softened(sharp, passes)) for passes in _SOFT]
    for passes in _ROUND:
        # Rounding takes area away, which a larger template makes up for.
        rounded = _hardened(_softened(sharp, passes)).sum((1, 2))
        larger = radii * np.sqrt(area / np.maximum(rounded, area / _REGROWN**2))
        tried.append((larger, _hardened(_softened(draw(larger), passes))))
    overlaps = np.stack([_overlap(alpha, templates) for _, templates in tried])
    best = overlaps.argmax(0), np.arange(len(KINDS))
    return overlaps[best], places(np.stack([radii for radii, _ in tried])[best])


def _overlap(alpha: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Intersection over union of a silhouette with each of ``(kinds, height, width)`` templates of its area."""
    # What a template covers beyond the window counts against it.
    beyond = np.maximum(alpha.sum() - templates.sum((1, 2)), 0)
    return np.minimum(alpha, templates).sum((1, 2)) / (np.maximum(alpha, templates).sum((1, 2)) + beyond)


@cache
def _moments(kind: str) -> tuple[float, float, float]:
    """Area and centroid of a kind at radius 1."""
    radius = 64.0
    drawn = coverage(kind, 1.25 * radius, 1.25 * radius, radius, int(2.5 * radius), int(2.5 * radius))
    at = (np.arange(len(drawn)) + 0.5) / radius - 1.25
    area = drawn.sum()
    return float(area / radius**2), float(drawn.sum(0) @ at / area), float(drawn.sum(1) @ at / area)


def _distances(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(pixels[:, None] - colors, axis=-1)


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask with its eight neighbours."""
    for _ in range(2):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        mask = grown.T
    return mask


def _softened(templates: np.ndarray, passes: int) -> np.ndarray:
    """Each of ``(kinds, height, width)`` templates after so many passes of the filter 1, 2, 1 along both axes."""
    return _binomial(templates.shape[1], passes) @ templates @ _binomial(templates.shape[2], passes)


@lru_cache(maxsize=512)
def _binomial(length: int, passes: int) -> np.ndarray:
    once = np.eye(length) / 2 + (np.eye(length, k=1) + np.eye(length, k=-1)) / 4
    return np.linalg.matrix_power(once, passes).astype(np.float32)


def _hardened(alpha: np.ndarray) -> np.ndarray:
    return np.clip(2 * alpha - 0.5, 0, 1)


def _connected(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """8-connected regions of equal positive value.

    Returns:
        Labels ``(height, width)``, from 1 and 0 where there is no region; each region's area and value ``(regions,)``.
    """
    index = np.arange(values.size).reshape(values.shape)
    neighbours = (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    )
    joined = [(here, there, (values[here] == values[there]) & (values[here] > 0)) for here, there in neighbours]
    edges = np.concatenate([[index[here][both], index[there][both]] for here, there, both in joined], axis=1)
    # Union-find on all edges at once: hang each root below the smallest it touches, flatten, keep what is still open.
    roots = index.ravel().copy()
    while edges.size:
        np.minimum.at(roots, edges.max(0), edges.min(0))
        while not np.array_equal(flatter := roots[roots], roots):
            roots = flatter
        edges = roots[edges]
        edges = edges[:, edges[0] != edges[1]]
    firsts = np.flatnonzero((roots == index.ravel()) & (values.ravel() > 0))
    numbers = np.zeros(values.size, np.int64)
    numbers[firsts] = np.arange(1, len(firsts) + 1)
    labels = numbers[roots].reshape(values.shape)
    return labels, np.bincount(labels.ravel(), minlength=len(firsts) + 1)[1:], values.flat[firsts]
