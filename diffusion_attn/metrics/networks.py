"""Numbers that a network of the user's choice makes of pictures: CLIP score and Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffusion_attn.core.errors import DiffusionAttnError
from diffusion_attn.core.loading import MODEL_ONLY, NO_CODE, find_model
from diffusion_attn.metrics.images import Pictures, as_tensor

_BATCH = 32


class ClipScorer:
    """CLIP score: 100 times the cosine between a picture's and its prompt's embedding, 0 at least.

    (Hessel et al. 2021, arXiv 2104.08718, without its factor of 2.5, as torchmetrics has it; torchmetrics' own takes
    Hub names of a few models only.)

    Args:
        name: folder or Hub id of a ``CLIPModel`` with its processor.
        device: where it computes.

    Raises:
        DiffusionAttnError: it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.model: Any = load(CLIPModel, name, "CLIP model", **MODEL_ONLY).to(device).eval()
        self.processor = load(AutoImageProcessor, name, "CLIP model")
        self.tokenizer = load(AutoTokenizer, name, "CLIP model")

    @torch.no_grad()
    def __call__(self, images: Pictures, prompts: Sequence[str]) -> list[float]:
        """The score of each picture with its prompt.

        Raises:
            ValueError: there are not as many of both.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images against {len(prompts)} prompts: expected as many of both.")
        scores: list[float] = []
        for start in range(0, len(images), _BATCH):
            pictures = self.processor(list(images[start : start + _BATCH]), return_tensors="pt")
            words = self.tokenizer(
                list(prompts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            seen = self.model.get_image_features(pictures["pixel_values"].to(self.model.device)).pooler_output
            said = self.model.get_text_features(**words.to(self.model.device)).pooler_output
            cosines = torch.cosine_similarity(seen, said, dim=-1)
            scores += (100 * cosines).clamp(min=0).tolist()
        return scores


class FrechetScorer:
    """Fréchet distance between the features of two sets of pictures (Heusel et al. 2017, arXiv 1706.08500).

    FID when the network is the Inception that it was defined with; with another one numbers are comparable with each
    other only.

    Args:
        name: folder or Hub id of a vision model of transformers, such as DINOv2 or CLIP, with its image processor.
        device: where it computes.

    Raises:
        DiffusionAttnError: it cannot be loaded, or has no pooled features.
        ImportError: torchmetrics is not installed.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from transformers import AutoImageProcessor, AutoModel

        processor = load(AutoImageProcessor, name, "vision model")
        model: Any = load(AutoModel, name, "vision model", **MODEL_ONLY).to(device).eval()
        features = _Features(model, processor)
        try:
            features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        except Exception as error:  # whatever a model of another kind makes of a picture
            raise DiffusionAttnError(
                f"{name!r} is a {type(model).__name__} that gives no pooled features of a picture ({error}); give a "
                "vision model such as DINOv2 or CLIP."
            ) from error
        self.metric = FrechetInceptionDistance(feature=features).to(device)

    def __call__(self, images: Pictures, references: Pictures) -> float:
        """The distance of ``images`` from ``references``, 0 where their features are alike.

        Raises:
            ValueError: there are not two of each at least.
        """
        if min(len(images), len(references)) < 2:
            raise ValueError(f"{len(images)} images and {len(references)} references: expected two or more of each.")
        self.metric.reset()
        for pictures, real in ((references, True), (images, False)):
            for start in range(0, len(pictures), _BATCH):
                self.metric.update(as_tensor(pictures[start : start + _BATCH]).to(self.metric.device), real=real)
        return float(self.metric.compute())


class _Features(nn.Module):
    """uint8 pictures to the pooled features of a vision model, as torchmetrics asks for them."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        config = model.config
        vision = getattr(config, "vision_config", config)
        self.num_features: int = getattr(config, "projection_dim", None) or vision.hidden_size

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = self.processor(list(pictures.cpu()), return_tensors="pt")["pixel_values"].to(self.model.device)
        see = getattr(self.model, "get_image_features", self.model)
        features = see(pixel_values=pixels).pooler_output
        if features is None:
            raise ValueError("there is no pooler")
        return features


def load(kind: Any, name: str, what: str, **options: Any) -> Any:
    """``kind.from_pretrained`` of a folder or a Hub id, which is ``what``, and of none of the code that lies there.

    Raises:
        DiffusionAttnError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(find_model(name), **{**NO_CODE, **options})
    except Exception as error:  # loaders raise whatever the broken file or the connection made them raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise DiffusionAttnError(
            f"{name!r} could not be loaded as a {what} ({reason}); give a folder or a Hub id of one."
        ) from error
