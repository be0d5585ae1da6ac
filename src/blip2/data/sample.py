"""A sample: one picture with what is said and asked of it. The one type that all readers yield."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        question: ends with a question mark.
        answer: the most frequent one, in words, lower case; "" where the data set keeps it to itself.
        kind: what, count, colour, left, right, above, below, exists, relation, shape, ...; "" where none is known.
        answers: what each of several people said, where several were asked; who is repeated weighs more.
        choices: what there was to choose from, where the question is multiple choice.
        id: the data set's own number, such as VQAv2's question_id.
    """

    question: str
    answer: str
    kind: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    id: str = ""


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
