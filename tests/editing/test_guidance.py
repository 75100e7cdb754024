"""Embeddings of an image that does not exist yet: the official code's numbers and the arithmetic."""

import pytest
import torch

from diffusion_attn.editing.guidance import image_guidance_embeds
from tests.editing.golden import VIMAEDIT
from tests.golden.seeded import seeded_tensor


def embeds(*names, width=8):
    return [seeded_tensor(name, (1, width)) for name in names]


@VIMAEDIT.named("embeds")
def test_the_vimaedit_cases(name):
    params, prefix = VIMAEDIT.cases[name]["parameters"], name.removeprefix("embeds_")
    dtype, width = getattr(torch, params["dtype"]), params["dim"]
    image = 0.7 * seeded_tensor(f"{prefix}.image_embed", (1, width))
    texts = 1.9 * seeded_tensor(f"{prefix}.text_embeds", (2, width))
    stacked = image_guidance_embeds(*(x.to(dtype) for x in (image, texts[:1], texts[1:])))
    assert stacked.dtype == dtype
    VIMAEDIT.close(stacked, name, "stacked")
    VIMAEDIT.close(stacked[:2], name, "source_pair")
    VIMAEDIT.close(stacked[2:], name, "target_pair")


def test_layouts_hold_the_same_rows():
    image, source, target = embeds("image", "source", "target")
    contrastive, per_branch = (
        image_guidance_embeds(image, source, target, layout) for layout in ("contrastive", "per_branch")
    )
    assert contrastive.shape == per_branch.shape == (4, 1, 8)
    assert torch.equal(per_branch, contrastive[[0, 2, 1, 3]])
    assert torch.equal(contrastive[1], image) and not contrastive[[0, 2]].any()


def test_the_length_of_text_embeddings_does_not_count():
    image, source, target = embeds("image", "source", "target")
    scaled = image_guidance_embeds(image, 5 * source, 0.1 * target)
    torch.testing.assert_close(scaled, image_guidance_embeds(image, source, target))
    # The edit moves by a difference of two vectors as long as the image's.
    moved = scaled[3] - image
    cosine = torch.cosine_similarity(source, target)
    torch.testing.assert_close(moved.norm(), image.norm() * (2 - 2 * cosine).sqrt().squeeze())
    assert torch.equal(image_guidance_embeds(image, source, source)[3], image)


def test_an_empty_text_embedding_moves_nothing_to_infinity():
    image, target = embeds("image", "target")
    assert image_guidance_embeds(image, torch.zeros(1, 8), target).isfinite().all()


def test_gradients_reach_all_three():
    assert torch.autograd.gradcheck(
        image_guidance_embeds, [x.double().requires_grad_() for x in embeds("image", "source", "target")]
    )


@pytest.mark.parametrize("shapes", [[(1, 8), (1, 8), (1, 4)], [(8,), (8,), (8,)], [(2, 8), (2, 8), (2, 8)]])
def test_three_embeddings_of_one_width(shapes):
    with pytest.raises(ValueError, match=r"image_embeds, source_text_embeds, target_text_embeds.*\(1, D\)"):
        image_guidance_embeds(*map(torch.zeros, shapes))


def test_layouts_have_names():
    with pytest.raises(ValueError, match="layout='stacked'"):
        image_guidance_embeds(*embeds("image", "source", "target"), layout="stacked")
