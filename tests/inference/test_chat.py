"""A conversation remembers, forgets when told, and says the same whole and in pieces."""

import pytest

from blip2.errors import UserError
from blip2.inference.chat import fit_dialogue
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


def test_a_long_dialogue_is_cut_at_whole_turns_to_what_the_language_model_can_read(model, images):
    conversation = model.chat(images[0])
    room = model.generator.prompt_room(2)
    turn = "which colour is the red cup left of the star ?"
    while not conversation.num_left_out:
        conversation.ask(turn, max_new_tokens=2)
    history = conversation.history[:-1]
    asked = fit_dialogue(model.generator, history, turn, model.settings.prompts.question, max_new_tokens=2)
    assert asked.prompt == dialogue(history[asked.num_left_out :], turn, model.settings.prompts.question)
    one_more = dialogue(history[asked.num_left_out - 1 :], turn, model.settings.prompts.question)
    lengths = [model.generator.tokenizer.encode_prompts([text]).input_ids.shape[1] for text in (asked.prompt, one_more)]
    assert lengths[0] <= room < lengths[1]
    assert asked.num_tokens == lengths[0] + model.generator.model.config.num_query_tokens


def test_a_question_that_does_not_fit_alone_is_refused(model, images):
    with pytest.raises(UserError, match=r"The question is \d+ tokens long"):
        model.chat(images[0]).ask("which colour " * 4000)


def test_a_system_line_stands_before_the_dialogue_and_is_never_cut(model):
    history = [("what is this ?", "a cup")] * 200
    asked = fit_dialogue(model.generator, history, "why ?", "Q: {} A:", max_new_tokens=4, system=" be red ")
    assert asked.num_left_out and asked.prompt.startswith("be red Q: what is this ? A: a cup. Q:")


def test_an_empty_question_is_refused(model, images):
    with pytest.raises(UserError, match="The question is empty"):
        model.chat(images[0]).ask("  ")
