"""Guesses change how soon a text is there, never the text: right, wrong, too many, past its end, or none at all."""

import pytest
import torch

from blip2.model.drafting import Drafter
from blip2.model.writing import Decoding, Writer, write

from .test_writing import (
    JOINING,
    NUM_ROWS,
    STOP,
    _llama,
    _mistral,
    _t5,
    alone,
    make_language_model,
    make_prompts,
    up_to_the_end,
)

DECODERS = [make for make in JOINING if make is not _t5]
WAYS = {"greedy": {}, "at least nine": {"min_new_tokens": 9}}
LONGEST = 12
OTHER = 7  # a token that the right one is moved by


class Guesses:
    """Says what a function makes of the rest of the right text; counts how often it is asked."""

    def __init__(self, make_up):
        self.make_up, self.text, self.num_asked = make_up, [], 0

    def draft(self, reading, token_id, *, most, stop_ids, num_without_stop):
        self.num_asked += 1
        done = LONGEST - most
        assert token_id == self.text[done - 1] and num_without_stop <= most
        return self.make_up(self.text[done:])


def wrong(tokens):
    return [(token + OTHER) % 60 for token in tokens]


KINDS = {
    "right": lambda rest: rest[:4],
    "right to the end": lambda rest: rest,
    "wrong from the first": lambda rest: wrong(rest[:4]),
    "the second wrong": lambda rest: rest[:1] + wrong(rest[1:2]) + rest[2:5],
    "longer than the text": lambda rest: [*rest, 5, 6, STOP[0], 8, 9, 10, 11, 12, 13, 14, 15, 16, 17],
    "ended too soon": lambda rest: [*rest[:1], STOP[0], *rest[2:]],
    "nothing but stops": lambda rest: [STOP[1]] * 3,
    "none": lambda rest: [],
    "some, or none": lambda rest: rest[:3] if len(rest) % 2 else [],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", DECODERS)
def test_whatever_is_guessed_the_text_is_the_same(make, kind, way):
    language_model = make_language_model(make)
    prompts = make_prompts(language_model)
    decoding = Decoding(max_new_tokens=LONGEST, **WAYS[way])
    passes = []
    language_model.model.register_forward_hook(lambda *_: passes.append(1))
    lengths = set()
    for row in range(NUM_ROWS):
        given = alone(prompts, row, language_model)
        language_model.drafter = None
        text = up_to_the_end(write(language_model, *language_model.start(*given), decoding)[0])
        language_model.drafter = guesses = Guesses(KINDS[kind])
        guesses.text = text
        passes.clear()
        assert write(language_model, *language_model.start(*given), decoding)[0].tolist() == text
        lengths.add(len(text))
        if kind == "right to the end":
            assert len(passes) == (2 if len(text) > 1 else 1)
        elif kind == "right":  # a pass is worth five tokens: one of its own and four guesses
            assert len(passes) == 1 + -(-(len(text) - 1) // 5)
        elif kind in ("wrong from the first", "none"):
            assert len(passes) == len(text)
    assert len(lengths) > 1 or way != "greedy"


@pytest.mark.parametrize("make", DECODERS)
def test_who_joins_a_guessed_row_changes_nothing(make):
    language_model = make_language_model(make)
    prompts = make_prompts(language_model)
    ways = [Decoding(max_new_tokens=count, min_new_tokens=count) for count in (LONGEST, LONGEST - 2)]
    texts = []
    for row in (0, 1):
        started = language_model.start(*alone(prompts, row, language_model))
        texts.append(write(language_model, *started, ways[row])[0].tolist())
    language_model.drafter = guesses = Guesses(KINDS["the second wrong"])
    guesses.text = texts[0]
    writer = Writer(language_model)
    with torch.no_grad():
        (first,) = writer.add(*language_model.start(*alone(prompts, 0, language_model)), ways[:1])
        writer.step()
        assert first.token_ids == texts[0][:2]  # its own choice and the first guess
        (second,) = writer.add(*language_model.start(*alone(prompts, 1, language_model)), ways[1:])
        while writer.rows:
            writer.step()
    assert [first.token_ids, second.token_ids] == texts
    assert guesses.num_asked == 1  # two rows are not guessed


def test_a_row_that_is_left_over_from_a_batch_is_guessed_behind_its_padding():
    language_model = make_language_model(_llama)
    prompts = make_prompts(language_model)
    ways = [Decoding(max_new_tokens=2)] * (NUM_ROWS - 1) + [Decoding(max_new_tokens=LONGEST, min_new_tokens=LONGEST)]
    last = alone(prompts, NUM_ROWS - 1, language_model)
    text = write(language_model, *language_model.start(*last), ways[-1])[0].tolist()
    language_model.drafter = guesses = Guesses(KINDS["the second wrong"])
    guesses.text = text
    writer = Writer(language_model)
    with torch.no_grad():
        rows = writer.add(*language_model.start(*prompts), ways)
        while writer.rows:
            writer.step()
    assert rows[-1].token_ids == text
    assert guesses.num_asked > 2


def test_a_guessed_row_leaves_when_it_is_cancelled():
    language_model = make_language_model(_llama)
    given = alone(make_prompts(language_model), 0, language_model)
    decoding = Decoding(max_new_tokens=LONGEST, min_new_tokens=LONGEST)
    text = write(language_model, *language_model.start(*given), decoding)[0].tolist()
    language_model.drafter = guesses = Guesses(KINDS["right"])
    guesses.text = text
    writer = Writer(language_model)
    with torch.no_grad():
        (row,) = writer.add(*language_model.start(*given), [decoding])
        written, done = writer.step()
        assert written == [row] and done == [] and row.token_ids == text[:5]
        row.is_cancelled = True
        assert writer.step() == ([], [])


@pytest.mark.parametrize(
    ("make", "options"),
    [(_llama, {"do_sample": True}), (_llama, {"repetition_penalty": 1.3}), (_llama, {"num_beams": 3}), (_mistral, {})],
)
def test_nobody_guesses_where_the_likeliest_word_is_not_what_is_written(make, options):
    """Nor where the keys and values are those of a window, which cannot be taken back."""
    language_model = make_language_model(make)
    language_model.drafter = guesses = Guesses(KINDS["none"])
    given = alone(make_prompts(language_model), 0, language_model)
    write(language_model, *language_model.start(*given), Decoding(max_new_tokens=4, **options))
    assert guesses.num_asked == 0


@pytest.mark.parametrize("make", [_llama, _mistral, _t5])
def test_who_cannot_be_copied_is_not(make):
    """The Llama is 16 wide here, and a group of weights is 32."""
    assert not Drafter.can_take(make_language_model(make).model)
