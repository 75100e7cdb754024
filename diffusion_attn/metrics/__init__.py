"""What is measured: of pictures, of edits, and of runs."""

from diffusion_attn.metrics import pie_bench

__all__ = ["pie_bench"]
