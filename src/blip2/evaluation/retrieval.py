"""Recall of image-text retrieval from similarity matrices, with re-ranking by ITM; pure functions.

similarity (I, T)    images down, texts across; its transpose searches images by text
correct    (I, T)    true where a text fits an image; several may, in a row and in a column

Ties count against the ranking, so scores that are all equal find nothing.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RECALLS = (1, 5, 10)
NOT_A_CANDIDATE = 1e4  # taken off the scores of what is not re-ranked; keeps their order below all candidates
_ARTICLES = re.compile(r"^(?:an?|the|some) ")


def same_text(text: str) -> str:
    """What two captions share that no picture could tell apart: "A cat." and "cat" give "cat"."""
    plain = " ".join(text.casefold().split()).strip(' .!"“”')
    return _ARTICLES.sub("", plain) or plain


def correct_pairs(image_texts: Sequence[Sequence[str]], texts: Sequence[str]) -> Tensor:
    """(I, T) bool: whether a text is one of the image's own, up to `same_text`."""
    own = [{same_text(text) for text in row} for row in image_texts]
    keys = [same_text(text) for text in texts]
    return torch.tensor([[key in row for key in keys] for row in own], dtype=torch.bool).view(len(own), len(keys))


def best_ranks(scores: Tensor, correct: Tensor) -> Tensor:
    """Rank of each query's best correct candidate.

    Args:
        scores: (Q, C), higher is better.
        correct: (Q, C) bool, at least one true in a row.

    Returns:
        (Q,) long, 1 = first; wrong candidates of equal score stand before it.
    """
    best = scores.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)  # (Q, 1)
    return 1 + ((scores >= best) & ~correct).sum(dim=1)


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of the queries whose rank is at most k."""
    return float((ranks <= k).double().mean())


def recalls(scores: Tensor, correct: Tensor) -> dict[str, float]:
    """{"r1": ..., "r5": ..., "r10": ...}: recall at 1, 5 and 10; arguments as in `best_ranks`."""
    ranks = best_ranks(scores, correct)
    return {f"r{k}": recall_at(ranks, k) for k in RECALLS}


def chance_recall(correct: Tensor, k: int = 1) -> float:
    """Expected recall at k of a random order: 1 - (C - m choose k) / (C choose k), m correct ones of C, mean."""
    num_candidates = correct.shape[1]
    missed = [math.comb(num_candidates - m, k) / math.comb(num_candidates, k) for m in correct.sum(dim=1).tolist()]
    return 1 - sum(missed) / len(missed)


@dataclass(frozen=True)
class Candidates:
    """Which pairs are matched: (I, T) bool each.

    Attributes:
        by_image: the text is among the image's best.
        by_text: the image is among the text's best; None where only images search.
    """

    by_image: Tensor
    by_text: Tensor | None

    @property
    def pairs(self) -> Tensor:
        """Numbers (P, 2) of images and texts, ordered by image; a candidate in both directions stands here once."""
        chosen = self.by_image if self.by_text is None else self.by_image | self.by_text
        return chosen.nonzero()


@dataclass(frozen=True)
class Reranked:
    """Scores after re-ranking, one matrix a direction, since each direction has its own candidates.

    Attributes:
        image_to_text: (I, T).
        text_to_image: (T, I), None where only images searched.
    """

    image_to_text: Tensor
    text_to_image: Tensor | None


def best_candidates(similarity: Tensor, k: int, *, both_ways: bool = True) -> Candidates:
    """Each query's k most similar candidates.

    Args:
        similarity: (I, T) ITC cosines.
        k: candidates of a query (paper: 128 of 5,000).
        both_ways: let texts search images too.
    """
    return Candidates(_is_among_best(similarity, k), _is_among_best(similarity.T, k).T if both_ways else None)


def rerank(similarity: Tensor, candidates: Candidates, match_scores: Tensor) -> Reranked:
    """Orders each query's candidates by similarity + match score. Two pairs of scales make sense:

        the original code's    ITC cosine                  + ITM positive logit
        that of the odds       ITC cosine / temperature    + ITM positive logit - ITM negative logit

    ITM's negatives are drawn from the softmax of ITC's similarities / temperature. So what it learns is by how much a
    pair is likelier than that softmax says, and the sum of the logarithms is the log-probability of the pair. (With
    cosines alone a matching head that is hardly trained undoes what contrast has found.) A head that is surer of new
    pictures than it is right gets a weight below 1 (`match_weight` of a model's settings).

    Args:
        similarity: (I, T), on the scale of the match scores.
        candidates: from `best_candidates`.
        match_scores: (P,), of `candidates.pairs`.

    Returns:
        Scores in which every candidate stands above what is none; those keep the order of their similarities.
    """
    pairs = candidates.pairs
    added = torch.zeros_like(similarity)
    added[pairs[:, 0], pairs[:, 1]] = match_scores.to(added)
    matched, others = similarity + added, similarity - NOT_A_CANDIDATE
    by_text = candidates.by_text
    text_to_image = torch.where(by_text, matched, others).T if by_text is not None else None
    return Reranked(torch.where(candidates.by_image, matched, others), text_to_image)


def _is_among_best(scores: Tensor, k: int) -> Tensor:
    """(Q, C) bool: the k best of each row; of equal ones those further left."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
