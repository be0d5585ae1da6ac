"""The rules of VQA accuracy on worked examples."""

import itertools

import pytest

from blip2.data.sample import Question
from blip2.evaluation.vqa import Answered, AnswerPrior, accuracy, accuracy_by_kind, is_right, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Red", "red"),
        ("  two\n red  cars. ", "2 red cars"),
        ("a cat", "cat"),
        ("The dog and an owl", "dog and owl"),
        ("none", "0"),
        ("ten", "10"),
        ("dont know", "don't know"),
        ("10 o’clock", "10 o'clock"),
        ("red, white, blue", "red white blue"),  # a comma beside a space goes
        ("red/blue", "red blue"),  # a slash between words parts them
        ("1,000", "1000"),  # a comma in a number goes
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("the", ""),
        ("", ""),
    ],
)
def test_answers_are_compared_in_their_normal_form(answer, normal):
    assert normalise(answer) == normal


def test_normalising_twice_changes_nothing():
    for answer in ("Two  red cars.", "the 1,000 o’clock, dont!", "U.S.A.", "can’t - won't"):
        assert normalise(normalise(answer)) == normalise(answer)


def test_number_words_and_digits_are_one_answer():
    assert is_right("3", "three") and is_right("Three.", "3") and not is_right("two", "three")


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_people_give_the_published_accuracies(agreeing, expected):
    people = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    assert vqa_accuracy("Red", people) == pytest.approx(expected)


def test_leaving_one_out_equals_averaging_over_all_nines():
    people = ["one", "1", "two", "a 1", "none", "0", "one", "3", "2", "4"]
    nines = list(itertools.combinations(people, 9))
    plain = sum(min(1, sum(is_right("1", person) for person in nine) / 3) for nine in nines) / len(nines)
    assert vqa_accuracy("1", people) == pytest.approx(plain)


def test_accuracy_is_told_by_kind():
    rows = [
        Answered(Question("What colour?", "red", "colour"), "Red."),
        Answered(Question("What colour?", "red", "colour"), "blue"),
        Answered(Question("How many?", "two", "count"), "2"),
    ]
    assert accuracy(rows) == pytest.approx(2 / 3)
    assert accuracy_by_kind(rows) == {"colour": 0.5, "count": 1.0}


def test_the_prior_answers_by_question_then_kind_then_all():
    prior = AnswerPrior(
        [
            Question("Is there a cat?", "yes", "exists"),
            Question("Is there a dog?", "no", "exists"),
            Question("Is there an owl?", "no", "exists"),
            Question("How many dogs are there?", "two", "count"),
            Question("How many cats are there?", "two", "count"),
            Question("How many owls are there?", "two", "count"),
        ]
    )
    assert prior.answer(Question("is there the cat", "?", "exists")) == "yes"
    assert prior.answer(Question("Is there a cow?", "?", "exists")) == "no"
    assert prior.answer(Question("What colour is it?", "?", "colour")) == prior.majority == "two"


def test_of_equally_frequent_answers_the_first_in_the_alphabet_is_taken():
    questions = [Question("q?", answer, "k") for answer in ("red", "blue")]
    assert AnswerPrior(questions).majority == AnswerPrior(questions[::-1]).majority == "blue"
