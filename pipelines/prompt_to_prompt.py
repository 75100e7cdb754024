"""Prompt-to-Prompt: edit a picture by editing its prompt, with the attention of the original."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.attention import AttentionControl, MapRecorder
from diffusion_attn.editing.controls import PromptEdit
from diffusion_attn.editing.grounding import local_blend_mask
from diffusion_attn.editing.inversion import Inversion
from diffusion_attn.editing.inversion.ddim_path import DdimPath
from diffusion_attn.editing.layers import map_grid, reduced, size_of
from diffusion_attn.editing.network import Network
from diffusion_attn.editing.prompts import ReplaceSteps, Window
from diffusion_attn.editing.text import Conditioning, encode, encode_negative
from diffusion_attn.pipelines.editing import EditingPipeline, Words
from diffusion_attn.pipelines.output import EditOutput


class PromptToPromptPipeline(EditingPipeline):
    """Draws a source prompt and edited ones from one noise, and gives the edited ones the source's attention.

    Layout stays by design: change words for things of similar size and place, add words, weigh them. For real pictures
    give an `Inversion`. Serves Stable Diffusion 1, 2 and XL, at any size the model takes. Source: arXiv 2208.01626.
    """

    @torch.no_grad()
    def __call__(
        self,
        source_prompt: str | None = None,
        target_prompt: str | Sequence[str] | None = None,
        *,
        inversion: Inversion | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        edit_type: Literal["replace", "refine", "auto"] = "auto",
        alignment: Literal["aligned", "reference"] = "aligned",
        cross_replace_steps: ReplaceSteps = 0.8,
        self_replace_steps: Window = 0.4,
        word_weights: Mapping[str | int, float] | None = None,
        max_queries: int | None = None,
        blend_words: Sequence[Words] | None = None,
        blend_threshold: float = 0.3,
        map_size: int | Size | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> EditOutput | tuple[Any, ...]:
        """Draw the source and the targets.

        Args:
            source_prompt: the prompt that is edited; with an ``inversion`` its prompt.
            target_prompt: what it becomes, or several of that, drawn in one batch.
            inversion: of a real picture. Source prompt, start, steps, unconditional embeddings and learned words are
                its; a word that was learned has its embedding wherever it stands in a prompt.
            num_inference_steps: without an ``inversion``.
            guidance_scale: 1 for none.
            negative_prompt: unless the inversion has learned unconditional embeddings.
            edit_type, alignment, cross_replace_steps, self_replace_steps, word_weights: as in
                `diffusion_attn.editing.controls.PromptEdit`.
            max_queries: layers of more queries keep their self-attention; ``None``: those above a quarter of the
                latent's height and width.
            blend_words: ``(source, target)``, a word or several of each prompt, or one entry for each target: outside
                of where they are seen, targets stay as the source.
            blend_threshold: above which part of its maximum a word's map counts as seen.
            map_size: ``(height, width)`` of the maps that are blended with; ``None``: a quarter of the latent's.
            height, width: in pixels; ``None``: the model's own.
            generator: of the noise. Take a deterministic scheduler: others draw noise for source and targets apart.
            latents: ``(1, C, h, w)``, the noise to start from.
            ip_adapter_image_embeds: one ``(rows of the batch, pictures, D)`` for each image adapter that is loaded,
                unconditional rows first, used as they are.
            output_type: of the pictures.
            return_dict: an `EditOutput`, or a tuple of what it holds.
            callback_on_step_end: called with the pipeline, the step, its timestep and ``{"latents": ...}``; what it
                returns under ``"latents"`` is gone on with.
            callback_on_step_end_tensor_inputs: what it is given; there is nothing but ``"latents"``.

        Raises:
            ValueError: an argument is not what it should be, or a word is not in its prompt.
            DiffusionAttnError: the inversion is of another model or prompt.
            MethodConflictError: a method in force computes the attention that is to be edited.
        """
        self.check_callback(callback_on_step_end_tensor_inputs)
        source, targets = _prompts(source_prompt, target_prompt, inversion)
        prompts, rows = [source, *targets], 1 + len(targets)
        if inversion is not None:
            inversion.check(self)
            path = DdimPath(self.scheduler, timesteps=inversion.timesteps)
            start, timesteps = inversion.latents[-1], path.timesteps
        else:
            path = None
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
            start, timesteps = self._noise(latents, height, width, generator), self.scheduler.timesteps
        size = size_of(start)
        quarter = reduced(size, 4)
        edit = PromptEdit(
            source,
            targets,
            self.tokenizer,
            len(timesteps),
            edit_type=edit_type,
            alignment=alignment,
            cross_replace_steps=cross_replace_steps,
            self_replace_steps=self_replace_steps,
            word_weights=word_weights,
            max_queries=quarter[0] * quarter[1] if max_queries is None else max_queries,
        )
        blend = None
        if blend_words is not None:
            if not isinstance(blend_words, str) and len(blend_words) == 2:
                blend_words = [blend_words[0], *[blend_words[1]] * len(targets)]
            found = self.word_tokens(prompts, blend_words, "blend_words")
            tokens = [[token for word in row for token in word] for row in found]
            blend = _Blend(tokens, blend_threshold, map_grid(size, map_size))
        added = self.image_conditions(ip_adapter_image_embeds)
        guided = guidance_scale != 1
        control = AttentionControl(size, [edit], [blend.recorder] if blend else [], rows)
        network = Network(self, size)
        negative = encode_negative(self, negative_prompt)
        text = encode(self, prompts)
        if inversion is not None and inversion.prompt_embeds is not None:
            own = inversion.prompt_embeds.to(text.embeds)
            text = replace(text, embeds=torch.cat([own, text.embeds[1:]]))
        # Schedulers that add noise draw it for every row: only deterministic ones keep source and targets together.
        options = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            options["generator"] = generator

        x = start.to(self._execution_device, torch.float32).expand(rows, -1, -1, -1)
        with control.on(self.unet), self.progress_bar(total=len(timesteps)) as bar:
            for step, timestep in enumerate(timesteps):
                control.step = step
                if inversion is not None:
                    if (learned := inversion.learned(step)) is not None:
                        text = encode(self, prompts, learned)
                    if inversion.null_embeds is not None:
                        negative = Conditioning(inversion.null_embeds[step : step + 1].to(x.device), negative.pooled)
                whole = Conditioning.join(*[negative] * rows, text) if guided else text
                batch = torch.cat([x, x]) if guided else x
                if path is None:
                    batch = self.scheduler.scale_model_input(batch, timestep)
                output = network(batch, timestep, whole, **added)
                if guided:
                    unconditional, conditional = output.chunk(2)
                    output = unconditional + guidance_scale * (conditional - unconditional)
                if path is not None:
                    x = path.down(step, output, x)
                else:
                    x = self.scheduler.step(output, timestep, x, return_dict=False, **options)[0]
                if inversion is not None and inversion.direct:
                    x = torch.cat([inversion.latents[len(timesteps) - 1 - step].to(x), x[1:]])
                if blend is not None:
                    x = blend(x)
                if callback_on_step_end is not None:
                    x = callback_on_step_end(self, step, timestep, {"latents": x}).get("latents", x)
                bar.update()
        output = EditOutput(
            images=self.decode_latents(x[1:], output_type),
            source=self.decode_latents(x[:1], output_type),
            blend_mask=blend.mask if blend else None,
            word_maps=blend.maps if blend else None,
        )
        self.maybe_free_model_hooks()
        return output if return_dict else tuple(output.values())

    def _noise(
        self, latents: torch.Tensor | None, height: int | None, width: int | None, generator: Any
    ) -> torch.Tensor:
        channels = self.unet.config.in_channels
        if latents is None:
            shape = (1, channels, *self.latent_size(height, width))
            noise = randn_tensor(shape, generator, self._execution_device, torch.float32)
            return noise * self.scheduler.init_noise_sigma
        if latents.ndim != 4 or latents.shape[:2] != (1, channels):
            raise ValueError(
                f"latents have the shape {tuple(latents.shape)}; give one start for all prompts: (1, {channels}, h, w)."
            )
        return latents * self.scheduler.init_noise_sigma


class _Blend:
    """Keeps targets as the source outside of where some words are seen. Source: the local blend of the paper's code.

    Args:
        tokens: of the words of each row, the source's first.
        threshold: as in `local_blend_mask`.
        grid: of the maps.
    """

    def __init__(self, tokens: Sequence[list[int]], threshold: float, grid: Size) -> None:
        self.tokens, self.threshold = tokens, threshold
        self.recorder = MapRecorder("cross", grid)
        self.maps: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The latents ``(1 + T, C, h, w)`` of a step, blended."""
        maps = self.recorder.take()
        words = [row[..., tokens].sum(-1) for row, tokens in zip(maps, self.tokens, strict=True)]
        now = torch.stack(words)[:, None]
        self.maps = now if self.maps is None else self.maps + now
        self.mask = local_blend_mask(self.maps, self.threshold, size_of(x))[1:]
        return torch.cat([x[:1], torch.where(self.mask, x[1:], x[:1])])


def _prompts(
    source: str | None, target: str | Sequence[str] | None, inversion: Inversion | None
) -> tuple[str, list[str]]:
    if inversion is not None:
        if None not in (source, inversion.prompt) and source != inversion.prompt:
            raise DiffusionAttnError(
                f"source_prompt is {source!r}, and the inversion is of {inversion.prompt!r}; leave source_prompt out, "
                "or invert the picture with that prompt."
            )
        source = inversion.prompt or source
    if source is None:
        raise ValueError("source_prompt is missing; give it, or an inversion that was made with a prompt.")
    targets = [target] if isinstance(target, str) else list(target or ())
    if not targets:
        raise ValueError("target_prompt is missing; give the edited prompt, or a list of them.")
    return source, targets
