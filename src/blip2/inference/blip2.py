"""Blip2: a loaded model that captions, answers, talks, matches and embeds.

    picture ── frozen image encoder ──┬── retriever   embed_images, embed_texts, match, losses
                                      └── generator   caption, ask, rank_answers, generate, stream, chat

One pass of the encoder serves both parts. A model may lack either part; what needs it says so.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Literal, Unpack, cast, overload

import numpy as np
import torch
from torch import Tensor

from blip2.checkpoints.native import PARTS, ModelSettings
from blip2.errors import MissingPart, UserError
from blip2.inference import heap
from blip2.inference.answers import RankedAnswer, rank
from blip2.inference.chat import Conversation
from blip2.inference.decoding import (
    DecodingOptions,
    default_best_of,
    make_candidates,
    make_decoding,
    make_streamable,
)
from blip2.inference.generation import MOST_ROWS, Generator
from blip2.inference.image_cache import ImageCache, digests
from blip2.inference.pixels import batches
from blip2.inference.presets import Manner, Preset, Task, manner
from blip2.inference.retrieval import Match, Retriever
from blip2.inference.stage1_losses import Stage1Batch, Stage1Losses, stage1_losses
from blip2.model.stage1 import Text
from blip2.model.vision import ImageEncoder
from blip2.objectives.negatives import NegativeRule
from blip2.preprocessing.images import ImageSource, ImageTransform
from blip2.preprocessing.prompts import question_prompt
from blip2.preprocessing.text import checked

Images = ImageSource | Sequence[ImageSource]


class Blip2:
    """A model to use; made by `blip2.load`.

    An image is a path, bytes, a PIL image or an array; methods take one or a list and answer in kind. A row's result
    does not depend on what else is in the list; of a quantised model it may (docs/quantization.md).

    Attributes:
        settings: what blip2.json says.
        batch_size: how many pictures go through the model at once; None: as many as its language model writes side by
            side well (`Generator.rows_at_once`), or 64.
        image_cache: features of the pictures seen last.
    """

    def __init__(
        self,
        settings: ModelSettings,
        vision_model: ImageEncoder,
        *,
        retriever: Retriever | None = None,
        generator: Generator | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.settings = settings
        self.vision_model = vision_model
        self.batch_size = batch_size
        self.image_cache = ImageCache()
        self._holes = heap.Holes()
        self.transform = ImageTransform(settings.image_size, settings.image_mean, settings.image_std)
        self._retriever = retriever
        self._generator = generator

    @property
    def can_match(self) -> bool:
        """Whether the retrieval part is there."""
        return self._retriever is not None

    @property
    def retriever(self) -> Retriever:
        """The retrieval part. Raises MissingPart where the model has none."""
        if self._retriever is None:
            raise self._lacks("stage1", "embed and match")
        return self._retriever

    @property
    def generator(self) -> Generator:
        """The generating part. Raises MissingPart where the model has none."""
        if self._generator is None:
            raise self._lacks("generation", "caption and answer")
        return self._generator

    def _lacks(self, part: str, purpose: str) -> MissingPart:
        name = self.settings.name
        if part in self.settings.parts:
            return MissingPart(f"{name!r} was loaded without {PARTS[part]}. Load it with parts=None to {purpose}.")
        return MissingPart(
            f"The model {name!r} has no part {part!r} ({PARTS[part]}), so it cannot {purpose}. "
            "Use one that has it (`blip2 info` lists the models and their parts), such as mini."
        )

    # -- text from pictures ---------------------------------------------------------------------------------------
    @overload
    def caption(
        self,
        images: ImageSource,
        prompt: str | None = None,
        *,
        best_of: int | None = None,
        preset: Preset | None = None,
        **options: Unpack[DecodingOptions],
    ) -> str: ...
    @overload
    def caption(
        self,
        images: Sequence[ImageSource],
        prompt: str | None = None,
        *,
        best_of: int | None = None,
        preset: Preset | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[str]: ...
    def caption(
        self,
        images: Images,
        prompt: str | None = None,
        *,
        best_of: int | None = None,
        preset: Preset | None = None,
        **options: Unpack[DecodingOptions],
    ) -> str | list[str]:
        """What the picture shows.

        Args:
            images: one image or a list.
            prompt: what the caption continues ("a photo of"); the model's own where it is None, nothing where "".
            best_of: how many captions are made (beams, or draws with `sample`), of which the retrieval part chooses
                the one most similar to the picture. None: as the model's settings say, but 1 beside `num_beams` or
                `sample`, and where the retrieval part is not loaded.
            preset: prompt and decoding of the paper or of the original code; what is given besides counts more.
            options: see `DecodingOptions`.

        Returns:
            The caption without the prompt, or a list of them.

        Raises:
            MissingPart: best_of above 1 without the retrieval part.
        """
        rows, is_one = _rows(images)
        prompts = self.settings.prompts
        chosen = prompts.caption
        if preset is not None:
            wanted = self._manner(preset, "caption")
            chosen, options = wanted.prompt, wanted.options | options
        chosen = chosen if prompt is None else prompt
        if best_of is None:
            own = self.settings.caption_best_of if self._retriever is not None else 1
            best_of = default_best_of(own, options)
        if best_of == 1:
            return _in_kind(self.generate(rows, chosen, prompts.caption_instruction, **options), is_one)
        generator, retriever, decoding = self.generator, self.retriever, make_candidates(options, best_of)
        captions: list[str] = []
        for some in self._batches(len(rows), rows_each=decoding.num_return_sequences):
            features = self.image_features(rows[some])
            told = [prompts.caption_instruction] * len(features)
            proposed = generator.propose(features, [chosen] * len(features), told, decoding)
            captions += retriever.best_fitting(features, proposed)
        return _in_kind(captions, is_one)

    @overload
    def ask(
        self,
        images: ImageSource,
        question: str,
        answers: Sequence[str] | None = None,
        *,
        preset: Preset | None = None,
        **options: Unpack[DecodingOptions],
    ) -> str: ...
    @overload
    def ask(
        self,
        images: Sequence[ImageSource],
        question: str | Sequence[str],
        answers: Sequence[str] | None = None,
        *,
        preset: Preset | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[str]: ...
    def ask(
        self,
        images: Images,
        question: str | Sequence[str],
        answers: Sequence[str] | None = None,
        *,
        preset: Preset | None = None,
        **options: Unpack[DecodingOptions],
    ) -> str | list[str]:
        """The answer to a question about the picture.

        Args:
            images: one image or a list.
            question: one for all images, or a list as long as that of the images.
            answers: choose the most probable of these instead of making one up.
            preset: prompt and decoding of the paper or of the original code; what is given besides counts more.
            options: see `DecodingOptions`; neither they nor a preset apply with `answers`.

        Returns:
            The answer, or a list of them.
        """
        rows, is_one = _rows(images)
        if answers is not None:
            if options or preset:
                given = ", ".join([*options, *(["preset"] if preset else [])])
                raise UserError(f"{given} has no effect when the answer is chosen from a list.")
            return _in_kind([ranked[0].text for ranked in self.rank_answers(rows, question, answers)], is_one)
        questions = _questions(question, len(rows))
        asked = self._question_prompts(questions)
        if preset is not None:
            wanted = self._manner(preset, "question")
            asked = [question_prompt(text, wanted.prompt) for text in questions]
            options = wanted.options | options
        return _in_kind(self.generate(rows, asked, questions, **options), is_one)

    def rank_answers(
        self, images: Sequence[ImageSource], question: str | Sequence[str], answers: Sequence[str]
    ) -> list[list[RankedAnswer]]:
        """The given answers for every image, the most probable first."""
        if isinstance(answers, str):
            raise UserError("answers is one text. Give a list of them, from which one is chosen.")
        if not answers or not all(checked(answer).strip() for answer in answers):
            raise UserError("The list of answers is empty or holds an empty answer.")
        if not isinstance(images, list | tuple):
            raise UserError("images is one image. Give a list, [image].")
        generator = self.generator
        questions = _questions(question, len(images))
        prompts = self._question_prompts(questions)
        generator.check_room(prompts, 0)
        rankings = []
        for rows in self._batches(len(images)):
            features = self.image_features(images[rows])
            scores = generator.score(features, prompts[rows], questions[rows], answers)  # (B, A)
            rankings += [rank(row, answers) for row in scores.float().cpu()]
        return rankings

    def generate(
        self,
        images: Sequence[ImageSource],
        prompts: str | Sequence[str],
        instructions: str | Sequence[str] | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[str]:
        """What the language model says after each picture and prompt: the way under `caption` and `ask`.

        Args:
            images: B images.
            prompts: what the text continues; one for all, or B.
            instructions: what an instruction-aware Q-Former reads (another one reads nothing); one for all, or B.
                None: the prompts.
            options: see `DecodingOptions`; without any, as the model's settings say.
        """
        own = cast(DecodingOptions, self.settings.generation)
        generator, decoding = self.generator, make_decoding(options or own)
        prompts = _each(prompts, len(images), "prompts")
        generator.check_room(prompts, decoding.max_new_tokens)
        told = prompts if instructions is None else _each(instructions, len(images), "instructions")
        texts: list[str] = []
        for rows in self._batches(len(images), rows_each=decoding.num_beams):
            texts += generator.speak(self.image_features(images[rows]), prompts[rows], told[rows], decoding)
        return texts

    def stream(
        self, image: ImageSource, question: str | None = None, **options: Unpack[DecodingOptions]
    ) -> Iterator[str]:
        """The answer, or without a question the caption, in pieces as they are made; joined they are the whole text."""
        generator, decoding = self.generator, make_streamable(options)
        prompt, instruction = self.settings.prompts.caption, self.settings.prompts.caption_instruction
        if question is not None:
            (instruction,) = _questions(question, 1)
            (prompt,) = self._question_prompts([instruction])
        generator.check_room([prompt], decoding.max_new_tokens)
        return generator.stream(self.image_features(image), prompt, instruction, decoding)

    def chat(self, image: ImageSource) -> Conversation:
        """A dialogue about one picture."""
        if isinstance(image, list | tuple):
            raise UserError("chat takes one image. Begin a dialogue for each.")
        return Conversation(self.generator, self.image_features(image), self.settings.prompts.question)

    # -- pictures and texts as vectors ----------------------------------------------------------------------------
    @torch.inference_mode()
    def image_features(self, images: Images) -> Tensor:
        """Frozen image features (B, N, Dv): what `retriever` and `generator` take."""
        rows, _ = _rows(images)
        features = []
        for some in self._batches(len(rows)):
            for pixels in batches(rows[some], self.transform, reads_ahead=self._device.type != "cpu"):
                features += self.features_of(pixels)
        return torch.stack(features)

    @torch.inference_mode()
    def features_of(self, pixels: Tensor) -> list[Tensor]:
        """(N, Dv) of every row of `pixels` (B, S, S, 3), uint8, as `transform.resize` makes them.

        What is in the cache, or there twice, is not computed again.
        """
        pixels = pixels.to(self._device)
        keys = digests(pixels)
        known = {key: kept[0] for key in keys if (kept := self.image_cache.get(key))}
        new = {key: row for key, row in zip(keys, pixels, strict=True) if key not in known}
        if new:
            begin = time.perf_counter()
            computed = self.vision_model(self.transform.normalise(torch.stack([*new.values()])))
            for key, features in zip(new, computed, strict=True):
                known[key] = features
                self.image_cache.put(key, [features])
            if self._device.type == "cpu":
                self._holes.after(time.perf_counter() - begin)
        return [known[key] for key in keys]

    def embed_images(self, images: Images) -> np.ndarray:
        """Unit vectors (B, Q, E) of the pictures, one for each query; a text's similarity is that of the best query.

        A model that pools its queries (`query_pooling: mean` or `concat`) gives one vector, (B, 1, E).
        """
        retriever = self.retriever
        rows, _ = _rows(images)
        embeds = [retriever.embed_images(self.image_features(rows[some])) for some in self._batches(len(rows))]
        return torch.cat(embeds).float().cpu().numpy()

    def embed_texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit vectors (B, E) of the texts."""
        retriever = self.retriever
        rows = [texts] if isinstance(texts, str) else list(texts)
        embeds = [retriever.embed_texts(rows[some]) for some in self._batches(len(rows))]
        return torch.cat(embeds).float().cpu().numpy()

    def match(self, image: ImageSource, texts: str | Sequence[str]) -> list[Match]:
        """How well each text fits the picture, in the order given."""
        retriever = self.retriever
        rows = [texts] if isinstance(texts, str) else list(texts)
        if isinstance(image, list | tuple):
            raise UserError("match takes one image. Call it for each.")
        features = self.image_features(image)
        return [match for some in self._batches(len(rows)) for match in retriever.match(features, rows[some])]

    def losses(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        negatives: Literal["sample", "hardest", "lavis-2023-02"] = "sample",
        groups: Tensor | None = None,
        label_smoothing: float = 0.1,
    ) -> Stage1Losses:
        """The losses of stage 1 (ITC, ITM, ITG) on a batch of pairs, with a gradient where weights ask for one.

        Loaded weights ask for none, and dropout sleeps: for training see `blip2 train`.

        Args:
            pixel_values: (B, 3, S, S), as `transform` makes them.
            input_ids: (B, T) of `retriever.tokenizer`, [CLS] first and [SEP] last, padded on the right.
            attention_mask: (B, T), 1 = real token.
            negatives: drawn from the softmax of the similarities (the paper), the most similar wrong pair (for numbers
                that do not depend on chance), or drawn as the original code did until July 2023.
            groups: (B,) equal for pairs that are no negatives of each other; None: each pair is alone.
            label_smoothing: of ITC and ITG; 0.1 in the original.

        Raises:
            MissingPart: the model has no retrieval part.
            UserError: the three have not the same number of rows.
        """
        retriever = self.retriever
        count = len(pixel_values)
        if not count or len(input_ids) != count or input_ids.shape != attention_mask.shape:
            raise UserError(
                f"There are {count} pictures, texts of shape {tuple(input_ids.shape)} and a mask of shape "
                f"{tuple(attention_mask.shape)}. Give as many texts as pictures, and a mask of the texts' shape."
            )
        batch = Stage1Batch(
            image_features=self.vision_model(pixel_values).to(retriever.model.query_tokens.dtype),
            text=Text(input_ids, attention_mask),
            groups=torch.arange(count, device=input_ids.device) if groups is None else groups,
        )
        rule: NegativeRule = "paper" if negatives == "sample" else negatives
        return stage1_losses(
            retriever.model,
            batch,
            bos_id=retriever.tokenizer.dec_id,
            negatives=rule,
            label_smoothing=label_smoothing,
        )

    # -- within ---------------------------------------------------------------------------------------------------
    @property
    def _device(self) -> torch.device:
        """Where the image encoder computes."""
        return next(self.vision_model.parameters()).device

    def _manner(self, preset: str, task: Task) -> Manner:
        return manner(preset, task, is_encoder_decoder=self.generator.language_model.is_encoder_decoder)

    def _question_prompts(self, questions: Sequence[str]) -> list[str]:
        return [question_prompt(question, self.settings.prompts.question) for question in questions]

    def _batches(self, count: int, *, rows_each: int = 1) -> Iterator[slice]:
        """Slices of `count` pictures, of which each takes so many rows of the language model."""
        if not count:
            raise UserError("The list is empty. Give at least one.")
        size = self.batch_size
        if size is None:
            # beams share what was read of the picture and the prompt, so twice as many rows are still one batch
            most = self._generator.rows_at_once if self._generator is not None else MOST_ROWS
            size = max(1, most if rows_each == 1 else 2 * most // rows_each)
        return (slice(start, start + size) for start in range(0, count, size))


def _rows(images: Images) -> tuple[list[ImageSource], bool]:
    """The images as a list, and whether it was one image and no list."""
    if isinstance(images, list | tuple):
        return list(images), False
    return [cast(ImageSource, images)], True


def _in_kind(texts: list[str], is_one: bool) -> str | list[str]:
    return texts[0] if is_one else texts


def _each(texts: str | Sequence[str], count: int, what: str) -> list[str]:
    """`count` texts: the one given repeated, or the list, which must be as long."""
    if not isinstance(texts, str | Sequence):
        raise UserError(f"{what} is {type(texts).__name__}. Give a text, or a list of them.")
    rows = [texts] * count if isinstance(texts, str) else list(texts)
    if len(rows) != count:
        raise UserError(f"There are {count} images and {len(rows)} {what}. Give one for all, or as many as images.")
    return rows


def _questions(question: str | Sequence[str], count: int) -> list[str]:
    questions = _each(question, count, "questions")
    if not all(checked(asked).strip() for asked in questions):
        raise UserError("The question is empty.")
    return questions
