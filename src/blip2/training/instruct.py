"""What one step of instruction tuning computes where answers are classified too, besides those of the frozen LLM.

Visual question answering as classification, the common form before LLMs answered, tells the Q-Former whether it looked
in the right place at a quarter of what the way through an LLM costs on a CPU. So a step may bring more samples than the
LLM hears; the classifier is thrown away afterwards (not in the paper, nor in InstructBLIP).

    some image features, questions -> Q-Former -> visual prompt -> LLM -> loss on the answer's tokens
    more image features, questions -> Q-Former -> all queries' outputs (B, Q * D) -> linear -> a list of answers
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from blip2.distributed import share_of
from blip2.model.stage1 import Text
from blip2.model.stage2 import Blip2Stage2
from blip2.training.seeing import seen
from blip2.training.stage2 import Stage2Batch, Stage2Step

NOT_LISTED = -100


@dataclass(frozen=True)
class AnswerBatch:
    """B images with a question or instruction each, and the answer's number.

    Attributes:
        image_features: (B, N, Dv).
        instruction: in the Q-Former's tokens.
        answer: (B,) number in the list of answers; NOT_LISTED where the answer is none of them.
    """

    image_features: Tensor
    instruction: Text
    answer: Tensor


@dataclass(frozen=True)
class InstructBatch:
    """What the LLM answers, and what is classified beside it."""

    spoken: Stage2Batch
    listed: AnswerBatch


class InstructStep(nn.Module):
    """The module whose forward is one step.

    Args:
        model: the model being trained, instruction-aware, with its LLM.
        num_answers: A, length of the list of answers.
        answer_weight: of the classification in the sum.
        label_smoothing: of the classification.
    """

    def __init__(
        self, model: Blip2Stage2, num_answers: int, *, answer_weight: float = 1.0, label_smoothing: float = 0.1
    ) -> None:
        super().__init__()
        self.model = model
        # Of all queries side by side: a classifier of their mean makes all alike, and the LLM then reads one vector.
        self.classifier = nn.Linear(model.config.num_query_tokens * model.config.hidden_size, num_answers)
        self.answer_weight = answer_weight
        self.label_smoothing = label_smoothing

    def forward(self, batch: InstructBatch) -> dict[str, Tensor]:
        """`loss`, the weighted sum of `lm` and `answers`, and how often the likeliest listed answer is right."""
        spoken = Stage2Step(self.model)(batch.spoken)["loss"]
        listed, right = self.classify(batch.listed)
        loss = spoken + self.answer_weight * listed
        return {"loss": loss, "lm": spoken.detach(), "answers": listed.detach(), "answer_accuracy": right}

    def classify(self, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the samples whose answer is listed, and the share of them told rightly."""
        batch = seen(self.model, batch)
        queries = self.model.query_output(batch.image_features, batch.instruction)  # (B, Q, D)
        logits = self.classifier(queries.flatten(1)).float()  # (B, A)
        is_listed = batch.answer != NOT_LISTED
        total = F.cross_entropy(
            logits, batch.answer, ignore_index=NOT_LISTED, label_smoothing=self.label_smoothing, reduction="sum"
        )
        num_listed = is_listed.sum().clamp(min=1)  # a batch without any has loss 0, not 0 / 0
        right = ((logits.detach().argmax(dim=1) == batch.answer) & is_listed).sum() / num_listed
        return total / share_of(num_listed), right


def list_answers(counted: dict[str, int], most: int) -> list[str]:
    """The `most` most frequent answers, those of equal count by alphabet: the same list run after run."""
    return sorted(counted, key=lambda answer: (-counted[answer], answer))[:most]
