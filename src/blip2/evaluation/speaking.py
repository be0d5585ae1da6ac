"""A generating model over whole sets: captions and answers in batches; and what it says without seeing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.data.sample import Question
from blip2.evaluation.encoding import Progress, Say
from blip2.evaluation.vqa import Answered
from blip2.inference.decoding import make_candidates
from blip2.inference.generation import Generator
from blip2.inference.retrieval import Retriever
from blip2.model.writing import Decoding, write
from blip2.preprocessing.prompts import question_prompt

CAPTION_DECODING = Decoding(max_new_tokens=30)
ANSWER_DECODING = Decoding(max_new_tokens=10)  # as LAVIS, but greedy: beams cost five times the time


@dataclass(frozen=True)
class Asked:
    """A question about the picture numbered `row` of some image features."""

    row: int
    question: Question


def caption_all(
    generator: Generator, image_features: Tensor, prompt: str, instruction: str, say: Say, *, batch_size: int = 64
) -> list[str]:
    """A caption for each of the image features (P, N, Dv)."""
    device = _device(generator)
    progress = Progress(say, "captions", len(image_features))
    captions: list[str] = []
    for features in image_features.split(batch_size):
        count = len(features)
        captions += generator.speak(features.to(device), [prompt] * count, [instruction] * count, CAPTION_DECODING)
        progress.add(count)
    return captions


def caption_choosing(
    generator: Generator,
    retriever: Retriever,
    best_of: int,
    image_features: Tensor,
    prompt: str,
    instruction: str,
    say: Say,
    *,
    batch_size: int = 64,
) -> list[str]:
    """A caption for each of the image features (P, N, Dv), the most similar of `best_of` as in `Blip2.caption`."""
    device = _device(generator)
    decoding = make_candidates({"max_new_tokens": CAPTION_DECODING.max_new_tokens}, best_of)
    progress = Progress(say, f"captions, best of {best_of}", len(image_features))
    captions: list[str] = []
    for some in image_features.split(max(1, batch_size // best_of)):
        features, count = some.to(device), len(some)
        proposed = generator.propose(features, [prompt] * count, [instruction] * count, decoding)
        captions += retriever.best_fitting(features, proposed)
        progress.add(count)
    return captions


def answer_all(
    generator: Generator,
    image_features: Tensor,
    asked: Sequence[Asked],
    template: str,
    say: Say,
    *,
    batch_size: int = 64,
) -> list[Answered]:
    """The answers, in the order of the questions; those of similar length are answered together."""
    device = _device(generator)
    progress = Progress(say, "answers", len(asked))
    given = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i].question.question), i))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        questions = [asked[i].question.question for i in places]
        features = image_features[[asked[i].row for i in places]].to(device)
        prompts = [question_prompt(question, template) for question in questions]
        for place, text in zip(places, generator.speak(features, prompts, questions, ANSWER_DECODING), strict=True):
            given[place] = text
        progress.add(len(places))
    return [Answered(row.question, text) for row, text in zip(asked, given, strict=True)]


@torch.inference_mode()
def answer_blind(
    generator: Generator, questions: Sequence[Question], template: str, say: Say, *, batch_size: int = 64
) -> list[Answered]:
    """The answers where the visual prompt is all zeros: what the words of the question alone give away.

    Equal questions have equal answers then, so each is asked once.
    """
    distinct = sorted({asked.question for asked in questions}, key=lambda question: (len(question), question))
    progress = Progress(say, "answers without seeing", len(distinct))
    given: dict[str, str] = {}
    num_queries, width = generator.model.config.num_query_tokens, generator.language_model.width
    for first in range(0, len(distinct), batch_size):
        some = distinct[first : first + batch_size]
        prompt = generator.tokenizer.encode_prompts([question_prompt(q, template) for q in some]).to(_device(generator))
        nothing = torch.zeros(len(some), num_queries, width, device=_device(generator))  # (B, Q, Dl)
        started = generator.language_model.start(nothing, prompt.input_ids, prompt.attention_mask)
        new_ids = write(generator.language_model, *started, ANSWER_DECODING)
        given |= zip(some, generator.tokenizer.decode(new_ids), strict=True)
        progress.add(len(some))
    return [Answered(asked, given[asked.question]) for asked in questions]


def _device(generator: Generator) -> torch.device:
    return generator.model.query_tokens.device
