"""PIE-Bench (arXiv 2310.01506): its items, the numbers of an edit, and their means."""

from diffusion_attn.metrics.pie_bench.items import KINDS, Item, decode_mask, encode_mask, load
from diffusion_attn.metrics.pie_bench.pixels import mse, psnr, ssim
from diffusion_attn.metrics.pie_bench.scores import COLUMNS, EditScorer, means
from diffusion_attn.metrics.pie_bench.structure import StructureDistance, self_similarity

__all__ = [
    "COLUMNS",
    "KINDS",
    "EditScorer",
    "Item",
    "StructureDistance",
    "decode_mask",
    "encode_mask",
    "load",
    "means",
    "mse",
    "psnr",
    "self_similarity",
    "ssim",
]
