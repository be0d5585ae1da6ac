"""From the position in a run to the batch there: which samples, which view, which text, all from the seed alone.

positions of batch i -> data/order.py -> (source, sample) -> image of a view + tokens -> Stage1Batch, Stage2Batch

Each rank reads its part of the positions. A sample whose picture cannot be read is counted and listed, and another one
of its source, which follows from the position too, stands in for it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from blip2.data.neighbours import Neighbours
from blip2.data.order import Draw, mixture_draw, sample_index
from blip2.data.sample import Question, Sample
from blip2.distributed import rank, world_size
from blip2.errors import BadData, BadSample
from blip2.inference.stage1_losses import Stage1Batch
from blip2.model.stage1 import Text
from blip2.objectives.language_modeling import split_caption
from blip2.preprocessing.prompts import question_prompt
from blip2.preprocessing.text import LanguageTokenizer, QFormerTokenizer, TextBatch
from blip2.training.images import Images
from blip2.training.instruct import NOT_LISTED, AnswerBatch, InstructBatch
from blip2.training.sections import DataSection, PromptsSection
from blip2.training.stage2 import Stage2Batch

TRIES = 20  # other samples that may stand in for one that cannot be read


@dataclass(frozen=True)
class Source:
    """A split with its images.

    Attributes:
        samples: the split's texts.
        images: their pictures, or image features, by the same number.
        weight: share in the mixture.
        rows: numbers of the samples that have captions; None where all have.
        questions: (sample, question) pairs when the task is answering, else None.
        neighbours: samples of near captions; None where none are drawn.
    """

    samples: Sequence[Sample]
    images: Images
    weight: float
    rows: Sequence[int] | None = None
    questions: Sequence[tuple[int, Question]] | None = None
    neighbours: Neighbours | None = None

    def __len__(self) -> int:
        drawn = self.rows if self.questions is None else self.questions
        return len(self.samples if drawn is None else drawn)

    def at(self, place: int) -> tuple[int, Question | None]:
        """The number of the sample at a place of the order, and the question that is asked of it."""
        if self.questions is not None:
            return self.questions[place]
        return (place if self.rows is None else self.rows[place]), None


@dataclass(frozen=True)
class Item:
    """One sample of a batch: its texts, its image or image features, and its question if that is the task."""

    sample: Sample
    image: Tensor
    question: Question | None
    rng: np.random.Generator


class ItemReader:
    """Position -> item, for a mixture of sources."""

    def __init__(self, sources: Sequence[Source], data: DataSection, seed: int) -> None:
        self.sources = sources
        self.seed = seed
        self._faults: list[BadSample] = []
        self.neighbour_share = data.neighbour_share
        self._weights = [source.weight for source in sources]
        self._sizes = [len(source) for source in sources]

    def items(self, first: int, count: int) -> list[Item]:
        """The samples at positions first ... first + count - 1 of the run."""
        return [self._item(position) for position in range(first, first + count)]

    def take_faults(self) -> list[BadSample]:
        """The bad samples met since this was last asked."""
        taken, self._faults = self._faults, []
        return taken

    def own_items(self, number: int, batch_size: int) -> list[Item]:
        """This rank's part of the samples at positions number * batch_size and after."""
        share = batch_size // world_size()
        return self.items(number * batch_size + rank() * share, share)

    def _item(self, position: int) -> Item:
        draw = mixture_draw(self.seed, position, self._weights, self._sizes)
        rng = np.random.default_rng([self.seed, 1, position])
        if self.neighbour_share and position and rng.random() < self.neighbour_share:
            draw = self._beside(position - 1, rng) or draw
        source = self.sources[draw.source]
        place, tried = draw.index, ""
        for attempt in range(TRIES):
            index, question = source.at(place)
            try:
                image = source.images.read(index, rng)
            except BadSample as error:
                self._faults.append(error)
                tried = error.sample_id
                place = sample_index((self.seed, draw.source, attempt + 1), position, len(source))
                continue
            return Item(source.samples[index], image, question, rng)
        raise BadData(f"{TRIES} samples in a row cannot be read, the last one {tried}.")

    def _beside(self, position: int, rng: np.random.Generator) -> Draw | None:
        """A neighbour of the sample that stands at a position of the mixture; None where its source has none."""
        before = mixture_draw(self.seed, position, self._weights, self._sizes)
        neighbours = self.sources[before.source].neighbours
        return replace(before, index=neighbours.draw(before.index, rng)) if neighbours is not None else None


class Stage1Batches:
    """Batch number -> Stage1Batch."""

    def __init__(self, reader: ItemReader, tokenizer: QFormerTokenizer, data: DataSection, batch_size: int) -> None:
        self.reader, self.tokenizer, self.data, self.batch_size = reader, tokenizer, data, batch_size

    def __call__(self, number: int) -> Stage1Batch:
        """The batch at positions number * batch_size and after."""
        items = self.reader.own_items(number, self.batch_size)
        captions = [self._caption(item) for item in items]
        told = [self._told(item, caption) for item, caption in zip(items, captions, strict=True)]
        return Stage1Batch(
            image_features=_stacked(items),
            text=self._tokens(captions),
            groups=groups([item.sample for item in items]),
            told=self._tokens(told) if told != captions else None,
            chance=torch.from_numpy(np.stack([item.rng.random(2) for item in items])),
        )

    def _tokens(self, texts: Sequence[str]) -> Text:
        return as_text(self.tokenizer.encode(texts, self.data.max_text_length))

    def _told(self, item: Item, caption: str) -> str:
        """What ITG reads: the caption, or one of the picture's questions with its answer."""
        questions = item.sample.questions
        if questions and item.rng.random() < self.data.question_share:
            chosen = questions[int(item.rng.integers(len(questions)))]
            return f"{chosen.question} {chosen.answer}"
        return caption

    def _caption(self, item: Item) -> str:
        caption = item.sample.captions[int(item.rng.integers(len(item.sample.captions)))]
        tags = item.sample.tags
        if tags and item.rng.random() < self.data.tag_share:
            chosen = item.rng.permutation(len(tags))[:3]
            return ", ".join([caption, *(tags[i] for i in chosen)])
        return caption


class Stage2Batches:
    """Batch number -> Stage2Batch."""

    def __init__(
        self,
        reader: ItemReader,
        language_tokenizer: LanguageTokenizer,
        data: DataSection,
        batch_size: int,
        prompts: PromptsSection,
        *,
        instruction_tokenizer: QFormerTokenizer | None = None,
        splits_captions: bool = False,
    ) -> None:
        """`instruction_tokenizer` is given for a model whose Q-Former reads the instruction; `splits_captions` turns
        captions into prefix and suffix (prefix language modelling, stage 2 of an encoder-decoder LLM)."""
        self.reader, self.data, self.batch_size, self.prompts = reader, data, batch_size, prompts
        self.language_tokenizer, self.instruction_tokenizer = language_tokenizer, instruction_tokenizer
        self.splits_captions = splits_captions

    def __call__(self, number: int) -> Stage2Batch:
        """The batch at positions number * batch_size and after."""
        items = self.reader.own_items(number, self.batch_size)
        texts = [self.texts(item) for item in items]
        answer, caption = self.data.max_answer_length, self.data.max_text_length
        limits = [caption if item.question is None else answer for item in items]
        return self.batch(_stacked(items), *zip(*texts, strict=True), limits=limits)

    def batch(
        self,
        features: Tensor,
        instructions: Sequence[str],
        prompts: Sequence[str],
        targets: Sequence[str],
        *,
        limits: Sequence[int] | None = None,
    ) -> Stage2Batch:
        """Tokenised texts beside ready features (B, N, Dv); `limits` are the targets' longest lengths in tokens."""
        limit = limits or self.data.max_text_length
        target = self.language_tokenizer.encode_targets(list(targets), prompts=list(prompts), max_length=limit)
        prompt = self.language_tokenizer.encode_prompts(list(prompts))
        return Stage2Batch(features, as_text(prompt), as_text(target), self.instruction(instructions))

    def instruction(self, instructions: Sequence[str]) -> Text | None:
        """Instructions in the Q-Former's tokens; None for a model whose Q-Former reads nothing."""
        if self.instruction_tokenizer is None:
            return None
        return as_text(self.instruction_tokenizer.encode(list(instructions), self.data.max_text_length))

    def texts(self, item: Item) -> tuple[str, str, str]:
        """Instruction, prompt and target of an item."""
        if item.question is not None:
            question = item.question.question
            said = item.question.answers or (item.question.answer,)  # of several people one is drawn
            answer = said[int(item.rng.integers(len(said)))]
            return question, question_prompt(question, self.prompts.question), answer
        caption = item.sample.captions[int(item.rng.integers(len(item.sample.captions)))]
        if self.splits_captions:
            return (self.prompts.caption_instruction, *split_caption(caption, item.rng.random()))
        return self.prompts.caption_instruction, self.prompts.before_caption, caption


class InstructBatches:
    """Batch number -> InstructBatch: what the LLM answers, and further samples whose answers are listed.

    Args:
        spoken: gives the LLM's share.
        reader: of the further samples, with a seed of its own.
        num_listed: further samples a batch.
        answers: the list of answers.
    """

    def __init__(self, spoken: Stage2Batches, reader: ItemReader, num_listed: int, answers: Sequence[str]) -> None:
        self.spoken, self.reader, self.num_listed = spoken, reader, num_listed
        self.number_of = {answer: number for number, answer in enumerate(answers)}

    def __call__(self, number: int) -> InstructBatch:
        """The batch at positions number * batch_size and after, and number * num_listed and after."""
        items = self.reader.own_items(number, self.num_listed)
        asked, _, answered = zip(*(self.spoken.texts(item) for item in items), strict=True)
        numbers = torch.tensor([self.number_of.get(answer, NOT_LISTED) for answer in answered])
        instruction = self.spoken.instruction(asked)
        assert instruction is not None, "answers are listed for a Q-Former that reads the question"
        return InstructBatch(self.spoken(number), AnswerBatch(_stacked(items), instruction, numbers))


def as_text(batch: TextBatch) -> Text:
    """The tokenizer's batch as the model's input."""
    return Text(batch.input_ids, batch.attention_mask)


def group_name(sample: Sample) -> str:
    """What samples that are no negatives of each other have in common: the concept or, without one, the caption."""
    return (sample.concept or sample.captions[0]).casefold()


def groups(samples: Sequence[Sample]) -> Tensor:
    """(B,) numbers, equal where the concept or, without one, the first caption is: such pairs are no negatives."""
    names = [group_name(sample) for sample in samples]
    numbers = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in names]
    return torch.tensor(numbers, dtype=torch.long)


def _stacked(items: Sequence[Item]) -> Tensor:
    return torch.stack([item.image for item in items])  # (B, N, Dv) or (B, 3, H, W)
