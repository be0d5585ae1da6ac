"""Image-text contrast (paper, section 3.1): find the text of an image, and the image of a text, in the batch.

Shapes: B pairs of this rank, W pairs of the world (W = B on one process), Q queries, E embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Similarities:
    """Temperature-scaled similarities of this rank's pairs with the world's: both (B, W)."""

    image_to_text: Tensor
    text_to_image: Tensor


def image_text_similarity(image_embeds: Tensor, text_embeds: Tensor, *, chunk: int = 0) -> Tensor:
    """Cosine similarity of each image with each text: that of the image's best query.

    Args:
        image_embeds: (B, Q, E), unit length along E.
        text_embeds: (C, E), unit length along E.
        chunk: images or texts at once, along the longer side, computed again in the backward pass: what is kept is
            (B, C) and not (B, C, Q). 0: all at once.

    Returns:
        (B, C), in [-1, 1].
    """
    if not chunk or max(len(image_embeds), len(text_embeds)) <= chunk:
        return _best_query(image_embeds, text_embeds)
    if len(text_embeds) >= len(image_embeds):
        return torch.cat([_again(image_embeds, part) for part in text_embeds.split(chunk)], dim=1)
    return torch.cat([_again(part, text_embeds) for part in image_embeds.split(chunk)])


def _best_query(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    return torch.einsum("bqe,ce->bcq", image_embeds, text_embeds).amax(dim=-1)


def _again(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    return checkpoint(_best_query, image_embeds, text_embeds, use_reentrant=False)


def similarities(
    image_embeds: Tensor,
    text_embeds: Tensor,
    all_image_embeds: Tensor,
    all_text_embeds: Tensor,
    temperature: Tensor,
    *,
    chunk: int = 0,
) -> Similarities:
    """Similarities divided by the temperature.

    Args:
        image_embeds, text_embeds: (B, Q, E) and (B, E) of this rank.
        all_image_embeds, all_text_embeds: (W, Q, E) and (W, E) of the world.
        temperature: scalar.
        chunk: of the world's images or texts at once, as in `image_text_similarity`.
    """
    return Similarities(
        image_to_text=image_text_similarity(image_embeds, all_text_embeds, chunk=chunk) / temperature,
        text_to_image=image_text_similarity(all_image_embeds, text_embeds, chunk=chunk).T / temperature,
    )


def itc_loss(similarity: Similarities, is_positive: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    """Mean of the two cross-entropies against targets spread evenly over the positives, smoothed over the world.

    Args:
        similarity: from `similarities`.
        is_positive: (B, W) bool; own pair, and pairs with an equal caption or the same image.
        label_smoothing: share of the target spread over all W (LAVIS: 0.1, with or without image ids).
    """
    positives = is_positive.float()
    uniform = 1.0 / is_positive.shape[1]
    targets = (1 - label_smoothing) * positives / positives.sum(dim=1, keepdim=True) + label_smoothing * uniform
    image_side = F.cross_entropy(similarity.image_to_text, targets)
    text_side = F.cross_entropy(similarity.text_to_image, targets)
    return (image_side + text_side) / 2


def sentence_losses(image_embeds: Tensor, text_embeds: Tensor, sentence_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """How far ITC features of images, and of texts, are from a frozen sentence encoder's: mean 1 - cosine, in [0, 2].

    Not in the paper. With few concepts, contrast alone bends the text features until texts never seen lie anywhere.

    Args:
        image_embeds: (B, Q, E), unit length along E; the best query counts, as in contrast.
        text_embeds: (B, E), unit length.
        sentence_embeds: (B, E), unit length, of the same captions.
    """
    image_side = torch.einsum("bqe,be->bq", image_embeds, sentence_embeds).amax(dim=-1)  # (B,)
    text_side = (text_embeds * sentence_embeds).sum(dim=-1)  # (B,)
    return (1 - image_side).mean(), (1 - text_side).mean()


def same_group(groups: Tensor, all_groups: Tensor) -> Tensor:
    """Which pairs share a group (an image, or an equal caption): (B,), (W,) -> (B, W) bool."""
    return groups[:, None] == all_groups[None, :]
