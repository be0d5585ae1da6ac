"""Quick looks at held-out data while a run goes on; evaluation/ has the full tables.

stage 1            NAME/r1, r10           pictures whose caption is found among all captions of the split
captions           NAME/loss, exact, cider
questions          NAME/loss, exact, vqa  exact or, where a question has several answers, the VQA measure
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from blip2.evaluation.captions import cider_d
from blip2.evaluation.vqa import vqa_accuracy
from blip2.model.stage1 import Blip2Stage1
from blip2.model.stage2 import Blip2Stage2
from blip2.model.writing import Decoding, write
from blip2.objectives.itc import image_text_similarity
from blip2.preprocessing.text import QFormerTokenizer
from blip2.training.batches import Stage2Batches, as_text
from blip2.training.devices import moved
from blip2.training.seeing import image_features_of, seen
from blip2.training.sources import HeldOut
from blip2.training.stage2 import Stage2Batch, Stage2Step

CHUNK = 128
LONGEST_ANSWER, LONGEST_CAPTION = 12, 30
_SAID = ("loss", "exact", "cider", "vqa")
MEASURES = {"stage1": ("r1", "r10"), "stage2": _SAID, "instruct": _SAID}  # that there may be of a stage


@dataclass(frozen=True)
class Retrieval:
    """Finds the captions of a split's pictures."""

    model: Blip2Stage1
    tokenizer: QFormerTokenizer
    held: HeldOut

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of what it measures."""
        return tuple(f"{self.held.name}/{name}" for name in MEASURES["stage1"])

    def __call__(self) -> dict[str, float]:
        """Share of pictures whose caption is the most similar, or among the ten most similar, of the split's."""
        model, samples = self.model, self.held.samples
        device = model.temperature.device
        captions = [sample.captions[0] for sample in samples]
        candidates = sorted(set(captions))
        rank_of = {caption: i for i, caption in enumerate(candidates)}
        own = torch.tensor([rank_of[caption] for caption in captions])
        texts = [as_text(self.tokenizer.encode(candidates[i : i + CHUNK])) for i in range(0, len(candidates), CHUNK)]
        text_embeds = torch.cat([model.embed_texts(moved(text, device)) for text in texts])  # (C, E)
        ranked = []
        for first in range(0, len(samples), CHUNK):
            features = self.held.read(range(first, min(first + CHUNK, len(samples)))).to(device)
            features = image_features_of(model, features)
            similarity = image_text_similarity(model.embed_images(features), text_embeds)  # (B, C)
            ranked.append(similarity.topk(min(10, len(candidates)), dim=1).indices.cpu())
        hits = torch.cat(ranked) == own[:, None]  # (S, 10)
        found = float(hits[:, 0].float().mean()), float(hits.any(dim=1).float().mean())
        return dict(zip(self.gives, found, strict=True))


@dataclass(frozen=True)
class Asked:
    """A held-out question or caption: the sample's number, what is said to the model, and what it should say."""

    sample: int
    instruction: str
    prompt: str
    target: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """Answers `limit` of a split's questions, or captions as many of its pictures where it has none."""

    model: Blip2Stage2
    batches: Stage2Batches
    held: HeldOut
    limit: int

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of what it measures."""
        if self._is_caption:
            measures = ("loss", "exact", "cider")
        else:
            has_several = any(len(one.references) > 1 for one in self._asked)
            measures = ("loss", "exact", "vqa") if has_several else ("loss", "exact")
        return tuple(f"{self.held.name}/{name}" for name in measures)

    def __call__(self) -> dict[str, float]:
        """The loss, the share said exactly, and the usual measure of the task."""
        asked, device = self._asked, self.model.query_tokens.device
        losses, said = [], []
        for first in range(0, len(asked), CHUNK):
            part = asked[first : first + CHUNK]
            batch = self.batches.batch(
                self.held.read([one.sample for one in part]),
                [one.instruction for one in part],
                [one.prompt for one in part],
                [one.target for one in part],
            )
            batch = seen(self.model, moved(batch, device))
            losses.append(float(Stage2Step(self.model)(batch)["loss"]) * len(part))
            written = _say(self.model, batch, LONGEST_CAPTION if self._is_caption else LONGEST_ANSWER)
            said += self.batches.language_tokenizer.decode(written)
        told = [each.references for each in asked]
        exact = [text.casefold() in map(str.casefold, right) for text, right in zip(said, told, strict=True)]
        measured = [sum(losses) / len(asked), sum(exact) / len(asked)]
        if self._is_caption:
            measured.append(cider_d(said, told))
        elif len(self.gives) > len(measured):
            measured.append(sum(map(vqa_accuracy, said, told)) / len(asked))
        return dict(zip(self.gives, measured, strict=True))

    @cached_property
    def _asked(self) -> list[Asked]:
        return self._captions() if self._is_caption else self._questions()

    @cached_property
    def _is_caption(self) -> bool:
        return not any(question.answer for sample in self.held.samples for question in sample.questions)

    def _questions(self) -> list[Asked]:
        asked = [(i, question) for i, sample in enumerate(self.held.samples) for question in sample.questions]
        found = [(i, question) for i, question in asked if question.answer]
        spaced = found[:: max(1, len(found) // self.limit)][: self.limit]
        form = self.batches.prompts.question
        return [
            Asked(i, q.question, form.replace("{}", q.question), q.answer, q.answers or (q.answer,)) for i, q in spaced
        ]

    def _captions(self) -> list[Asked]:
        samples, prompts = self.held.samples, self.batches.prompts
        spaced = range(0, len(samples), max(1, len(samples) // self.limit))
        return [
            Asked(i, prompts.caption_instruction, prompts.before_caption, samples[i].captions[0], samples[i].captions)
            for i in spaced
        ]


def _say(model: Blip2Stage2, batch: Stage2Batch, longest: int) -> Tensor:
    assert model.language_model is not None
    visual_prompt = model.visual_prompt(batch.image_features, batch.instruction)
    prompt = batch.prompt
    started = model.language_model.start(visual_prompt, prompt.input_ids, prompt.attention_mask)
    return write(model.language_model, *started, Decoding(max_new_tokens=longest))
