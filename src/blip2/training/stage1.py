"""What one step of stage 1 computes: ITC, ITM and ITG at once (paper, section 3.1), with the weights of a run.

The losses themselves are joined in inference/stage1_losses.py, so that a loaded model can be asked for them too.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from blip2.inference.stage1_losses import Stage1Batch, stage1_losses
from blip2.model.stage1 import Blip2Stage1
from blip2.objectives.itc import sentence_losses
from blip2.objectives.negatives import NegativeRule
from blip2.training.seeing import seen


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
        itc_chunk: images or texts that ITC compares with at once; 0 for all.
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
        itc_chunk: int = 0,
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
        self.itc_chunk = itc_chunk

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
        itc_weight, itm_weight, itg_weight = self.weights
        batch = seen(self.model, batch)
        found = stage1_losses(
            self.model,
            batch,
            bos_id=self.bos_id,
            negatives=self.negatives,
            label_smoothing=self.label_smoothing,
            matched_share=self.matched_share,
            with_itm=itm_weight > 0,
            with_itg=itg_weight > 0,
            itc_chunk=self.itc_chunk,
        )
        losses, right = {"itc": found.itc}, {"itc_accuracy": found.itc_accuracy}
        loss = itc_weight * found.itc
        if self.sentence_model is not None:
            with torch.no_grad():
                sentence_embeds = self.sentence_model.embed_texts(batch.text)  # (B, E)
            image_side, text_side = sentence_losses(found.image_embeds, found.text_embeds, sentence_embeds)
            losses |= {"sentence_image": image_side, "sentence_text": text_side}
            loss = loss + self.sentence_weights[0] * image_side + self.sentence_weights[1] * text_side
        if found.itm is not None and found.itm_accuracy is not None:
            losses["itm"], right["itm_accuracy"] = found.itm, found.itm_accuracy
            loss = loss + itm_weight * found.itm
        if found.itg is not None:
            losses["itg"] = found.itg
            loss = loss + itg_weight * found.itg
        told = {name: value.detach() for name, value in losses.items()}
        return {"loss": loss, **told, **right, "temperature": self.model.temperature.detach().clone()}
