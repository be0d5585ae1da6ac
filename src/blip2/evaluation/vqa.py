"""Accuracy of visual question answering: VQAv2's rules for what counts as the same answer, and its ten-person accuracy.

The published rules, in their order: lower case, punctuation (dropped beside a space or in a number, else a space),
number words to digits, articles dropped, apostrophes put back ("dont" -> "don't"). The official script normalises only
where the annotators disagree; here both sides always are.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blip2.data.sample import Question

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD_OF_NO_DECIMAL = re.compile(r"\.(?!\d)")
_WITH_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm "
    "i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't she's "
    "should've shouldn't somebody's someone's something's that'd that's there'd there're there's they'd they'll "
    "they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd "
    "who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
_CONTRACTIONS = {written.replace("'", ""): written for written in _WITH_APOSTROPHE.split()}


def normalise(answer: str) -> str:
    """The answer in the form in which answers are compared: "Two  red cars." -> "2 red cars"."""
    text = _without_punctuation(" ".join(answer.replace("’", "'").split())).lower()
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    has_comma_number = _NUMBER_WITH_COMMA.search(text) is not None
    without = text
    for mark in _PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text or has_comma_number
        without = without.replace(mark, "" if is_loose else " ")
    return _PERIOD_OF_NO_DECIMAL.sub("", without)


def is_right(given: str, expected: str) -> bool:
    """Exact match after `normalise`."""
    return normalise(given) == normalise(expected)


def vqa_accuracy(given: str, annotated: Sequence[str]) -> float:
    """VQAv2's accuracy: min(1, others who said so / 3), averaged over leaving out each annotator.

    Args:
        given: the model's answer.
        annotated: what the (ten) people answered.
    """
    answer = normalise(given)
    agrees = [normalise(person) == answer for person in annotated]
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(agrees)


@dataclass(frozen=True)
class Answered:
    """A question with what was said."""

    question: Question
    given: str

    @property
    def is_right(self) -> bool:
        """Whether what was said is the expected answer."""
        return is_right(self.given, self.question.answer)


def accuracy(answered: Sequence[Answered]) -> float:
    """Share answered right."""
    return sum(row.is_right for row in answered) / len(answered)


def accuracy_by_kind(answered: Sequence[Answered]) -> dict[str, float]:
    """Share answered right of each kind of question, kinds in alphabetical order."""
    kinds: dict[str, list[Answered]] = defaultdict(list)
    for row in answered:
        kinds[row.question.kind].append(row)
    return {kind: accuracy(kinds[kind]) for kind in sorted(kinds)}


class AnswerPrior:
    """What answering without looking can reach, learnt from the training questions.

    Attributes:
        majority: the most frequent answer of all.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        """Counts the answers; of equally frequent ones the first in the alphabet is taken."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for asked in questions:
            for scope in ("", f"kind {asked.kind}", f"question {normalise(asked.question)}"):
                counts[scope][asked.answer] += 1
        self._best = {scope: min(found, key=lambda answer: (-found[answer], answer)) for scope, found in counts.items()}
        self.majority = self._best.get("", "")

    def answer(self, asked: Question) -> str:
        """The most frequent answer to the same question, else to its kind, else of all."""
        for scope in (f"question {normalise(asked.question)}", f"kind {asked.kind}"):
            if scope in self._best:
                return self._best[scope]
        return self.majority
