"""Distillation: train the weights of a method until a model with it does what the model does without."""

from diffusion_attn.distill.config import ConfigError, DistillConfig
from diffusion_attn.distill.sources import DataError
from diffusion_attn.distill.trainer import Distiller, DivergedError

__all__ = ["ConfigError", "DataError", "DistillConfig", "Distiller", "DivergedError"]
