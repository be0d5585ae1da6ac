"""Metrics of captions: BLEU-1 to 4, ROUGE-L and CIDEr-D as the COCO evaluation defines them; pure functions.

Every function takes the candidates, one text a picture, and the references, several texts a picture. Words are lower
case without punctuation (COCO's own tokenizer is a Java program; on plain sentences they agree).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

LONGEST = 4  # n-grams of 1 to 4 words
CIDER_SIGMA = 6.0  # how far the lengths may differ
ROUGE_BETA = 1.2  # weight of recall over precision
_WORD = re.compile(r"\w+(?:['.-]\w+)*")
References = Sequence[Sequence[str]]
NGram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a text, lower case; inner apostrophes, points and hyphens stay."""
    return _WORD.findall(text.lower().replace("’", "'"))


def ngrams(tokens: Sequence[str], n: int) -> Counter[NGram]:
    """How often each run of n words occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(candidates: Sequence[str], references: References) -> list[float]:
    """Corpus BLEU-1 to BLEU-4: clipped n-gram precision, geometric mean, brevity against the closest reference length.

    A precision of zero makes its BLEU zero (the COCO script adds 1e-15 to the counts, which shows in no printed digit).
    """
    found, possible = np.zeros(LONGEST), np.zeros(LONGEST)
    length = reference_length = 0
    for candidate, texts in zip(candidates, references, strict=True):
        said, told = words(candidate), [words(text) for text in texts]
        length += len(said)
        reference_length += min((abs(len(text) - len(said)), len(text)) for text in told)[1]
        for n in range(1, LONGEST + 1):
            most = Counter[NGram]()
            for text in told:
                most |= ngrams(text, n)
            counts = ngrams(said, n)
            found[n - 1] += (counts & most).total()
            possible[n - 1] += counts.total()
    brevity = 1.0 if length >= reference_length else math.exp(1 - reference_length / max(length, 1))
    precisions = [f / p if p else 0.0 for f, p in zip(found, possible, strict=True)]
    return [brevity * float(np.prod(precisions[:n]) ** (1 / n)) for n in range(1, LONGEST + 1)]


def rouge_l(candidates: Sequence[str], references: References) -> float:
    """ROUGE-L: F-measure (beta 1.2) of longest common subsequences; best precision, best recall of the references."""
    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        said, told = words(candidate), [words(text) for text in texts]
        common = [_longest_common(said, text) for text in told]
        precision = max(common) / len(said) if said else 0.0
        recall = max(c / len(text) if text else 0.0 for c, text in zip(common, told, strict=True))
        weighted = recall + ROUGE_BETA**2 * precision
        scores.append((1 + ROUGE_BETA**2) * precision * recall / weighted if weighted else 0.0)
    return sum(scores) / len(scores)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def cider_d(candidates: Sequence[str], references: References) -> float:
    """CIDEr-D, mean over pictures, 0 to 10: tf-idf cosine of the n-grams, clipped, with a penalty on unequal lengths.

    Document frequencies come from these references. One-word references have no longer n-grams, so 2.5 is the most
    they can reach.
    """
    told = [[_counts(words(text)) for text in texts] for texts in references]
    document_frequency = Counter(ngram for texts in told for ngram in {key for text in texts for key in text})
    log_pictures = math.log(len(references))

    def weights(counts: Counter[NGram]) -> dict[NGram, float]:
        return {
            ngram: tf * (log_pictures - math.log(max(1, document_frequency[ngram]))) for ngram, tf in counts.items()
        }

    scores = []
    for candidate, texts in zip(candidates, told, strict=True):
        counts = _counts(words(candidate))
        said = weights(counts)
        pairs = [_cider_pair(said, weights(text), _num_words(counts) - _num_words(text)) for text in texts]
        scores.append(10 * sum(pairs) / len(pairs))
    return sum(scores) / len(scores)


def _counts(tokens: Sequence[str]) -> Counter[NGram]:
    """All n-grams of 1 to 4 words."""
    return sum((ngrams(tokens, n) for n in range(1, LONGEST + 1)), Counter[NGram]())


def _num_words(counts: Counter[NGram]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _cider_pair(said: dict[NGram, float], told: dict[NGram, float], length_difference: int) -> float:
    """Similarity of one candidate and one reference, mean over the four lengths of n-grams."""
    total = 0.0
    for n in range(1, LONGEST + 1):
        mine = {ngram: weight for ngram, weight in said.items() if len(ngram) == n}
        yours = {ngram: weight for ngram, weight in told.items() if len(ngram) == n}
        norms = math.hypot(*mine.values()) * math.hypot(*yours.values())
        if norms:
            total += sum(min(w, yours.get(ngram, 0.0)) * yours.get(ngram, 0.0) for ngram, w in mine.items()) / norms
    return total / LONGEST * math.exp(-(length_difference**2) / (2 * CIDER_SIGMA**2))
