"""DPL: invert a picture with words that look at their own objects, then edit it with Prompt-to-Prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.attention import AttentionControl, MapRecorder
from diffusion_attn.editing.grounding import background_mask
from diffusion_attn.editing.inversion import Inversion, ddim_invert, dynamic_prompts
from diffusion_attn.editing.layers import map_grid, reduced, size_of
from diffusion_attn.editing.text import named
from diffusion_attn.pipelines.prompt_to_prompt import PromptToPromptPipeline


class DPLPipeline(PromptToPromptPipeline):
    """Prompt-to-Prompt with the dynamic prompts that `invert` learns. Source: arXiv 2309.15664."""

    def invert(
        self,
        image: Any,
        prompt: str,
        words: Sequence[str],
        *,
        num_inference_steps: int = 50,
        background: torch.Tensor | None = None,
        background_threshold: float = 0.2,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Inversion:
        """Invert a picture and learn embeddings of ``words`` for it.

        Args:
            image: a picture, an array, a tensor, or latents ``(1, C, h, w)``.
            prompt: that describes it.
            words: its nouns, pieces of ``prompt.split(" ")``.
            num_inference_steps: of the inversion, and of all edits with it.
            background: ``(H, W)``, true where none of the words is; ``None``: segments of the self-attention during
                the inversion in which no word is strong.
            background_threshold: what counts as strong, see `diffusion_attn.editing.grounding.background_mask`.
            height, width: in pixels; ``None``: the picture's.
            options: of `diffusion_attn.editing.inversion.dynamic_prompts`.

        Raises:
            ValueError: a word is not in the prompt, or an argument is not what it should be.
        """
        if background is None:
            inversion, background = self.segment(
                image,
                prompt,
                words,
                num_inference_steps=num_inference_steps,
                threshold=background_threshold,
                map_size=options.get("map_size"),
                height=height,
                width=width,
            )
        else:
            latents = self.encode_image(image, height, width)
            inversion = ddim_invert(self, latents, prompt, num_inference_steps=num_inference_steps)
        return dynamic_prompts(self, inversion, words, background=background, **options)

    def segment(
        self,
        image: Any,
        prompt: str,
        words: Sequence[str],
        *,
        num_inference_steps: int = 50,
        threshold: float = 0.2,
        map_size: int | Size | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[Inversion, torch.Tensor | None]:
        """Invert a picture without optimising anything, and find where none of ``words`` is.

        Args:
            image, prompt, words, num_inference_steps, height, width: as in `invert`.
            threshold: as in `diffusion_attn.editing.grounding.background_mask`.
            map_size: ``(height, width)`` of the cross-attention that is read; ``None``: a quarter of the latent's.

        Returns:
            The inversion and a mask ``(H, W)`` bool, or ``None`` where words are everywhere.

        Raises:
            ValueError: a word is not in the prompt, or an argument is not what it should be.
        """
        [tokens] = self.word_tokens([prompt], [named(prompt, words)], "words")
        latents = self.encode_image(image, height, width)
        size = size_of(latents)
        half = reduced(size, 2)
        recorders = {"self": MapRecorder("self", half), "cross": MapRecorder("cross", map_grid(size, map_size))}
        sums: dict[str, Any] = {"self": 0, "cross": 0}

        def add(step: int) -> None:
            for kind, recorder in recorders.items():
                sums[kind] = sums[kind] + recorder.take()[0]

        control = AttentionControl(size, recorders=list(recorders.values()))
        with control.on(self.unet):
            inversion = ddim_invert(self, latents, prompt, num_inference_steps=num_inference_steps, callback=add)
        cross = sums["cross"] / inversion.steps
        nouns = torch.stack([cross[..., found].mean(-1) for found in tokens], -1)
        if any(side % cells for side, cells in zip(half, nouns.shape[:2], strict=True)):
            nouns = F.interpolate(nouns.permute(2, 0, 1)[None], half, mode="area")[0].permute(1, 2, 0)
        mask = background_mask((sums["self"] / inversion.steps).flatten(0, 1), nouns, threshold=threshold)
        return inversion, mask if mask.any() else None
