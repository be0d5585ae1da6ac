"""What one step of stage 1 computes: ITC, ITM and ITG at once (paper, section 3.1).

One image pass serves ITC and ITG, and image features are projected to cross-attention keys and values once a step: the
positives and both kinds of negatives of ITM index them.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from blip2.model.qformer import ImageKeyValues, KeyValue, select_images
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.objectives.itc import (
    Similarities,
    image_text_similarity,
    itc_loss,
    same_group,
    sentence_losses,
    similarities,
)
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
    """

    image_features: Tensor
    text: Text
    groups: Tensor
    told: Text | None = None


@dataclass(frozen=True)
class Sentences:
    """A frozen model whose text features those of ITC stay near.

    Attributes:
        model: the frozen model.
        image_weight, text_weight: of 1 - cosine for the images' best queries and for the texts.
    """

    model: Blip2Stage1
    image_weight: float
    text_weight: float


class Stage1Step(nn.Module):
    """The module whose forward is one step; what data parallelism and compilers wrap.

    Args:
        model: the model being trained.
        bos_id: [DEC], the token that starts a caption to be generated.
        negatives: how hard negatives are drawn.
        label_smoothing: of ITC and ITG.
        weights: of ITC, ITM and ITG in the sum.
        matched_share: share of the pairs that ITM matches, at least one.
        sentences: what the features of ITC stay near; None: they are free.
        min_temperature: the temperature is brought back to this where it has sunk below.
    """

    def __init__(
        self,
        model: Blip2Stage1,
        *,
        bos_id: int,
        negatives: NegativeRule = "paper",
        label_smoothing: float = 0.1,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        matched_share: float = 1.0,
        sentences: Sentences | None = None,
        min_temperature: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.bos_id = bos_id
        self.negatives: NegativeRule = negatives
        self.label_smoothing = label_smoothing
        self.weights = weights
        self.matched_share = matched_share
        self.sentence_model = sentences.model if sentences else None
        self.sentence_weights = (sentences.image_weight, sentences.text_weight) if sentences else (0.0, 0.0)
        self.min_temperature = min_temperature

    def train(self, mode: bool = True) -> Self:
        """Wakes dropout, but not in the sentence encoder, which is a yardstick."""
        super().train(mode)
        if self.sentence_model is not None:
            self.sentence_model.eval()
        return self

    def forward(self, batch: Stage1Batch) -> dict[str, Tensor]:
        """Losses `itc`, `itm`, `itg`, their weighted sum `loss`, and how often ITC and ITM were right, all scalars.

        What has weight 0 is not computed.
        """
        if self.training and self.min_temperature:
            with torch.no_grad():
                self.model.temperature.clamp_(min=self.min_temperature)
        images = self.model.image_pass(batch.image_features)
        image_embeds = self.model.project_queries(images.output)  # (B, Q, E)
        text_embeds = self.model.embed_texts(batch.text)  # (B, E)
        is_positive = same_group(batch.groups, batch.groups)  # (B, B)
        similarity = similarities(image_embeds, text_embeds, image_embeds, text_embeds, self.model.temperature)
        itc_weight, itm_weight, itg_weight = self.weights
        losses = {"itc": itc_loss(similarity, is_positive, label_smoothing=self.label_smoothing)}
        loss = itc_weight * losses["itc"]
        found = {"itc_accuracy": _share_found(image_embeds, text_embeds, is_positive)}
        if self.sentence_model is not None:
            with torch.no_grad():
                sentence_embeds = self.sentence_model.embed_texts(batch.text)  # (B, E)
            image_side, text_side = sentence_losses(image_embeds, text_embeds, sentence_embeds)
            losses |= {"sentence_image": image_side, "sentence_text": text_side}
            loss = loss + self.sentence_weights[0] * image_side + self.sentence_weights[1] * text_side
        if itm_weight:
            losses["itm"], found["itm_accuracy"] = self._match(images.image, batch.text, similarity, is_positive)
            loss = loss + itm_weight * losses["itm"]
        if itg_weight:
            losses["itg"] = self._caption(batch.told or batch.text, images.past)
            loss = loss + itg_weight * losses["itg"]
        told = {name: value.detach() for name, value in losses.items()}
        return {"loss": loss, **told, **found, "temperature": self.model.temperature.detach().clone()}

    def _match(
        self, image: ImageKeyValues, text: Text, similarity: Similarities, is_positive: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ITM over 3M pairs: (image, text), (negative image, text), (image, negative text); M = B but for the share."""
        matched = max(1, round(is_positive.shape[0] * self.matched_share))
        own = torch.arange(matched, device=is_positive.device)  # (M,)
        negative_image = draw_negatives(similarity.text_to_image[own], is_positive[own], self.negatives)  # (M,)
        negative_text = draw_negatives(similarity.image_to_text[own], is_positive[own], self.negatives)  # (M,)
        image_rows = torch.cat([own, negative_image.clamp(min=0), own])
        text_rows = torch.cat([own, own, negative_text.clamp(min=0)])
        labels = torch.cat([torch.full_like(own, MATCH), _label(negative_image), _label(negative_text)])  # (3M,)
        logits = self.model.match_logits(select_images(image, image_rows), text[text_rows])  # (3M, 2)
        counted = labels != IGNORED
        right = ((logits.argmax(dim=1) == labels) & counted).sum() / counted.sum()
        return itm_loss(logits, labels), right

    def _caption(self, text: Text, past: list[KeyValue]) -> Tensor:
        hidden = self.model.caption_hidden(caption_inputs(text.input_ids, self.bos_id), past)  # (B, T, D)
        is_target = text.attention_mask[:, 1:].bool()  # (B, T-1): each token but the first is predicted
        logits = self.model.vocabulary_logits(hidden[:, :-1][is_target])  # (M, V)
        return itg_loss(logits, text.input_ids[:, 1:][is_target], label_smoothing=self.label_smoothing)


def _label(negative: Tensor) -> Tensor:
    """NO_MATCH where a negative was found, IGNORED where the row has none."""
    return torch.where(negative >= 0, NO_MATCH, IGNORED)


def _share_found(image_embeds: Tensor, text_embeds: Tensor, is_positive: Tensor) -> Tensor:
    """How often the most similar text of an image is one of its own."""
    best = image_text_similarity(image_embeds.detach(), text_embeds.detach()).argmax(dim=1)
    return is_positive.gather(1, best[:, None]).float().mean()
