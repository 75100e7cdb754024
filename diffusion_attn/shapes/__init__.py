"""The embedded world: scenes drawn by code, their captions, an oracle that reads pictures, and a model trained on them."""

from diffusion_attn.shapes.captions import CaptionError, caption, parse_caption
from diffusion_attn.shapes.renderer import render
from diffusion_attn.shapes.scenes import COLORS, KINDS, RELATIONS, SIZES, Scene, Shape, sample_scene, sample_scenes

__all__ = [
    "COLORS",
    "KINDS",
    "RELATIONS",
    "SIZES",
    "CaptionError",
    "Scene",
    "Shape",
    "caption",
    "parse_caption",
    "render",
    "sample_scene",
    "sample_scenes",
]
