"""Texts on their way out: however they come in pieces, what is given is what an oracle cuts from the whole."""

import asyncio
import random

import pytest

from blip2.server.texts import WrittenText


class Judge:
    """Refuses texts that hold `word`, and notes what it was shown."""

    def __init__(self, word):
        self.word, self.shown = word, []

    def refuses_request(self, texts, images):
        return None

    def refuses_reply(self, text):
        self.shown.append(text)
        return self.word in text.split()


class Reply:
    """What an engine would give."""

    def __init__(self, reason="stop"):
        self.reason, self.num_tokens, self.is_cancelled = reason, 0, False

    def cancel(self):
        self.is_cancelled = True


async def given(pieces, stops, judge=None, reason="stop"):
    """The pieces that come out, and why the text ended."""
    text, reply = WrittenText(), Reply(reason)

    def submit(deliver):
        for piece in [*pieces, None]:
            deliver(piece)
        return reply

    text.start(submit)
    found = [piece async for piece in text.pieces(stops, judge)]
    assert reply.is_cancelled  # whatever the end, the model writes no more
    return found, text.finish_reason


def cut(text, stops):
    """The oracle: the text before the place where first a stop text begins."""
    return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)


def in_pieces(text, chance):
    places = sorted(chance.sample(range(1, len(text)), chance.randrange(len(text)))) if len(text) > 1 else []
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def test_stop_texts_cut_where_an_oracle_cuts_however_the_text_is_parted():
    async def check():
        chance = random.Random(0)
        for _ in range(3000):
            text = "".join(chance.choices("ab ", k=chance.randrange(1, 14)))
            stops = ["".join(chance.choices("ab ", k=chance.randrange(1, 5))) for _ in range(chance.randrange(4))]
            pieces = in_pieces(text, chance)
            found, reason = await given(pieces, stops, reason="length")
            # Two stop texts may overlap: the one that is whole first has cut before the other could be seen.
            beginnings = ["".join(pieces[: i + 1]) for i in range(len(pieces))]
            seen = next((one for one in beginnings if any(stop in one for stop in stops)), text)
            assert "".join(found) == cut(seen, stops), (pieces, stops)
            assert all(found) and reason == ("stop" if any(stop in text for stop in stops) else "length")

    asyncio.run(check())


def test_nothing_that_is_given_is_taken_back_and_nothing_waits_longer_than_it_must():
    async def check():
        assert await given(["a", "b", "c"], ["bd"]) == (["a", "bc"], "stop")
        assert await given(["x<", "|", "end|", ">y"], ["<|end|>"]) == (["x"], "stop")
        assert await given(["x<", "|", "end|", "y"], ["<|end|>"]) == (["x", "<|end|y"], "stop")
        assert await given(["x<"], ["<|end|>"]) == (["x", "<"], "stop")
        assert await given(["aaab"], ["aab"]) == (["a"], "stop")
        assert await given([], ["a"]) == ([], "stop")

    asyncio.run(check())


@pytest.mark.parametrize("stops", [[], ["zz"], ["a b"]])
def test_a_judge_sees_all_that_is_given_before_it_is_given_and_no_half_word(stops):
    async def check():
        chance = random.Random(1)
        for _ in range(500):
            text = "".join(chance.choices(["a", "b", "bad", " ", " "], k=chance.randrange(1, 12)))
            judge = Judge("bad")
            found, reason = await given(in_pieces(text, chance), stops, judge)
            said = "".join(found)
            assert "bad" not in said.split()
            assert (text.startswith(said) and said in judge.shown) or not said
            assert (reason == "content_filter") == ("bad" in cut(text, stops).split())

    asyncio.run(check())


def test_what_goes_wrong_in_the_engine_or_the_judge_is_raised_and_stops_the_text():
    class Broken(Judge):
        def refuses_reply(self, text):
            raise KeyError(text)

    async def check():
        with pytest.raises(ZeroDivisionError):
            await given(["a", ZeroDivisionError()], [])
        with pytest.raises(KeyError):
            await given(["a"], [], Broken(""))

    asyncio.run(check())


def test_a_text_that_was_given_up_is_not_begun_or_stopped_at_once():
    async def check():
        text, asked = WrittenText(), []
        text.cancel()
        text.start(asked.append)
        assert not asked
        text, reply = WrittenText(), Reply()

        def submit(deliver):
            text.cancel()  # while it is being submitted
            return reply

        text.start(submit)
        assert reply.is_cancelled

    asyncio.run(check())
