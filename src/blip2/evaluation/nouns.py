"""Does a caption name what the picture shows? The head noun of a label, and whether a caption says it.

    label                                head noun        because
    a red apple                          apple            the last word
    grinning face with big eyes          face             nothing counts from the first preposition on
    person playing handball              person           nor from the first -ing word that is not the first word
    flag: myanmar (burma)                myanmar          brackets go; after a colon all words count, since "flag"
    family: woman, girl                  woman girl           would name 258 pictures
    woman’s hat, bow and arrow           hat, bow         a possessive is no noun; of "x and y" the first counts

The caption must hold the head noun, or the words of the whole label, side by side; singular and plural are one, and so
are numbers and their digits. The rule is lenient where labels share a noun ("sad face", "happy face"): exact matches of
the whole label are to be reported beside it.
"""

import re
from collections.abc import Sequence

from blip2.evaluation.captions import words
from blip2.evaluation.vqa import NUMBERS

ARTICLES = {"a", "an", "the", "some", "no"}
_ENDS = "with without of in on at for from to over under behind beside by and or & who that"
_THINGS = (
    "building clothing dumpling earring evening king lightning morning painting pudding railing ring sling spring "
    "string swing wing"
)
ENDS_NOUN = frozenset(_ENDS.split())
NOUNS_IN_ING = frozenset(_THINGS.split())
IRREGULAR = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
}
_BRACKETS = re.compile(r"\([^)]*\)")
_DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)}


def head_noun(label: str) -> tuple[str, ...]:
    """The word or words of a label that a caption has to say; see the table above."""
    _, colon, after = _BRACKETS.sub(" ", label).partition(":")
    if colon and words(after):
        return tuple(words(after))
    told = [word for word in _BRACKETS.sub(" ", label.lower()).replace("’", "'").split() if word not in ARTICLES]
    ends = (place for place, word in enumerate(told) if place and _ends_noun(word))
    phrase = told[: next(ends, len(told))]
    plain = words(" ".join(phrase))
    return tuple(plain[-1:] or words(label))


def _ends_noun(word: str) -> bool:
    return word in ENDS_NOUN or (word.endswith("ing") and word not in NOUNS_IN_ING)


def names(caption: str, label: str) -> bool:
    """Whether the caption says the label's head noun, or all of the label."""
    said = words(caption)
    return _holds(said, head_noun(label)) or _holds(said, words(label))


def says_exactly(caption: str, label: str) -> bool:
    """Whether the caption is the label, but for articles and punctuation."""
    said, told = ([word for word in words(text) if word not in ARTICLES] for text in (caption, label))
    return said == told


def _holds(said: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the wanted words stand side by side in what was said."""
    places = range(len(said) - len(wanted) + 1)
    return bool(wanted) and any(
        all(_is_same_word(a, b) for a, b in zip(said[i:], wanted, strict=False)) for i in places
    )


def _is_same_word(first: str, second: str) -> bool:
    first, second = _DIGITS.get(first, first), _DIGITS.get(second, second)
    return first == second or first in _plurals(second) or second in _plurals(first)


def _plurals(word: str) -> set[str]:
    """How the plural may be spelt."""
    spelt = {f"{word}s", f"{word}es", IRREGULAR.get(word, "")}
    if word.endswith("y"):
        spelt.add(f"{word[:-1]}ies")
    if word.endswith(("f", "fe")):
        spelt.add(f"{word.rstrip('e')[:-1]}ves")
    return spelt
