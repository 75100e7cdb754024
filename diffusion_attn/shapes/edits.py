"""Edits of drawn scenes, each with what must come out and where the picture may change; also laid out as PIE-Bench."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from diffusion_attn.core.files import save_json
from diffusion_attn.shapes.captions import caption
from diffusion_attn.shapes.renderer import coverage, render
from diffusion_attn.shapes.scenes import COLORS, KINDS, Scene, Shape, sample_scene

KINDS_OF_EDIT = ("swap", "recolour", "insert", "reweight")
_PIE_KINDS = {"swap": "1", "insert": "2", "recolour": "6"}
_MARGIN = 3  # pixels around an object at 64 that count as it: anti-aliasing, and what the autoencoder smears


@dataclass(frozen=True)
class SceneEdit:
    """One edit of a drawn scene.

    Attributes:
        kind: of the edit, one of `KINDS_OF_EDIT`.
        source, target: the scene, and what it is to become.
        object: the index in ``source`` of what is edited; what is inserted has the next.
        weights: of words, where they alone are the edit.
    """

    kind: str
    source: Scene
    target: Scene
    object: int
    weights: dict[str, float] | None = None

    @property
    def prompts(self) -> tuple[str, str]:
        """The captions of source and target."""
        return caption(self.source), caption(self.target)

    @property
    def words(self) -> list[str]:
        """The nouns of the source."""
        return [shape.kind for shape in self.source.shapes]

    @property
    def blend_words(self) -> tuple[list[str], list[str]]:
        """The words of source and target that name what changes."""
        changed = self.target.shapes[self.object]
        before = [self.source.shapes[self.object].kind] if self.object < len(self.source.shapes) else []
        return before or [self.source.shapes[0].kind], [changed.kind]

    def image(self, size: int) -> Image.Image:
        """The source, drawn."""
        return render(self.source, size)

    def masks(self, size: int) -> np.ndarray:
        """``(objects, size, size)`` bool: where each object of the source is."""
        return np.stack([_covered(shape, size) for shape in self.source.shapes])

    def changing(self, size: int) -> np.ndarray:
        """``(size, size)`` bool: what the object covers before and after, or all but the old object for insertions."""
        if self.kind == "insert":
            return ~_covered(self.source.shapes[0], size)
        return np.logical_or.reduce([_covered(x.shapes[self.object], size) for x in (self.source, self.target)])

    def editable(self, size: int) -> np.ndarray:
        """``(size, size)`` bool: where the picture may change, with a margin; all but the old object for insertions."""
        changing = self.changing(size)
        return ~_grown(~changing) if self.kind == "insert" else _grown(changing)


def scene_edits(count: int, seed: int = 0) -> Iterator[SceneEdit]:
    """``count`` edits: their kinds in turn; scenes of one and of two objects in turn, but for insertions."""
    rng = random.Random(seed)
    for index in range(count):
        kind = KINDS_OF_EDIT[index % len(KINDS_OF_EDIT)]
        yield _draw(rng, kind, 2 if kind == "insert" else 1 + index // len(KINDS_OF_EDIT) % 2)


def write_edits(folder: str | Path, count: int = 60, seed: int = 0, size: int = 64) -> None:
    """Write edits as a folder that is laid out like PIE-Bench: ``mapping_file.json`` and ``annotation_images``.

    Swaps, recolourings and insertions, `scene_edits` without what weighs words. Masks are exact: what the object covers
    before and after, or for insertions all but the object that is there. Insertions have no ``blended_word``.

    Args:
        folder: made if it is not there.
        count: how many.
        seed: of the edits.
        size: of the pictures, in pixels.
    """
    from diffusion_attn.metrics.pie_bench.items import MAPPING, PICTURES, encode_mask

    pictures = Path(folder) / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = (edit for edit in scene_edits(2 * count, seed) if edit.kind in _PIE_KINDS)
    mapping = {}
    for index, edit in enumerate(islice(drawn, count)):
        name = f"{index:012d}"
        edit.image(size).save(pictures / f"{name}.png")
        source, target = edit.prompts
        before, after = edit.blend_words
        mapping[name] = {
            "image_path": f"{name}.png",
            "original_prompt": source,
            "editing_prompt": target,
            "editing_instruction": f"{edit.kind}: {source} -> {target}",
            "editing_type_id": _PIE_KINDS[edit.kind],
            "blended_word": "" if edit.kind == "insert" else f"{before[0]} {after[0]}",
            "mask": encode_mask(torch.from_numpy(edit.changing(size))),
        }
    save_json(Path(folder) / MAPPING, mapping)


def _draw(rng: random.Random, kind: str, objects: int) -> SceneEdit:
    while True:
        scene = sample_scene(rng)
        kinds = {shape.kind for shape in scene.shapes}
        if len(scene.shapes) != objects or len(kinds) != objects:
            continue
        if kind == "insert":
            return SceneEdit(kind, Scene(scene.shapes[:1], scene.background), scene, 1)
        which = rng.randrange(objects)
        shape = scene.shapes[which]
        if kind == "swap":
            changed = replace(shape, kind=rng.choice([k for k in KINDS if k not in kinds]))
        elif kind == "recolour":
            taken = {scene.background, *(s.color for s in scene.shapes)}
            changed = replace(shape, color=rng.choice([c for c in sorted(COLORS) if c not in taken]))
        elif shape.size is None:
            continue
        else:
            return SceneEdit(kind, scene, scene, which, {shape.size: 8.0})
        shapes = tuple(changed if index == which else s for index, s in enumerate(scene.shapes))
        return SceneEdit(kind, scene, replace(scene, shapes=shapes), which)


def _covered(shape: Shape, size: int) -> np.ndarray:
    return coverage(shape.kind, shape.x * size, shape.y * size, shape.radius * size, size, size) > 0.5


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask with a margin around it."""
    side = 2 * max(1, round(_MARGIN * len(mask) / 64)) + 1
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(side))) > 0
