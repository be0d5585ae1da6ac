"""A sample: one picture with what is said and asked of it. The one type that all readers yield."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        question: ends with a question mark.
        answer: in words, lower case.
        kind: what, count, colour, left, right, above, below, exists, relation, shape, ...
    """

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Sample:
    """One picture.

    Attributes:
        id: unique in its data set.
        image: bytes of the file.
        captions: at least one, unless there are questions.
        questions: what is asked of it.
        tags: further words that fit it.
        source: where it comes from, such as stamps.
        style: how it is drawn, such as fluent-3d.
        concept: what it shows, the same word over all sources; "" for a scene.
        licence: SPDX name or plain words.
    """

    id: str
    image: bytes
    captions: tuple[str, ...]
    questions: tuple[Question, ...] = ()
    tags: tuple[str, ...] = ()
    source: str = ""
    style: str = ""
    concept: str = ""
    licence: str = ""
