"""What one step of answer classification computes: the answer out of a list, told from the Q-Former's output alone.

Visual question answering as classification, the common form before LLMs answered, used here as preparation: a Q-Former
that reads the question learns to look for its answer at a fifth of the cost of hearing about it through an LLM. The
classifier is thrown away; instruction tuning goes on from the Q-Former.

    image features, question -> Q-Former -> mean over the queries (B, D) -> linear -> answers (B, A)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2.model.stage1 import Text
from blip2.model.stage2 import Blip2Stage2

NOT_LISTED = -100


@dataclass(frozen=True)
class ClassifyBatch:
    """B images with a question or instruction each, and the answer's number.

    Attributes:
        image_features: (B, N, Dv).
        instruction: in the Q-Former's tokens.
        answer: (B,) number in the list of answers; NOT_LISTED where the answer is none of them.
    """

    image_features: Tensor
    instruction: Text
    answer: Tensor


class ClassifyStep(nn.Module):
    """The module whose forward is one step.

    Args:
        model: the model being trained, instruction-aware; its language half is not used.
        num_answers: A, length of the list of answers.
        label_smoothing: of the cross-entropy.
    """

    def __init__(self, model: Blip2Stage2, num_answers: int, *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(model.config.hidden_size, num_answers)
        self.label_smoothing = label_smoothing

    def logits(self, image_features: Tensor, instruction: Text) -> Tensor:
        """Logits (B, A) over the list of answers."""
        return self.classifier(self.model.query_output(image_features, instruction).mean(dim=1))

    def forward(self, batch: ClassifyBatch) -> dict[str, Tensor]:
        """The `loss`, mean cross-entropy over the listed answers, and how often the likeliest answer is right."""
        logits = self.logits(batch.image_features, batch.instruction).float()
        is_listed = batch.answer != NOT_LISTED
        total = F.cross_entropy(
            logits, batch.answer, ignore_index=NOT_LISTED, label_smoothing=self.label_smoothing, reduction="sum"
        )
        num_listed = is_listed.sum().clamp(min=1)  # a batch without any has loss 0, not 0 / 0
        right = ((logits.detach().argmax(dim=1) == batch.answer) & is_listed).sum() / num_listed
        return {"loss": total / num_listed, "accuracy": right}


def list_answers(counted: dict[str, int], most: int) -> list[str]:
    """The `most` most frequent answers, those of equal count by alphabet: the same list run after run."""
    return sorted(counted, key=lambda answer: (-counted[answer], answer))[:most]


@torch.no_grad()
def likeliest(step: ClassifyStep, image_features: Tensor, instruction: Text) -> list[int]:
    """Numbers of the likeliest answers to B questions."""
    return step.logits(image_features, instruction).argmax(dim=1).tolist()
