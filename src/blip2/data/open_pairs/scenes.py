"""Scenes of one to four cut-outs on a ground, with captions and questions that follow from where they were put.

    cut-outs by noun -> compose(number) -> Scene (things with boxes) -> picture, captions, questions

Nothing is labelled by a model: every caption and answer is read off the placement. Colours are measured on the pixels
and asked only where one colour covers most of a thing; relations only where things are well apart along one axis.
"""

import colorsys
import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from blip2.data.open_pairs.picture import encoded
from blip2.data.open_pairs.vocabulary import plural, with_article
from blip2.data.sample import Question, Sample

SIDE = 256
GAP = 4  # pixels between boxes
NUMBERS = ("zero", "one", "two", "three", "four")
COLOUR_SHARE = 0.55  # of a thing's pixels, for its colour to be asked
MOST_QUESTIONS = 8
UNCLEAR = "unclear"  # between two colour names; never asked
HUES = (
    (0, 12, "red"),
    (18, 34, "orange"),
    (43, 62, "yellow"),
    (75, 160, "green"),
    (190, 245, "blue"),
    (258, 310, "purple"),
    (318, 345, "pink"),
    (350, 360, "red"),
)  # degrees from, to; what lies between two names is never asked: gold, teal, indigo, crimson
RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
SEVERAL_COLOURS = {"zebra", "skunk", "necktie", "tractor", "eye"}  # one covers most, yet does not tell its colour
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class CutOut:
    """A thing's picture with its measured colour, None where no colour covers most of it."""

    image: Image.Image
    colour: str | None
    style: str


@dataclass(frozen=True)
class Thing:
    """A cut-out put into a scene; the box is (left, top, right, bottom) in pixels."""

    noun: str
    colour: str | None
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A composed picture and what is in it."""

    image: Image.Image
    things: tuple[Thing, ...]


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether two nouns never meet in training: one pair in ten, by hash."""
    pair = "+".join(sorted((first, second)))
    return int(hashlib.sha256(pair.encode()).hexdigest(), 16) % 10 == 0


def has_held_out_pair(nouns: Sequence[str]) -> bool:
    """Whether any two different nouns are a held-out pair."""
    different = sorted(set(nouns))
    return any(is_held_out_pair(a, b) for i, a in enumerate(different) for b in different[i + 1 :])


def scene_sample(split: str, number: int, seed: int, cutouts: Mapping[str, Sequence[CutOut]]) -> Sample:
    """Scene `number` of a split: the same for the same seed, whatever was made before.

    Args:
        split: new_noun_pairs has a held-out pair of nouns in every scene, all other splits have none.
    """
    rng = random.Random(f"{seed}:{split}:{number}")
    scene = compose(rng, cutouts, with_new_pair=split == "new_noun_pairs")
    nouns = sorted(cutouts)
    return Sample(
        id=f"{split}/{number:05d}",
        image=encoded(scene.image),
        captions=captions_of(scene.things, rng),
        questions=questions_of(scene.things, nouns, rng),
        source="scenes",
        style="scene",
        licence="GPL-2.0 AND MIT AND OFL-1.1",
    )


# Composing


def compose(rng: random.Random, cutouts: Mapping[str, Sequence[CutOut]], *, with_new_pair: bool) -> Scene:
    """A scene of one to four things; tries again until they fit and the rule on pairs holds."""
    nouns = sorted(cutouts)
    while True:
        chosen = _choose_nouns(rng, nouns, with_new_pair)
        if has_held_out_pair(chosen) != with_new_pair:
            continue
        canvas = _ground(rng)
        things = _place(rng, canvas, chosen, cutouts)
        if things is not None:
            return Scene(canvas, things)


def _choose_nouns(rng: random.Random, nouns: Sequence[str], with_new_pair: bool) -> list[str]:
    count = rng.choice((2, 2, 3, 3, 4)) if with_new_pair else rng.choice((1, 2, 2, 2, 3, 3, 4))
    if count > 1 and rng.random() < 0.4:  # several of one kind, alone or beside others
        copies = rng.randint(2, count)
        if with_new_pair and copies == count:
            copies -= 1
        rest = count - copies
        return [rng.choice(nouns)] * copies + rng.sample(nouns, rest)
    return rng.sample(nouns, count)


def _place(
    rng: random.Random, canvas: Image.Image, nouns: Sequence[str], cutouts: Mapping[str, Sequence[CutOut]]
) -> tuple[Thing, ...] | None:
    """Pastes the things where they do not overlap; None if no room was found."""
    largest = {1: 190, 2: 125, 3: 110, 4: 100}[len(nouns)]
    picked = {noun: rng.choice(cutouts[noun]) for noun in sorted(set(nouns))}  # copies of a noun look alike
    things: list[Thing] = []
    for noun in nouns:
        cutout = picked[noun]
        size = rng.uniform(0.7, 1.0) * largest
        scale = size / max(cutout.image.size)
        width, height = (max(1, round(side * scale)) for side in cutout.image.size)
        box = _free_box(rng, width, height, [thing.box for thing in things])
        if box is None:
            return None
        image = cutout.image.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(image, box[:2], image)
        things.append(Thing(noun, cutout.colour, box))
    return tuple(things)


def _free_box(
    rng: random.Random, width: int, height: int, taken: Sequence[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    for _ in range(40):
        left, top = rng.randint(2, SIDE - width - 2), rng.randint(2, SIDE - height - 2)
        box = (left, top, left + width, top + height)
        if all(_apart(box, other) for other in taken):
            return box
    return None


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]


def _ground(rng: random.Random) -> Image.Image:
    """White, a pale colour, a slope between two, or a horizon."""

    def pale() -> tuple[int, int, int]:
        return tuple(rng.randint(200, 255) for _ in range(3))  # type: ignore[return-value]

    kind = rng.random()
    if kind < 0.25:
        return Image.new("RGB", (SIDE, SIDE), "white")
    first, second = pale(), pale()
    canvas = Image.new("RGB", (SIDE, SIDE), first)
    if kind < 0.5:
        return canvas
    if kind < 0.75:
        ImageDraw.Draw(canvas).rectangle((0, rng.randint(100, 220), SIDE, SIDE), fill=second)
        return canvas
    slope = Image.linear_gradient("L").resize((SIDE, SIDE))
    if rng.random() < 0.5:
        slope = slope.transpose(Image.Transpose.ROTATE_90)
    return Image.composite(Image.new("RGB", (SIDE, SIDE), second), canvas, slope)


# Saying what is there


def relation(thing: Thing, other: Thing) -> str | None:
    """How `thing` lies to `other` where that is beyond doubt: apart along one axis and mostly level along the other."""
    left, top, right, bottom = thing.box
    other_left, other_top, other_right, other_bottom = other.box
    level = abs((top + bottom) - (other_top + other_bottom)) / 2 < 0.5 * min(bottom - top, other_bottom - other_top)
    upright = abs((left + right) - (other_left + other_right)) / 2 < 0.5 * min(right - left, other_right - other_left)
    if level and not upright:
        return "left" if right <= other_left else "right" if left >= other_right else None
    if upright and not level:
        return "above" if bottom <= other_top else "below" if top >= other_bottom else None
    return None


def captions_of(things: Sequence[Thing], rng: random.Random) -> tuple[str, ...]:
    """One caption that lists what is there, and one that tells how two things lie where that is clear."""
    counts = Counter(thing.noun for thing in things)
    named = [f"{NUMBERS[n]} {plural(noun)}" if n > 1 else with_article(noun) for noun, n in counts.items()]
    rng.shuffle(named)
    captions = [named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"]
    single = [thing for thing in things if counts[thing.noun] == 1]
    pairs = [(a, b, how) for a in single for b in single if a is not b and (how := relation(a, b))]
    if pairs:
        first, second, how = rng.choice(pairs)
        captions.append(f"{_described(first)} {RELATIONS[how]} {_described(second)}")
    return tuple(captions)


def _described(thing: Thing) -> str:
    if thing.colour is None:
        return with_article(thing.noun)
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.noun}"


def questions_of(things: Sequence[Thing], nouns: Sequence[str], rng: random.Random) -> tuple[Question, ...]:
    """Up to MOST_QUESTIONS questions with one right answer each; yes and no are equally frequent."""
    counts = Counter(thing.noun for thing in things)
    single = [thing for thing in things if counts[thing.noun] == 1]
    asked = [
        *_what(things, counts),
        *_how_many(things, counts, rng),
        *_colours(single),
        *_relations(things, single, rng),
    ]
    asked += _exists(counts, nouns, rng)
    rng.shuffle(asked)
    return tuple(asked[:MOST_QUESTIONS])


def _what(things: Sequence[Thing], counts: Counter) -> list[Question]:
    if len(counts) > 1:
        return []
    noun, number = things[0].noun, len(things)
    answer = noun if number == 1 else plural(noun)
    return [Question("What is in the picture?" if number == 1 else "What are these?", answer, "what")]


def _how_many(things: Sequence[Thing], counts: Counter, rng: random.Random) -> list[Question]:
    noun = rng.choice(sorted(counts))
    asked = [Question(f"How many {plural(noun)} are there?", NUMBERS[counts[noun]], "count")]
    if rng.random() < 0.5:
        asked.append(Question("How many things are there?", NUMBERS[len(things)], "count"))
    return asked


def _colours(single: Sequence[Thing]) -> list[Question]:
    return [Question(f"What colour is the {t.noun}?", t.colour, "colour") for t in single if t.colour][:2]


def _relations(things: Sequence[Thing], single: Sequence[Thing], rng: random.Random) -> list[Question]:
    """What lies beside a thing, where exactly one thing could be meant; and yes-no questions on clear pairs."""
    asked = []
    for thing in single:
        for how, words in RELATIONS.items():
            beside = [other for other in things if other is not thing and _could_be(other, thing, how)]
            if len(beside) == 1 and relation(beside[0], thing) == how:
                asked.append(Question(f"What is {words} the {thing.noun}?", beside[0].noun, how))
    rng.shuffle(asked)
    pairs = [(a, b, how) for a in single for b in single if a is not b and (how := relation(a, b))]
    if pairs:
        first, second, how = rng.choice(pairs)
        is_so = rng.random() < 0.5
        claimed = how if is_so else OPPOSITE[how]
        question = f"Is the {first.noun} {RELATIONS[claimed]} the {second.noun}?"
        asked = [*asked[:3], Question(question, "yes" if is_so else "no", "relation")]
    return asked


def _could_be(thing: Thing, other: Thing, how: str) -> bool:
    """Whether somebody might say that `thing` lies on that side of `other`: its centre does."""
    middle_x, middle_y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
    left, top, right, bottom = other.box
    return {"left": middle_x < left, "right": middle_x > right, "above": middle_y < top, "below": middle_y > bottom}[
        how
    ]


def _exists(counts: Counter, nouns: Sequence[str], rng: random.Random) -> list[Question]:
    present = rng.random() < 0.5
    noun = rng.choice(sorted(counts)) if present else rng.choice([n for n in rng.sample(nouns, 8) if n not in counts])
    return [Question(f"Is there {with_article(noun)}?", "yes" if present else "no", "exists")]


# Measuring colour


def measured_colour(cutout: Image.Image) -> str | None:
    """The colour that covers at least COLOUR_SHARE of the opaque pixels, if one does."""
    small = cutout.resize((24, 24), Image.Resampling.BOX)
    pixels = [small.getpixel((x, y)) for x in range(24) for y in range(24)]
    names = Counter(_colour_name(r, g, b) for r, g, b, a in pixels if a > 128)  # type: ignore[misc]
    if not names:
        return None
    name, count = names.most_common(1)[0]
    return name if name != UNCLEAR and count >= COLOUR_SHARE * names.total() else None


def _colour_name(red: int, green: int, blue: int) -> str:
    """The name of a colour that nobody would dispute, else UNCLEAR. Bounds were set by eye on all cut-outs."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value < 0.28 or (value < 0.33 and saturation < 0.3):
        return "black"
    if saturation < 0.12:
        return "white" if value > 0.87 else "grey" if 0.36 < value < 0.78 else UNCLEAR
    degrees = hue * 360
    if value < 0.72 and 0.3 < saturation < 0.8 and 4 < degrees < 40:
        return "brown"
    if saturation < 0.4:
        return UNCLEAR  # steel, lavender, beige
    name = next((name for low, high, name in HUES if low <= degrees < high), UNCLEAR)
    if name == "orange" and value < 0.72:
        return UNCLEAR
    if name == "red" and saturation < 0.65:
        return "pink" if degrees < 6 or degrees >= 350 else UNCLEAR  # salmon
    if name == "orange" and saturation < 0.68:
        return UNCLEAR  # skin, cardboard
    if name == "pink" and degrees > 333 and saturation > 0.75:
        return UNCLEAR  # crimson
    return name if value > 0.45 else UNCLEAR
