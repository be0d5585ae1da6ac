"""Prompts, word for word as the paper has them."""

from blip2.preprocessing.prompts import dialogue, question_prompt


def test_a_question_becomes_the_paper_s_prompt():
    assert question_prompt(" what is this? ") == "Question: what is this? Answer:"
    assert question_prompt("what?", "Question: {} Short answer:") == "Question: what? Short answer:"


def test_braces_in_a_question_are_plain():
    assert question_prompt("what is {} or {0}?") == "Question: what is {} or {0}? Answer:"


def test_a_dialogue_repeats_the_earlier_turns():
    history = [("what is this?", "a cup"), ("which colour?", "red.")]
    expected = "Question: what is this? Answer: a cup. Question: which colour? Answer: red. Question: why? Answer:"
    assert dialogue(history, "why?") == expected
    assert dialogue([], "why?") == question_prompt("why?")
