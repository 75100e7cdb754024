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
from diffusion_attn.editing.prompts import word_tokens
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
            height, width: in pixels; ``None``: the picture's.
            options: of `diffusion_attn.editing.inversion.dynamic_prompts`.

        Raises:
            ValueError: a word is not in the prompt, or an argument is not what it should be.
        """
        tokens = []
        for word in words:
            found = word_tokens(prompt, word, self.tokenizer)
            if not found:
                raise ValueError(f"words names {word!r}, which is not a word of the prompt {prompt!r}.")
            tokens.append(found)
        latents = self.encode_image(image, height, width)
        if background is not None:
            inversion = ddim_invert(self, latents, prompt, num_inference_steps=num_inference_steps)
        else:
            map_size = options.get("map_size")
            inversion, background = self._invert_and_segment(latents, prompt, tokens, num_inference_steps, map_size)
        return dynamic_prompts(self, inversion, words, background=background, **options)

    def _invert_and_segment(
        self,
        latents: torch.Tensor,
        prompt: str,
        tokens: Sequence[Sequence[int]],
        steps: int,
        map_size: int | Size | None,
    ) -> tuple[Inversion, torch.Tensor | None]:
        """The inversion, and where on the way the self-attention saw none of the words."""
        size = size_of(latents)
        half = reduced(size, 2)
        recorders = {"self": MapRecorder("self", half), "cross": MapRecorder("cross", map_grid(size, map_size))}
        sums: dict[str, Any] = {"self": 0, "cross": 0}

        def add(step: int) -> None:
            for kind, recorder in recorders.items():
                sums[kind] = sums[kind] + recorder.take()[0]

        control = AttentionControl(size, recorders=list(recorders.values()), guided=False)
        with control.on(self.unet):
            inversion = ddim_invert(self, latents, prompt, num_inference_steps=steps, callback=add)
        cross = sums["cross"] / inversion.steps
        nouns = torch.stack([cross[..., list(found)].mean(-1) for found in tokens], -1)
        if any(side % cells for side, cells in zip(half, nouns.shape[:2], strict=True)):
            nouns = F.interpolate(nouns.permute(2, 0, 1)[None], half, mode="area")[0].permute(1, 2, 0)
        mask = background_mask((sums["self"] / inversion.steps).flatten(0, 1), nouns)
        return inversion, mask if mask.any() else None
