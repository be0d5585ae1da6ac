"""The open set's benchmark: what a model does with pictures and scenes that training kept away from it.

retrieval    Twemoji (a style never trained on), the held-out concepts, new scenes: by ITC, and re-ranked by ITM
captions     Twemoji pictures: is the right noun named; greedy, and chosen among several where the model does so
vqa          new scenes, new pairs of nouns; blind (visual prompt zeroed) and shuffled (the picture of another scene)
easy_vqa     the official test split of easy-VQA, and blind
baselines    nearest neighbour and ridge regression on the same frozen features

Names of metrics are TASK/SPLIT/METRIC, values fractions (CIDEr-D: 0 to 10). Nothing here draws lots: where a split is
larger than the limit, samples evenly spread over it are taken.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2 import paths
from blip2.checkpoints import frozen
from blip2.data.open_pairs.picture import noun_of
from blip2.data.sample import Question, Sample
from blip2.data.shards import Split, open_split, pictures_sha256
from blip2.errors import UserError
from blip2.evaluation import baselines, nouns, retrieval
from blip2.evaluation.captions import bleu, cider_d, rouge_l
from blip2.evaluation.encoding import Say, encode, encode_pooled, pool
from blip2.evaluation.matching import match_pairs, similarity_matrix
from blip2.evaluation.speaking import Asked, answer_all, answer_blind, caption_all, caption_choosing
from blip2.evaluation.vqa import Answered, AnswerPrior, accuracy, accuracy_by_kind
from blip2.inference.blip2 import Blip2

STYLE, CONCEPTS, SCENES = "held_out_style", "held_out_concepts", "new_scenes"
NOUNS = "held_out_nouns"  # the pictures of CONCEPTS whose noun no training concept has: "cat", not a new "black cat"
TRAINING = ("train_pairs", "train_styles")  # the pictures that training sees but for scenes
SPOKEN = 1000  # captions, and questions of a split, where no limit is given: enough for one percent of standard error
CANDIDATES = 10  # re-ranked for each query
TASKS = {  # task -> the part of the model that it needs
    "retrieval": "stage1",
    "captions": "generation",
    "vqa": "generation",
    "easy_vqa": "generation",
    "baselines": None,
}


@dataclass
class Results:
    """What was measured.

    Attributes:
        metrics: name -> fraction.
        counts: TASK/SPLIT -> (how many pictures or questions were used, how many there are).
    """

    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, prefix: str, metrics: Mapping[str, float], *, used: int, total: int) -> None:
        """Takes the metrics of one split over."""
        self.metrics |= {f"{prefix}/{name}": value for name, value in metrics.items()}
        self.counts[prefix] = (used, total)


def run(
    model: Blip2,
    folder: Path,
    tasks: Iterable[str] = TASKS,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    sentence_model: str = baselines.SENTENCE_MODEL,
    say: Say = print,
) -> Results:
    """Runs the tasks.

    Args:
        model: loaded with the parts that the tasks need.
        folder: of the open data set.
        tasks: names in TASKS.
        limit: pictures or questions of a split at most; 0: all. None: all pictures for retrieval and the baselines,
            SPOKEN captions and questions, which take the language model's time.
        batch_size: questions answered at once.
        sentence_model: gives the ridge baseline its sentence embeddings.
        say: told how far it is.

    Raises:
        UserError: no task of that name, or a limit that leaves nothing to measure.
        MissingPart: the model lacks the part a task needs.
        MissingFile, BadData: the data set is not there or broken.
    """
    chosen = list(tasks)
    for task in chosen:
        if task not in TASKS:
            raise UserError(f"No task is called {task!r}. These are: {', '.join(TASKS)}.")
    if limit is not None and limit < 0:
        raise UserError(f"The limit is {limit}; give the most samples of a split to take, or 0 for all.")
    bench = _Benchmark(model, folder, limit=limit, batch_size=batch_size, sentence_model=sentence_model, say=say)
    work: dict[str, Callable[[], None]] = {
        "retrieval": bench.retrieval,
        "captions": bench.captions,
        "vqa": bench.vqa,
        "easy_vqa": bench.easy_vqa,
        "baselines": bench.baselines,
    }
    for task in chosen:
        work[task]()
    return bench.results


def spread(count: int, limit: int) -> list[int]:
    """Up to `limit` of the numbers below `count`, evenly spread; 0: all."""
    taken = min(count, limit or count)
    return [i * count // taken for i in range(taken)]


@dataclass
class _Pictures:
    """Pictures with captions, ready for retrieval: P of them, T texts to choose from."""

    samples: list[Sample]  # P
    total: int
    features: Tensor  # (P, N, Dv)
    texts: list[str]  # T distinct captions of the whole split, in their order

    @cached_property
    def correct(self) -> Tensor:
        """(P, T) bool."""
        return retrieval.correct_pairs([sample.captions for sample in self.samples], self.texts)

    @property
    def are_all(self) -> bool:
        """Whether no picture of the split was left out, without which texts would search an easier set."""
        return len(self.samples) == self.total


class _Benchmark:
    """The tasks on one model; features that several tasks use are made once."""

    def __init__(
        self, model: Blip2, folder: Path, *, limit: int | None, batch_size: int, sentence_model: str, say: Say
    ) -> None:
        self.model, self.folder, self.say = model, folder, say
        self.batch_size, self.sentence_model = batch_size, sentence_model
        self.limit = limit or 0
        self.spoken = SPOKEN if limit is None else limit
        self.results = Results()
        self._pictures: dict[str, _Pictures] = {}

    # -- retrieval ------------------------------------------------------------------------------------------------
    def retrieval(self) -> None:
        """Recall at 1, 5, 10 both ways, then recall at 1 after re-ranking by the rules of `retrieval.rerank`."""
        retriever, weight = self.model.retriever, self.model.settings.match_weight
        for split in (STYLE, CONCEPTS, SCENES):
            pictures = self.pictures(split)
            texts, features = pictures.texts, pictures.features
            similarity = similarity_matrix(retriever, features, texts, self.say)  # (P, T)

            candidates = retrieval.best_candidates(similarity, CANDIDATES, both_ways=pictures.are_all)
            logits = match_pairs(retriever, features, texts, candidates.pairs, self.say)  # (M, 2)
            temperature = float(retriever.model.temperature)
            metrics = self._recalls(pictures, similarity, similarity.T)
            odds = logits[:, 1] - logits[:, 0]
            for name, reranked in {
                "reranked": retrieval.rerank(similarity / temperature, candidates, weight * odds),
                "reranked_unweighted": retrieval.rerank(similarity / temperature, candidates, odds),
                "reranked_as_original": retrieval.rerank(similarity, candidates, logits[:, 1]),
            }.items():
                best = self._recalls(pictures, reranked.image_to_text, reranked.text_to_image)
                metrics |= {key.replace("_r1", f"_{name}_r1"): best[key] for key in best if key.endswith("_r1")}
            self._add("retrieval", split, metrics)
            if split == CONCEPTS:
                self._add_new_nouns("retrieval", similarity)

    def _add_new_nouns(self, task: str, similarity: Tensor) -> None:
        """Recalls of those pictures of the held-out concepts that show a new noun, among all held-out texts."""
        pictures = self.pictures(CONCEPTS)
        rows = [row for row, sample in enumerate(pictures.samples) if noun_of(sample.concept) not in self._known_nouns]
        if rows:
            found = retrieval.recalls(similarity[rows], pictures.correct[rows])
            metrics = {f"image_to_text_{name}": value for name, value in found.items()}
            metrics["chance"] = retrieval.chance_recall(pictures.correct[rows])
            self.results.add(f"{task}/{NOUNS}", metrics, used=len(rows), total=len(rows))

    def _recalls(self, pictures: _Pictures, image_to_text: Tensor, text_to_image: Tensor | None) -> dict[str, float]:
        """Recalls both ways and chance; text to image only where all pictures are searched."""
        correct = pictures.correct
        found = {f"image_to_text_{name}": v for name, v in retrieval.recalls(image_to_text, correct).items()}
        if pictures.are_all and text_to_image is not None:
            found |= {f"text_to_image_{name}": v for name, v in retrieval.recalls(text_to_image, correct.T).items()}
        return found | {"chance": retrieval.chance_recall(correct)}

    @cached_property
    def _known_nouns(self) -> set[str]:
        """The nouns of training's concepts."""
        splits = (open_split(self.folder, split) for split in TRAINING)
        return {noun_of(sample.concept) for split in splits for sample in split.described()}

    def pictures(self, split: str) -> _Pictures:
        """A split's pictures and texts; encoded on first use."""
        if split not in self._pictures:
            samples = open_split(self.folder, split)
            chosen = [samples[i] for i in spread(len(samples), self.limit)]
            texts = list(dict.fromkeys(sample.captions[0] for sample in samples.described()))
            features = encode(self.model, chosen, split, self.say)
            self._pictures[split] = _Pictures(chosen, len(samples), features, texts)
        return self._pictures[split]

    def _add(self, task: str, split: str, metrics: Mapping[str, float]) -> None:
        pictures = self.pictures(split)
        self.results.add(f"{task}/{split}", metrics, used=len(pictures.samples), total=pictures.total)

    # -- captions -------------------------------------------------------------------------------------------------
    def captions(self) -> None:
        """Captions of the held-out style against its labels: greedy ones, and the model's own where it chooses."""
        pictures, settings = self.pictures(STYLE), self.model.settings
        chosen = spread(len(pictures.samples), self.spoken)
        features, labels = pictures.features[chosen], [pictures.samples[i].captions for i in chosen]
        told = (settings.prompts.caption, settings.prompts.caption_instruction, self.say)
        greedy = caption_all(self.model.generator, features, *told, batch_size=self.batch_size)
        metrics = caption_metrics(greedy, labels)
        metrics |= {f"greedy_{name}": metrics[name] for name in ("noun_accuracy", "exact", "cider")}
        if settings.caption_best_of > 1:
            parts = (self.model.generator, self.model.retriever, settings.caption_best_of)
            metrics |= caption_metrics(caption_choosing(*parts, features, *told, batch_size=self.batch_size), labels)
        self.results.add(f"captions/{STYLE}", metrics, used=len(chosen), total=pictures.total)

    # -- questions ------------------------------------------------------------------------------------------------
    def vqa(self) -> None:
        """Composed scenes, by kind of question; then blind and with the pictures of other scenes."""
        prior = self._prior("train_scenes")
        for split in (SCENES, "new_noun_pairs"):
            samples, asked, total = self._questions(split)
            features = encode(self.model, samples, split, self.say)
            self._add_answers(f"vqa/{split}", self._answer(features, asked), total, prior)
            if split == SCENES:
                elsewhere = [Asked((row.row + max(1, len(samples) // 2)) % len(samples), row.question) for row in asked]
                self._add_answers("vqa/shuffled", self._answer(features, elsewhere), total)
                self._add_answers("vqa/blind", self._answer_blind(asked), total)

    def easy_vqa(self) -> None:
        """easy-VQA's official test split, and blind."""
        samples, asked, total = self._questions("easy_vqa_test")
        features = encode(self.model, samples, "easy_vqa_test", self.say)
        self._add_answers("easy_vqa/test", self._answer(features, asked), total, self._prior("easy_vqa_train"))
        self._add_answers("easy_vqa/blind", self._answer_blind(asked), total)

    def _questions(self, split: str) -> tuple[list[Sample], list[Asked], int]:
        """Evenly spread pictures with all their questions, about as many as the limit; and how many there are."""
        samples = open_split(self.folder, split)
        total = sum(len(sample.questions) for sample in samples.described())
        per_picture = total / max(len(samples), 1)
        num_pictures = max(1, round(self.spoken / per_picture)) if self.spoken else 0
        chosen = [samples[i] for i in spread(len(samples), num_pictures)]
        asked = [Asked(row, question) for row, sample in enumerate(chosen) for question in sample.questions]
        return chosen, asked[: self.spoken or None], total

    def _prior(self, split: str) -> AnswerPrior:
        samples = open_split(self.folder, split)
        return AnswerPrior(question for sample in samples.described() for question in sample.questions)

    def _answer(self, features: Tensor, asked: Sequence[Asked]) -> list[Answered]:
        template = self.model.settings.prompts.question
        return answer_all(self.model.generator, features, asked, template, self.say, batch_size=self.batch_size)

    def _answer_blind(self, asked: Sequence[Asked]) -> list[Answered]:
        questions, template = [row.question for row in asked], self.model.settings.prompts.question
        return answer_blind(self.model.generator, questions, template, self.say, batch_size=self.batch_size)

    def _add_answers(
        self, prefix: str, answered: Sequence[Answered], total: int, prior: AnswerPrior | None = None
    ) -> None:
        metrics = {"accuracy": accuracy(answered)} | accuracy_by_kind(answered)
        if prior is not None:
            metrics |= prior_metrics(prior, [row.question for row in answered])
        self.results.add(prefix, metrics, used=len(answered), total=total)

    # -- baselines ------------------------------------------------------------------------------------------------
    def baselines(self) -> None:
        """Nearest neighbour on the held-out style; ridge regression on both sets."""
        concepts, pairs = open_split(self.folder, CONCEPTS), [open_split(self.folder, split) for split in TRAINING]
        told = [sample for split in pairs for sample in split.described()]
        inputs = np.concatenate([self._pooled(name, split) for name, split in zip(TRAINING, pairs, strict=True)])
        # Twemoji's concepts are not the model's: it shows those that training kept out too, so the gallery does
        gallery_told = told + list(concepts.described())
        gallery = np.concatenate([inputs, self._pooled(CONCEPTS, concepts)])
        self._nearest_neighbour(gallery, gallery_told)
        captions = baselines.sentence_embeddings([sample.captions[0] for sample in told], self.sentence_model)
        predict = baselines.ridge(inputs, captions)
        centre = captions.mean(axis=0)
        for split in (CONCEPTS, STYLE):
            pictures = self.pictures(split)
            texts = baselines.sentence_embeddings(pictures.texts, self.sentence_model)
            scores = baselines.ridge_scores(predict(pool(pictures.features)), texts, centre)
            self._add_baseline("ridge", split, scores)

    def _nearest_neighbour(self, gallery: np.ndarray, told: Sequence[Sample]) -> None:
        pictures = self.pictures(STYLE)
        sources = {sample.source for sample in pictures.samples}
        rows = [i for i, sample in enumerate(told) if sample.source in sources]
        labels = [retrieval.same_text(told[i].captions[0]) for i in rows]
        texts = [retrieval.same_text(text) for text in pictures.texts]
        shown, gallery = pool(pictures.features), gallery[rows]
        mean_only = slice(0, gallery.shape[1] // 2)
        scores = baselines.concept_scores(shown[:, mean_only], gallery[:, mean_only], labels, texts)
        self._add_baseline("nearest_neighbour", STYLE, scores)
        nearest = [pictures.texts[i] for i in scores.argmax(axis=1)]
        named = caption_metrics(nearest, [sample.captions for sample in pictures.samples])
        self.results.metrics[f"baselines/nearest_neighbour/{STYLE}/noun_accuracy"] = named["noun_accuracy"]
        white = baselines.whitening(gallery, labels)
        scores = baselines.concept_scores(shown @ white, gallery @ white, labels, texts)
        self._add_baseline("nearest_neighbour_whitened", STYLE, scores)

    def _add_baseline(self, name: str, split: str, scores: np.ndarray) -> None:
        matrix = torch.from_numpy(scores)
        self._add(f"baselines/{name}", split, self._recalls(self.pictures(split), matrix, matrix.T))
        if split == CONCEPTS:
            self._add_new_nouns(f"baselines/{name}", matrix)

    def _pooled(self, split: str, samples: Split) -> np.ndarray:
        """Pooled features of a whole split, kept on disk: they depend on the frozen encoder and the pictures alone."""
        encoder = self.model.vision_model
        made_of = f"{frozen.fingerprint(encoder)} {pictures_sha256(self.folder, split)} {self.model.transform} mean max"
        path = paths.home() / "features" / f"pooled-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.npy"
        if not path.is_file():
            pooled = encode_pooled(self.model, samples, split, self.say).astype(np.float32)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}.partial")
            with open(beside, "wb") as file:
                np.save(file, pooled)
            os.replace(beside, path)
        return np.load(path, allow_pickle=False).astype(np.float64)


def caption_metrics(said: Sequence[str], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Metrics of captions against the labels of each picture, with the share that the commonest noun would reach."""
    pairs = list(zip(said, labels, strict=True))
    heads = [nouns.head_noun(texts[0]) for texts in labels]
    scores = bleu(said, labels)
    return {
        "noun_accuracy": _share(any(nouns.names(caption, text) for text in texts) for caption, texts in pairs),
        "exact": _share(any(nouns.says_exactly(caption, text) for text in texts) for caption, texts in pairs),
        "most_common_noun": max(heads.count(head) for head in set(heads)) / len(heads),
        "cider": cider_d(said, labels),
        "bleu1": scores[0],
        "bleu4": scores[3],
        "rouge_l": rouge_l(said, labels),
    }


def prior_metrics(prior: AnswerPrior, questions: Sequence[Question]) -> dict[str, float]:
    """What training's questions alone would answer: always the commonest answer, or the commonest to each question."""
    majority = [Answered(question, prior.majority) for question in questions]
    by_question = [Answered(question, prior.answer(question)) for question in questions]
    return {"majority": accuracy(majority), "question_prior": accuracy(by_question)}


def _share(claims: Iterable[bool]) -> float:
    rows = list(claims)
    return sum(rows) / len(rows)
