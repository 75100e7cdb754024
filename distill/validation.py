"""Pictures of fixed prompts and seeds, drawn by the teacher once and by the student every so often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusion_attn.core.calls import call_arguments
from diffusion_attn.core.enable import using
from diffusion_attn.core.files import written
from diffusion_attn.distill.config import RunConfig
from diffusion_attn.distill.families import denoiser_of, family_of
from diffusion_attn.distill.student import Student


class Validation:
    """Grids of pictures: one column for each prompt, the teacher's above the student's.

    Args:
        config: prompts, steps and guidance.
        folder: where the grids go; made with the first one.
        text_tokens: see `DataConfig`.
    """

    def __init__(self, config: RunConfig, folder: Path, text_tokens: int | None = None) -> None:
        self.config, self.folder, self.text_tokens = config, folder, text_tokens
        self._teacher: list[Image.Image] | None = None

    def draw(self, pipe: Any, student: Student, step: int) -> None:
        """Draw with the student as it is on ``pipe``, the teacher, and write ``folder/step-NNNNNN.png``."""
        from diffusers.utils import make_image_grid

        if self._teacher is None:
            self._teacher = self._pictures(pipe)
        with using(pipe, student):
            pictures = self._pictures(pipe)
        self.folder.mkdir(exist_ok=True)
        with written(self.folder / f"step-{step:06d}.png") as part:
            make_image_grid([*self._teacher, *pictures], 2, len(pictures)).save(part, "PNG")

    def _pictures(self, pipe: Any) -> list[Image.Image]:
        config, family, denoiser = self.config, family_of(pipe), denoiser_of(pipe)
        size = family.native_size()
        length = {} if self.text_tokens is None else {"max_sequence_length": self.text_tokens}
        half = denoiser.dtype != torch.float32
        pictures = []
        for number, prompt in enumerate(config.validation_prompts):
            noise = torch.Generator().manual_seed(config.seed + number)
            with _quietly(pipe), torch.autocast(denoiser.device.type, denoiser.dtype, half):
                latents = pipe(
                    **{**call_arguments(pipe, [prompt], config.validation_guidance), **length},
                    width=size,
                    height=size,
                    num_inference_steps=config.validation_steps,
                    generator=noise,
                    output_type="latent",
                ).images
            # Here rather than in the pipeline, which has no way to run the autoencoder alone in float32.
            with torch.no_grad():
                latents = family.unpack(latents.float(), size) / pipe.vae.config.scaling_factor
                decoded = pipe.vae.decode(latents + (pipe.vae.config.get("shift_factor") or 0.0)).sample
            pictures += pipe.image_processor.postprocess(decoded)
        return pictures


@contextmanager
def _quietly(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
