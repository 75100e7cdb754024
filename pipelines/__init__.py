"""Pipelines that edit pictures or make large ones, each from a stock pipeline's own components by ``from_pipe``."""

from diffusion_attn.pipelines.demofusion import DemoFusion
from diffusion_attn.pipelines.dpl import DPLPipeline
from diffusion_attn.pipelines.high_resolution import HighResolutionOutput, HighResolutionPipeline
from diffusion_attn.pipelines.ladder import Ladder, Stage
from diffusion_attn.pipelines.output import EditOutput
from diffusion_attn.pipelines.prompt_to_prompt import PromptToPromptPipeline
from diffusion_attn.pipelines.vimaedit import ViMAEditPipeline

__all__ = [
    "DPLPipeline",
    "DemoFusion",
    "EditOutput",
    "HighResolutionOutput",
    "HighResolutionPipeline",
    "Ladder",
    "PromptToPromptPipeline",
    "Stage",
    "ViMAEditPipeline",
]
