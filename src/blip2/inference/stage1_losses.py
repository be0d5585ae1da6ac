"""The three losses of stage 1 on a batch of pairs (paper, section 3.1): the model and the objectives, joined.

One image pass serves ITC and ITG, and image features are projected to cross-attention keys and values once: the
positives and both kinds of negatives of ITM index them. Training adds weights to this, and use may ask for it.

On R ranks each holds B of the world's W = R * B pairs. ITC compares with the features of all; ITM's negatives come from
all, and only the images drawn travel; every mean is one over the world. So R ranks of B pairs compute, averaged, what
one process computes of the W pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.distributed import fetch_rows, gather, gather_padded, gather_with_gradient, rank, share_of, world_size
from blip2.model.qformer import ImageKeyValues, KeyValue, join_images, select_images
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.objectives.itc import Similarities, image_text_similarity, itc_loss, same_group, similarities
from blip2.objectives.itg import caption_inputs, itg_loss
from blip2.objectives.itm import IGNORED, MATCH, NO_MATCH, itm_loss
from blip2.objectives.negatives import NegativeRule, draw_negatives


@dataclass(frozen=True)
class Stage1Batch:
    """B image-text pairs.

    Attributes:
        image_features: (B, N, Dv).
        text: the captions, [CLS] first, [SEP] last.
        groups: (B,) equal for pairs that are no negatives of each other (one image, or an equal caption).
        told: what ITG tells of the images; None for the captions.
        chance: (B, 2) uniform in [0, 1): which negative image and which negative text each pair draws; None: drawn now.
    """

    image_features: Tensor
    text: Text
    groups: Tensor
    told: Text | None = None
    chance: Tensor | None = None


@dataclass(frozen=True)
class Stage1Losses:
    """What a batch gives; scalars but for the features.

    Attributes:
        itc: image-text contrast.
        itm: image-text matching; None where it was not wanted.
        itg: image-grounded text generation; None where it was not wanted.
        itc_accuracy: how often the most similar text of an image is one of its own.
        itm_accuracy: how often a pair is rightly matched or not; None without ITM.
        image_embeds: (B, Q, E).
        text_embeds: (B, E).
    """

    itc: Tensor
    itm: Tensor | None
    itg: Tensor | None
    itc_accuracy: Tensor
    itm_accuracy: Tensor | None
    image_embeds: Tensor
    text_embeds: Tensor


def stage1_losses(
    model: Blip2Stage1,
    batch: Stage1Batch,
    *,
    bos_id: int,
    negatives: NegativeRule = "paper",
    label_smoothing: float = 0.1,
    matched_share: float = 1.0,
    with_itm: bool = True,
    with_itg: bool = True,
    itc_chunk: int = 0,
) -> Stage1Losses:
    """The losses of this rank's batch.

    Args:
        model: of stage 1.
        batch: B pairs.
        bos_id: [DEC], the token that starts a caption to be generated.
        negatives: how hard negatives of ITM are drawn.
        label_smoothing: of ITC and ITG.
        matched_share: share of the pairs that ITM matches, at least one; the first ones of each rank.
        with_itm, with_itg: what is not wanted is not computed.
        itc_chunk: images or texts of the world that ITC compares with at once; 0: all. Saves memory, not time.
    """
    images = model.image_pass(batch.image_features)
    image_embeds = model.project_queries(images.output)  # (B, Q, E)
    text_embeds = model.embed_texts(batch.text)  # (B, E)
    is_positive = same_group(batch.groups, gather(batch.groups))  # (B, W)
    similarity = similarities(
        image_embeds,
        text_embeds,
        gather_with_gradient(image_embeds),
        gather_with_gradient(text_embeds),
        model.temperature,
        chunk=itc_chunk,
    )
    itm = itm_accuracy = itg = None
    if with_itm:
        matched = max(1, round(is_positive.shape[0] * matched_share))
        drawn = _draw(similarity, is_positive, batch.chance, matched, negatives)
        itm, itm_accuracy = _match(model, batch, images.image, drawn)
    if with_itg:
        itg = _caption(model, batch.told or batch.text, images.past, bos_id, label_smoothing)
    return Stage1Losses(
        itc=itc_loss(similarity, is_positive, label_smoothing=label_smoothing),
        itm=itm,
        itg=itg,
        itc_accuracy=_share_found(image_embeds, text_embeds, is_positive),
        itm_accuracy=itm_accuracy,
        image_embeds=image_embeds,
        text_embeds=text_embeds,
    )


@dataclass(frozen=True)
class _Negatives:
    """The world's numbers of the image and the text drawn for each of the first M pairs; -1 for none. Both (M,)."""

    image: Tensor
    text: Tensor


def _draw(
    similarity: Similarities, is_positive: Tensor, chance: Tensor | None, matched: int, rule: NegativeRule
) -> _Negatives:
    if chance is None:
        chance = torch.rand(len(is_positive), 2, device=is_positive.device)
    is_positive = is_positive[:matched]
    return _Negatives(
        image=draw_negatives(similarity.text_to_image[:matched], is_positive, rule, chance[:matched, 0]),
        text=draw_negatives(similarity.image_to_text[:matched], is_positive, rule, chance[:matched, 1]),
    )


def _match(model: Blip2Stage1, batch: Stage1Batch, image: ImageKeyValues, drawn: _Negatives) -> tuple[Tensor, Tensor]:
    """ITM over 3M pairs: (image, text), (negative image, text), (image, negative text), for the first M pairs."""
    own = torch.arange(len(drawn.image), device=drawn.image.device)  # (M,)
    labels = torch.cat([torch.full_like(own, MATCH), _label(drawn.image), _label(drawn.text)])  # (3M,)
    images = _beside_negatives(model, batch.image_features, image, own, drawn.image.clamp(min=0))
    texts = Text(gather_padded(batch.text.input_ids, 0), gather_padded(batch.text.attention_mask, 0))  # (W, T)
    own_text = own + rank() * len(batch.groups)
    logits = model.match_logits(images, texts[torch.cat([own_text, own_text, drawn.text.clamp(min=0)])])  # (3M, 2)
    counted = labels != IGNORED
    right = ((logits.argmax(dim=1) == labels) & counted).sum() / counted.sum()
    return itm_loss(logits, labels, share_of(counted.sum())), right


def _beside_negatives(
    model: Blip2Stage1, image_features: Tensor, image: ImageKeyValues, own: Tensor, negative: Tensor
) -> ImageKeyValues:
    """Keys and values of 3M images: own, negative, own. What lies on this process is projected already."""
    if world_size() == 1:
        return select_images(image, torch.cat([own, negative, own]))
    fetched = model.project_image(fetch_rows(image_features, negative))  # M images
    both = join_images(image, fetched)
    return select_images(both, torch.cat([own, len(image_features) + own, own]))


def _caption(model: Blip2Stage1, text: Text, past: list[KeyValue], bos_id: int, label_smoothing: float) -> Tensor:
    hidden = model.caption_hidden(Text(caption_inputs(text.input_ids, bos_id), text.attention_mask), past)  # (B, T, D)
    is_target = text.attention_mask[:, 1:].bool()  # (B, T-1): each token but the first is predicted
    logits = model.vocabulary_logits(hidden[:, :-1][is_target])  # (M, V)
    targets = text.input_ids[:, 1:][is_target]  # (M,)
    return itg_loss(logits, targets, share_of(is_target.sum()), label_smoothing=label_smoothing)


def _label(negative: Tensor) -> Tensor:
    """NO_MATCH where a negative was found, IGNORED where the row has none."""
    return torch.where(negative >= 0, NO_MATCH, IGNORED)


def _share_found(image_embeds: Tensor, text_embeds: Tensor, is_positive: Tensor) -> Tensor:
    """How often the most similar text of an image is one of its own."""
    best = image_text_similarity(image_embeds.detach(), text_embeds.detach()).argmax(dim=1)
    return is_positive.gather(1, best[:, None]).float().mean()
