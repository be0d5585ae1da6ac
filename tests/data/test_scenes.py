"""What is said and asked of a composed scene agrees with where its things were put."""

import random
import re
from collections import Counter

import pytest
from PIL import Image, ImageDraw

from blip2.data.open_pairs import scenes
from blip2.data.open_pairs.scenes import (
    NUMBERS,
    SIDE,
    CutOut,
    Thing,
    captions_of,
    compose,
    has_held_out_pair,
    is_held_out_pair,
    measured_colour,
    questions_of,
    relation,
    scene_sample,
)
from blip2.data.open_pairs.vocabulary import plural, with_article

NOUNS = ("cat", "dog", "horse", "mouse", "sheep", "owl", "apple", "pear", "key", "bus", "chair", "knife", "fly", "egg")
PAINTS = ("red", "blue", "#FFB02E")  # the third, gold, lies between two names and must never be asked
MANY = 300


def disc(colour: str, size: tuple[int, int] = (60, 40)) -> Image.Image:
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((0, 0, size[0] - 1, size[1] - 1), fill=colour)
    return image


CUTOUTS = {
    noun: [CutOut(disc(paint), measured_colour(disc(paint)), "plain") for paint in PAINTS[: 1 + place % 3]]
    for place, noun in enumerate(NOUNS)
}


def composed(number: int, *, with_new_pair: bool = False) -> tuple[Thing, ...]:
    return compose(random.Random(f"test:{number}"), CUTOUTS, with_new_pair=with_new_pair).things


def asked_and_placed():
    for number in range(MANY):
        things = composed(number)
        for question in questions_of(things, NOUNS, random.Random(number)):
            yield question, things


def lies(thing: Thing, how: str, other: Thing) -> bool:
    """The plain meaning, written again: wholly on that side."""
    (left, top, right, bottom), (oleft, otop, oright, obottom) = thing.box, other.box
    return {"left": right <= oleft, "right": left >= oright, "above": bottom <= otop, "below": top >= obottom}[how]


def test_things_lie_inside_the_picture_and_apart():
    for number in range(MANY):
        things = composed(number)
        assert 1 <= len(things) <= 4
        for place, thing in enumerate(things):
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE
            for other in things[:place]:
                assert any(lies(thing, how, other) for how in scenes.RELATIONS)


def test_numbers_are_the_numbers_of_things():
    for question, things in asked_and_placed():
        if question.kind != "count":
            continue
        counts = Counter(plural(thing.noun) for thing in things) | Counter({"things": len(things)})
        what = re.fullmatch(r"How many (.+) are there\?", question.question)
        assert what and question.answer == NUMBERS[counts[what[1]]]


def test_what_lies_beside_a_thing_is_the_only_one_that_could_be_meant():
    seen = set()
    for question, things in asked_and_placed():
        if question.kind not in scenes.RELATIONS:
            continue
        seen.add(question.kind)
        words = re.fullmatch(rf"What is {scenes.RELATIONS[question.kind]} the (.+)\?", question.question)
        assert words
        (reference,) = [thing for thing in things if thing.noun == words[1]]
        beside = [thing for thing in things if lies(thing, question.kind, reference)]
        assert question.answer in [thing.noun for thing in beside]
        (named,) = [thing for thing in beside if relation(thing, reference) == question.kind]
        assert named.noun == question.answer
    assert seen == set(scenes.RELATIONS)


def test_yes_and_no_are_true():
    for question, things in asked_and_placed():
        nouns = [thing.noun for thing in things]
        if question.kind == "exists":
            (noun,) = [noun for noun in NOUNS if question.question == f"Is there {with_article(noun)}?"]
            assert question.answer == ("yes" if noun in nouns else "no")
        if question.kind == "relation":
            words = re.fullmatch(
                r"Is the (\w+) (to the left of|to the right of|above|below) the (\w+)\?", question.question
            )
            assert words
            (first,) = [thing for thing in things if thing.noun == words[1]]
            (second,) = [thing for thing in things if thing.noun == words[3]]
            how = next(name for name, phrase in scenes.RELATIONS.items() if phrase == words[2])
            assert question.answer == ("yes" if lies(first, how, second) else "no")


@pytest.mark.parametrize("kind", ["exists", "relation"])
def test_yes_and_no_are_equally_frequent(kind):
    answers = Counter(question.answer for question, _ in asked_and_placed() if question.kind == kind)
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] - answers["no"]) < 3 * answers.total() ** 0.5  # three standard deviations


def test_colours_are_the_measured_ones_of_single_things():
    asked = set()
    for question, things in asked_and_placed():
        if question.kind == "colour":
            noun = question.question.removeprefix("What colour is the ").rstrip("?")
            (thing,) = [thing for thing in things if thing.noun == noun]
            assert question.answer == thing.colour
            asked.add(question.answer)
    assert asked == {"red", "blue"}


def test_captions_name_what_is_there_and_no_more():
    for number in range(MANY):
        things = composed(number)
        caption = captions_of(things, random.Random(number))[0]
        counts = Counter(thing.noun for thing in things)
        expected = {f"{NUMBERS[n]} {plural(noun)}" if n > 1 else with_article(noun) for noun, n in counts.items()}
        assert set(re.split(r", | and ", caption)) == expected


def test_second_captions_tell_a_true_relation():
    told = 0
    for number in range(MANY):
        things = composed(number)
        for caption in captions_of(things, random.Random(number))[1:]:
            told += 1
            words = re.fullmatch(
                r"an? (?:\w+ )?(\w+) (to the left of|to the right of|above|below) an? (?:\w+ )?(\w+)", caption
            )
            assert words
            (first,) = [thing for thing in things if thing.noun == words[1]]
            (second,) = [thing for thing in things if thing.noun == words[3]]
            how = next(name for name, phrase in scenes.RELATIONS.items() if phrase == words[2])
            assert lies(first, how, second)
    assert told > MANY / 10


def test_held_out_pairs_of_nouns_meet_in_their_own_split_only():
    for number in range(MANY):
        assert not has_held_out_pair([thing.noun for thing in composed(number)])
        assert has_held_out_pair([thing.noun for thing in composed(number, with_new_pair=True)])


def test_a_tenth_of_the_pairs_is_held_out_whatever_their_order():
    words = [f"word{n}" for n in range(100)]
    pairs = [(a, b) for a in words for b in words if a < b]
    held = [is_held_out_pair(a, b) for a, b in pairs]
    assert held == [is_held_out_pair(b, a) for a, b in pairs]
    assert sum(held) / len(held) == pytest.approx(0.1, abs=0.013)  # three standard deviations of 4,950 draws


def test_a_scene_depends_on_its_own_number_only():
    alone = scene_sample("train_scenes", 5, 0, CUTOUTS)
    assert [scene_sample("train_scenes", number, 0, CUTOUTS) for number in (3, 4, 5)][-1] == alone
    others = [("train_scenes", 6, 0), ("new_scenes", 5, 0), ("train_scenes", 5, 1)]
    assert all(scene_sample(*task, CUTOUTS).image != alone.image for task in others)


@pytest.mark.parametrize(
    ("colour", "name"),
    [("#F8312F", "red"), ("#FF822D", "orange"), ("#FCD53F", "yellow"), ("#00D26A", "green"), ("#0074BA", "blue"),
     ("#0000FF", "blue"),
     ("#8D65C5", "purple"), ("#F70A8D", "pink"), ("#6D4534", "brown"), ("#A56953", "brown"), ("#212121", "black"),
     ("#FFFFFF", "white"), ("#9B9B9B", "grey"), ("#F3AD61", None), ("#FFB02E", None), ("#78909C", None),
     ("#CA0B4A", None), ("#635994", None)],
)  # fmt: skip
def test_colours_have_the_name_anybody_would_give_or_none(colour, name):
    """Paints of the emoji sets; beige, gold, steel, crimson and indigo are the ones people would argue about."""
    assert measured_colour(disc(colour)) == name


def test_two_colours_in_equal_parts_have_no_name():
    image = disc("red", (80, 80))
    image.paste(disc("blue", (80, 80)).crop((0, 0, 40, 80)), (0, 0))
    assert measured_colour(image) is None
    assert measured_colour(Image.new("RGBA", (10, 10), (0, 0, 0, 0))) is None
