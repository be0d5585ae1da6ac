"""A conversation remembers, forgets when told, and says the same whole and in pieces."""

import pytest

from blip2.errors import UserError
from blip2.preprocessing.prompts import dialogue


def test_the_first_answer_is_that_of_ask_and_the_second_knows_the_first(model, images):
    conversation = model.chat(images[0])
    first = conversation.ask("what is this ?")
    assert first == model.ask(images[0], "what is this ?")
    second = conversation.ask("which colour ?")
    prompt = dialogue([("what is this ?", first)], "which colour ?")
    assert [second] == model.generate(images[:1], prompt, "which colour ?")
    assert conversation.history == [("what is this ?", first), ("which colour ?", second)]


def test_streamed_turns_are_those_of_ask(model, images):
    asked, streamed = model.chat(images[0]), model.chat(images[0])
    for question in ("what is this ?", "which colour ?", "how many ?"):
        assert "".join(streamed.stream(question)) == asked.ask(question)
    assert streamed.history == asked.history


def test_a_turn_left_early_is_not_remembered(model, images):
    conversation = model.chat(images[0])
    stream = conversation.stream("what is this ?")
    next(stream)
    stream.close()
    assert conversation.history == []


def test_reset_forgets(model, images):
    conversation = model.chat(images[0])
    first = conversation.ask("what is this ?")
    conversation.reset()
    assert conversation.ask("what is this ?") == first


def test_a_long_dialogue_stays_within_the_language_model(model, images):
    conversation = model.chat(images[0])
    for _ in range(14):
        conversation.ask("which colour ?", max_new_tokens=2)
    assert len(conversation.history) == 14
    assert conversation._prompt("why ?").count("Question:") == 11


def test_an_empty_question_is_refused(model, images):
    with pytest.raises(UserError, match="The question is empty"):
        model.chat(images[0]).ask("  ")
