"""The embedded world: scenes drawn by code, their captions, an oracle that reads pictures, and a trained model."""

from diffusion_attn.shapes.captions import CaptionError, caption, parse_caption
from diffusion_attn.shapes.judging import Judgement, Score, judge, score
from diffusion_attn.shapes.models import available, load_pipeline
from diffusion_attn.shapes.oracle import FoundShape, Reading, read
from diffusion_attn.shapes.renderer import render
from diffusion_attn.shapes.scenes import COLORS, KINDS, RELATIONS, SIZES, Scene, Shape, sample_scene, sample_scenes

__all__ = [
    "COLORS",
    "KINDS",
    "RELATIONS",
    "SIZES",
    "CaptionError",
    "FoundShape",
    "Judgement",
    "Reading",
    "Scene",
    "Score",
    "Shape",
    "available",
    "caption",
    "judge",
    "load_pipeline",
    "parse_caption",
    "read",
    "render",
    "sample_scene",
    "sample_scenes",
    "score",
]
