"""Answering from a given list: each answer's log-probability under the language model, after picture and question.

The sum runs over the answer's tokens and the end token, so "red" and "red car" compare fairly: the first also has to
end where it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.model.language import LanguageModel
from blip2.preprocessing.text import LanguageTokenizer

ROWS_AT_ONCE = 32  # (picture, answer) pairs in one pass of the language model


@dataclass(frozen=True)
class RankedAnswer:
    """One answer of the list.

    Attributes:
        text: the answer.
        log_probability: natural logarithm of the probability that the model says exactly this.
        share: its probability among the answers of the list; they sum to 1.
    """

    text: str
    log_probability: float
    share: float


@torch.inference_mode()
def score_answers(
    language_model: LanguageModel,
    tokenizer: LanguageTokenizer,
    visual_prompt: Tensor,
    prompts: Sequence[str],
    answers: Sequence[str],
) -> Tensor:
    """Log-probability of every answer after every prompt.

    Args:
        language_model: the frozen LLM.
        tokenizer: its tokenizer.
        visual_prompt: (B, Q, Dl).
        prompts: B texts, each stands between its visual prompt and the answer.
        answers: A texts.

    Returns:
        (B, A), at most 0.
    """
    device = visual_prompt.device
    prompt = tokenizer.encode_prompts(prompts).to(device)
    spaces = ["after words"] * len(answers) + [""] * len(answers)  # an answer's first token depends on it
    target = tokenizer.encode_targets([*answers, *answers], prompts=spaces).to(device)
    begins = torch.tensor([0 if text else len(answers) for text in prompts], device=device)  # (B,)
    pairs = torch.cartesian_prod(torch.arange(len(prompts)), torch.arange(len(answers))).to(device)  # (B * A, 2)
    scores = []
    for rows in pairs.split(ROWS_AT_ONCE):
        row = rows[:, 0]
        answer = begins[row] + rows[:, 1]
        losses = language_model.token_losses(
            visual_prompt[row],
            prompt.input_ids[row],
            prompt.attention_mask[row],
            target.input_ids[answer],
            target.attention_mask[answer],
        )  # (rows, T), 0 at padding
        scores.append(-losses.sum(dim=1))
    return torch.cat(scores).unflatten(0, (len(prompts), len(answers)))


def rank(scores: Tensor, answers: Sequence[str]) -> list[RankedAnswer]:
    """Answers with their scores (A,), the most probable first; of equal ones the earlier in the list."""
    shares = scores.softmax(dim=0)  # (A,)
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return [RankedAnswer(answers[i], float(scores[i]), float(shares[i])) for i in order]
