"""Pipelines that edit pictures; each is made of a stock pipeline's own components with ``from_pipe``."""

from diffusion_attn.pipelines.dpl import DPLPipeline
from diffusion_attn.pipelines.output import EditOutput
from diffusion_attn.pipelines.prompt_to_prompt import PromptToPromptPipeline
from diffusion_attn.pipelines.vimaedit import ViMAEditPipeline

__all__ = ["DPLPipeline", "EditOutput", "PromptToPromptPipeline", "ViMAEditPipeline"]
