"""ViMAEdit: edit a picture by its prompt, with the edited picture's estimated embedding and a mask found on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffusion_attn.core.loading import MODEL_ONLY, NO_CODE, find_model
from diffusion_attn.core.unet_layout import Size
from diffusion_attn.editing.attention import AttentionControl
from diffusion_attn.editing.controls import PromptEdit
from diffusion_attn.editing.edit_area import EditArea
from diffusion_attn.editing.layers import map_grid, reduced, size_of
from diffusion_attn.editing.network import Network
from diffusion_attn.editing.prompts import ReplaceSteps, Window
from diffusion_attn.editing.schedulers import EditDDIMScheduler
from diffusion_attn.editing.text import Conditioning, encode, encode_negative, is_xl
from diffusion_attn.pipelines.editing import EditingPipeline, Words
from diffusion_attn.pipelines.image_guidance import Layout, adapter_embeds, adapter_scale
from diffusion_attn.pipelines.masks import EditMasks, painted_mask
from diffusion_attn.pipelines.output import EditOutput
from diffusion_attn.pipelines.pairs import each, paired

BlendWords = tuple[Words, Words]


class ViMAEditPipeline(EditingPipeline):
    """Edits real pictures without inverting them: the source's path is known, since it ends at the picture.

    Prompt-to-Prompt steers attention; a loaded IP-Adapter is told what the edited picture should look like; with words
    to blend, the edit stays where they are seen, and noise lets it change what is most theirs. Serves Stable Diffusion
    1, 2 and XL, at any size the model takes. Source: arXiv 2410.10496.
    """

    image_encoder: Any
    feature_extractor: Any
    guidance_text_encoder: Any
    guidance_tokenizer: Any

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->guidance_text_encoder->unet->vae"
    _optional_components: ClassVar = [
        *EditingPipeline._optional_components,
        "guidance_text_encoder",
        "guidance_tokenizer",
    ]

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Any,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        guidance_text_encoder: CLIPTextModelWithProjection | None = None,
        guidance_tokenizer: CLIPTokenizer | None = None,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        """Take the components of a Stable Diffusion pipeline, and the text encoder of an IP-Adapter's CLIP.

        A ``scheduler`` without ``edit_step`` becomes an `EditDDIMScheduler`.
        """
        if not hasattr(scheduler, "edit_step"):
            # As StableDiffusionPipeline does, and SDXL's does not: latents are no pixels, to be clipped.
            scheduler = EditDDIMScheduler.from_config(scheduler.config, clip_sample=False, steps_offset=1)
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            text_encoder_2,
            tokenizer_2,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
        )
        self.register_modules(guidance_text_encoder=guidance_text_encoder, guidance_tokenizer=guidance_tokenizer)

    def load_clip(self, name: str | os.PathLike[str] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", **options: Any) -> None:
        """Load the CLIP whose pictures the IP-Adapter reads: its text half, and what else the pipeline has not.

        Before offloading is switched on, which has to know of everything there is.

        Args:
            name: folder or Hub id of the whole CLIP; the default is that of IP-Adapters for Stable Diffusion 1 and of
                SDXL's ``vit-h`` ones. SDXL's others need none: its text half is the pipeline's second text encoder.
            options: of ``from_pretrained``.
        """
        where = find_model(os.fspath(name))
        weights, options = {**MODEL_ONLY, **options}, {**NO_CODE, **options}
        whole = AutoConfig.from_pretrained(where, **options)
        # Its halves do not always know how wide their common space is.
        text, vision = whole.text_config, whole.vision_config
        text.projection_dim = vision.projection_dim = whole.projection_dim
        tokenizer = CLIPTokenizer.from_pretrained(where, **options)
        place = {"device": self._execution_device, "dtype": self.unet.dtype}
        encoder = CLIPTextModelWithProjection.from_pretrained(where, config=text, **weights).to(**place).eval()
        if self.image_encoder is None or self.feature_extractor is None:
            self.register_modules(feature_extractor=AutoImageProcessor.from_pretrained(where, **options))
        if self.image_encoder is None:
            seeing = CLIPVisionModelWithProjection.from_pretrained(where, config=vision, **weights)
            self.register_modules(image_encoder=seeing.to(**place).eval())
        self.register_modules(guidance_text_encoder=encoder, guidance_tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        source_prompt: str | Sequence[str],
        target_prompt: str | Sequence[str],
        blend_words: BlendWords | Sequence[BlendWords | None] | None = None,
        *,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        source_guidance_scale: float = 1.0,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        edit_type: Literal["replace", "refine", "auto"] = "refine",
        alignment: Literal["aligned", "reference"] = "aligned",
        cross_replace_steps: ReplaceSteps | list[ReplaceSteps] = 0.4,
        self_replace_steps: Window = 0.6,
        image_replace_steps: Window = 0.1,
        word_weights: Mapping[str | int, float] | list[Mapping[str | int, float] | None] | None = None,
        max_queries: int | None = None,
        ip_adapter_scale: float | None = 0.4,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        image_guidance_layout: Layout = "contrastive",
        blend_threshold: float = 0.5,
        variance_threshold: float | None = 0.8,
        grounding_iterations: int = 5,
        grounding_gamma: float = 0.5,
        mask_start: float = 0.2,
        map_size: int | Size | None = None,
        spread_size: int | Size | None = None,
        edit_mask: Any = None,
        edit_mask_mode: Literal["replace", "intersect"] = "replace",
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        variance_noise: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> EditOutput | tuple[Any, ...]:
        """Edit a picture, or several pairs of a picture and a target in one batch.

        Args:
            image: a PIL picture, an array, a tensor or latents; a list or a batch for several pairs. What there is
                one of goes with all.
            source_prompt: describes it.
            target_prompt: describes the wanted result.
            blend_words: a tuple ``(source, target)``, a word or several of each prompt, or a list with one such tuple
                or ``None`` for each pair: outside of where they are seen the picture stays as it is. Without,
                everything may change.
            num_inference_steps: of the schedule.
            timesteps: instead of ``num_inference_steps``, noisiest first.
            source_guidance_scale, guidance_scale: of the source's branch and of the target's; 1 for none.
            negative_prompt: of both.
            edit_type, alignment, self_replace_steps, image_replace_steps: as in
                `diffusion_attn.editing.controls.PromptEdit`.
            cross_replace_steps, word_weights: the same, or a list with one for each pair (two plain numbers are one
                window).
            max_queries: layers of more queries keep their own self-attention and image attention; ``None``: those
                above half the latent's height and width.
            ip_adapter_scale: of a loaded IP-Adapter, 0 for none; ``None``: what the pipeline has it at.
            ip_adapter_image_embeds: one ``(4 * pairs, 1, D)`` for each adapter, unconditional sources, unconditional
                targets, sources, targets; used as they are instead of the estimated ones.
            image_guidance_layout: which rows are told of which picture, as in
                `diffusion_attn.editing.guidance.image_guidance_embeds`.
            blend_threshold: above which part of its range a word's map is where the picture may change.
            variance_threshold: the same for where noise is added; ``None``: masks do not steer noise.
            grounding_iterations, grounding_gamma: how far word maps are spread, as in
                `diffusion_attn.editing.grounding.propagate`.
            mask_start: the share of the steps before which masks are not used.
            map_size: ``(height, width)`` of the maps that words are looked for in; ``None``: a quarter of the latent's.
            spread_size: that of the self-attention that they are spread by; ``None``: the next finer level.
            edit_mask: where the picture may change: a PIL picture, an array or a tensor of its size or the latent's,
                ``(h, w)`` or ``(1 or pairs, 1, h, w)``, bool or 0 to 1 for how much.
            edit_mask_mode: it is taken instead of what the words ground, or cut out of that.
            height, width: in pixels; ``None``: the picture's.
            generator: of the noise, or one for each pair.
            latents: ``(1 or pairs, C, h, w)``, the noise that the picture is drawn out of.
            variance_noise: ``(steps, 1 or pairs, C, h, w)``, the noise of each step.
            prompt_embeds, negative_prompt_embeds: ``(2 * pairs, L, D)``, of sources and targets, instead of what the
                text encoders make of the prompts.
            output_type: of the pictures.
            return_dict: an `EditOutput`, or a tuple of what it holds.
            callback_on_step_end: called with the pipeline, the step, its timestep and ``{"latents": ...}``; what it
                returns under ``"latents"`` is gone on with.
            callback_on_step_end_tensor_inputs: what it is given; there is nothing but ``"latents"``.

        Raises:
            ValueError: an argument is not what it should be, or a word is not in its prompt.
            UnsupportedModelError: the UNet or its IP-Adapter has not what is asked for.
            MethodConflictError: a method in force computes the attention that is to be edited.
            DiffusionAttnError: the words attend to everything alike, so that there is no mask.
        """
        self.check_callback(callback_on_step_end_tensor_inputs)
        _check(blend_threshold, variance_threshold, mask_start, grounding_gamma, grounding_iterations, edit_mask_mode)
        images, sources, targets = paired(image, source_prompt, target_prompt)
        pairs = len(targets)
        self._check_prompts([*sources, *targets])
        tokens = self._blend_tokens(blend_words, sources, targets)
        masked = any(tokens) or edit_mask is not None
        schedule = self._schedule(num_inference_steps, timesteps, masked and variance_threshold is not None)
        self._check_lengths(pairs, generator, latents, variance_noise, len(schedule))
        painted = None if edit_mask is None else painted_mask(edit_mask, pairs)
        edits = [
            PromptEdit(
                source,
                target,
                self.tokenizer,
                len(schedule),
                edit_type=edit_type,
                alignment=alignment,
                cross_replace_steps=window,
                self_replace_steps=self_replace_steps,
                image_replace_steps=image_replace_steps,
                word_weights=weights,
                max_queries=max_queries,
            )
            for source, target, window, weights in zip(
                sources,
                targets,
                each(cross_replace_steps, pairs, "cross_replace_steps"),
                each(word_weights, pairs, "word_weights"),
                strict=True,
            )
        ]
        text = self._text(prompt_embeds, "prompt_embeds", pairs, lambda: encode(self, [*sources, *targets]))
        negative = self._text(
            negative_prompt_embeds,
            "negative_prompt_embeds",
            pairs,
            lambda: Conditioning.join(*[encode_negative(self, negative_prompt)] * 2 * pairs),
        )
        embeds = self._image_embeds(
            images, sources, targets, ip_adapter_scale, ip_adapter_image_embeds, image_guidance_layout
        )
        known = self._latents(images, height, width)
        size = size_of(known)
        levels = [reduced(size, factor) for factor in (8, 4, 2, 1)]
        for edit in edits if max_queries is None else ():
            edit.max_queries = levels[2][0] * levels[2][1]
        area = None
        if any(tokens) and (painted is None or edit_mask_mode == "intersect"):
            words = map_grid(size, map_size)
            finer = [level for level in levels if level[0] > words[0]]
            spread = map_grid(size, spread_size) if spread_size is not None else [*finer, words][0]
            area = EditArea(tokens, words, spread, grounding_gamma, grounding_iterations)
        worded = [bool(source or target) for source, target in zip(tokens[:pairs], tokens[pairs:], strict=True)]
        masks = EditMasks(area, painted, worded, (blend_threshold, variance_threshold), known)
        control = AttentionControl(size, edits, area.recorders if area else [], rows=2 * pairs)
        network = Network(self, size)

        scales = torch.tensor([source_guidance_scale] * pairs + [guidance_scale] * pairs, device=known.device)
        guided = (scales != 1).nonzero().flatten()  # rows that need an unconditional one
        scales = scales[guided, None, None, None]
        whole = Conditioning.join(negative.rows(guided), text)
        added = self.image_conditions(
            None if embeds is None else [torch.cat([x[guided.to(x.device)], x[2 * pairs :]]) for x in embeds]
        )
        noise = self._noise(latents, known, generator)
        x = self.scheduler.add_noise(known, noise, schedule[:1].expand(pairs)).repeat(2, 1, 1, 1)
        progress = self.progress_bar(total=len(schedule))
        with control.on(self.unet), adapter_scale(self.unet, ip_adapter_scale), progress as bar:
            for step, timestep in enumerate(schedule):
                control.step = step
                control.recording = now = masked and step + 1 >= int(mask_start * len(schedule))
                output = network(torch.cat([x[guided], x]), timestep, whole, **added)
                free, predicted = output[: len(guided)], output[len(guided) :]
                predicted = predicted.index_copy(0, guided, free + scales * (predicted[guided] - free))
                if now:
                    masks.update()
                x = self.scheduler.edit_step(
                    predicted,
                    timestep,
                    x,
                    known,
                    variance_mask=masks.variance,
                    generator=generator,
                    variance_noise=None if variance_noise is None else variance_noise[step].to(x.device),
                ).prev_sample
                if masks.blend is not None:
                    source, target = x.chunk(2)
                    x = torch.cat([source, source.lerp(target, masks.blend)])
                if callback_on_step_end is not None:
                    x = callback_on_step_end(self, step, timestep, {"latents": x}).get("latents", x)
                bar.update()
        source, target = x.chunk(2)
        result = EditOutput(
            images=self.decode_latents(target, output_type),
            source=self.decode_latents(source, output_type),
            blend_mask=None if masks.blend is None else masks.blend > 0,
            variance_mask=None if masks.variance is None else masks.variance > 0,
            word_maps=None if area is None else area.maps,
        )
        self.maybe_free_model_hooks()
        return result if return_dict else tuple(result.values())

    def _blend_tokens(self, blend_words: Any, sources: Sequence[str], targets: Sequence[str]) -> list[list[int]]:
        """The tokens of the words of each row, all sources, then all targets."""
        pairs = len(targets)
        if blend_words is None:
            return [[] for _ in range(2 * pairs)]
        plain = isinstance(blend_words, tuple) or any(isinstance(words, (str, int)) for words in blend_words)
        alone = len(blend_words) == 2 and (pairs == 1 or plain)
        words_of = [blend_words] * pairs if alone else blend_words
        if len(words_of) != pairs:
            raise ValueError(
                f"blend_words is {blend_words!r}; give (source, target), or a list with one of that or None for each "
                f"of the {pairs} pairs."
            )
        rows = []
        for source, target, words in zip(sources, targets, words_of, strict=True):
            named = words and [[entry] if isinstance(entry, int) else entry for entry in words]
            found = self.word_tokens([source, target], named, "blend_words") if named else [[], []]
            rows.append([[token for word in row for token in word] for row in found])
        return [row[0] for row in rows] + [row[1] for row in rows]

    def _schedule(self, count: int, timesteps: Sequence[int] | None, noisy: bool) -> torch.Tensor:
        """The timesteps of a run, set; its last step ends at the picture, whatever the configuration says."""
        scheduler = self.scheduler
        if not hasattr(scheduler, "edit_step"):
            raise ValueError(
                f"scheduler is a {type(scheduler).__name__}, which cannot edit; set the pipeline's to an "
                "EditDDIMScheduler or EditDPMSolverMultistepScheduler of diffusion_attn.editing.schedulers."
            )
        ends = {"set_alpha_to_one": True, "final_sigmas_type": "zero"}
        changes = {name: value for name, value in ends.items() if scheduler.config.get(name, value) != value}
        if changes:
            scheduler = type(scheduler).from_config(scheduler.config, **changes)
            self.register_modules(scheduler=scheduler)
        if noisy and scheduler.config.get("solver_order", 1) > 2:
            raise ValueError(
                f"solver_order of the scheduler is {scheduler.config.solver_order}, which adds no noise where masks "
                "say so; take 1 or 2, or variance_threshold=None."
            )
        if timesteps is not None:
            scheduler.set_timesteps(timesteps=[int(timestep) for timestep in timesteps], device=self._execution_device)
        elif count < 1:
            raise ValueError(f"num_inference_steps is {count}; give 1 or more.")
        else:
            scheduler.set_timesteps(count, device=self._execution_device)
        return scheduler.timesteps

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        limit = self.tokenizer.model_max_length
        for prompt in prompts:
            count = len(self.tokenizer(prompt, truncation=False).input_ids)
            if count > limit:
                raise ValueError(f"the prompt {prompt!r} has {count} tokens, and the model reads {limit}; shorten it.")

    def _check_lengths(
        self, pairs: int, generator: Any, latents: torch.Tensor | None, variance_noise: torch.Tensor | None, steps: int
    ) -> None:
        if isinstance(generator, list) and len(generator) != pairs:
            raise ValueError(f"generator has {len(generator)} entries for {pairs} pairs; give one for each, or one.")
        if latents is not None and (latents.ndim != 4 or len(latents) not in (1, pairs)):
            raise ValueError(
                f"latents have the shape {tuple(latents.shape)}; give the noise (1, C, h, w), or one for each of the "
                f"{pairs} pairs."
            )
        if variance_noise is not None and (variance_noise.ndim != 5 or len(variance_noise) != steps):
            raise ValueError(
                f"variance_noise has the shape {tuple(variance_noise.shape)}; give ({steps}, 1 or {pairs}, C, h, w)."
            )

    def _image_embeds(
        self,
        images: Sequence[Any],
        sources: Sequence[str],
        targets: Sequence[str],
        scale: float | None,
        embeds: list[torch.Tensor] | None,
        layout: Layout,
    ) -> list[torch.Tensor] | None:
        """``(4 * pairs, 1, D)`` for each adapter, or ``None`` where there is none."""
        rows = 4 * len(targets)
        if embeds is not None:
            if any(len(x) != rows for x in embeds):
                raise ValueError(
                    f"ip_adapter_image_embeds have {[len(x) for x in embeds]} rows; give {rows} for each adapter: "
                    "unconditional sources, unconditional targets, sources, targets."
                )
            return embeds
        return adapter_embeds(self, images, sources, targets, scale, layout)

    def _text(
        self, embeds: torch.Tensor | None, name: str, pairs: int, encoded: Callable[[], Conditioning]
    ) -> Conditioning:
        """Of all rows: what is given, or what is encoded."""
        if embeds is None:
            return encoded()
        if len(embeds) != 2 * pairs:
            raise ValueError(f"{name} have {len(embeds)} rows; give {2 * pairs}, all sources, then all targets.")
        embeds = embeds.to(self._execution_device)
        return replace(encoded(), embeds=embeds) if is_xl(self) else Conditioning(embeds)

    def _latents(self, images: Sequence[Any], height: int | None, width: int | None) -> torch.Tensor:
        """``(pairs, C, h, w)``; what goes with all pairs is encoded once."""
        self.latent_size(height, width)  # refuses what a picture would be cut down from
        encoded = {id(image): self.encode_image(image, height, width) for image in images}
        rows = [encoded[id(image)].reshape(-1, *encoded[id(image)].shape[-3:]) for image in images]
        shapes = {tuple(row.shape) for row in rows}
        if len(shapes) > 1 or len(rows[0]) != 1:
            raise ValueError(
                f"image has latents of the shapes {sorted(shapes)}; give height and width to bring pictures to one "
                "size, and one picture for each pair."
            )
        return torch.cat(rows)

    def _noise(self, latents: torch.Tensor | None, known: torch.Tensor, generator: Any) -> torch.Tensor:
        if latents is None:
            return randn_tensor(known.shape, generator, known.device, known.dtype)
        if latents.shape[1:] != known.shape[1:]:
            raise ValueError(
                f"latents have the shape {tuple(latents.shape)}; give noise of the picture's, {(1, *known.shape[1:])}."
            )
        return latents.to(known).expand_as(known)


def _check(blend: float, variance: float | None, start: float, gamma: float, iterations: int, mode: str) -> None:
    for name, threshold in {"blend_threshold": blend, "variance_threshold": variance}.items():
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"{name} is {threshold}; give a part of a map's range, 0 to below 1.")
    for name, share in {"mask_start": start, "grounding_gamma": gamma}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; give 0 to 1.")
    if iterations < 0:
        raise ValueError(f"grounding_iterations is {iterations}; give 0 or more.")
    if mode not in ("replace", "intersect"):
        raise ValueError(f"edit_mask_mode is {mode!r}; give 'replace' or 'intersect'.")
