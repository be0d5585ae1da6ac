"""Presets: prompts and decoding that the paper and the original code name; what is given besides counts more."""

import pytest

import blip2
from blip2.errors import UserError
from blip2.inference.presets import manner

from .tiny_model import make_tiny_model


@pytest.mark.parametrize(
    ("preset", "is_encoder_decoder", "prompt", "length_penalty"),
    [
        ("paper", False, "Question: {} Answer:", -1),
        ("paper", True, "Question: {} Short answer:", -1),
        ("lavis", False, "Question: {} Short answer:", 0),
        ("lavis", True, "Question: {} Short answer:", -1),
    ],
)
def test_questions_are_asked_as_each_says(preset, is_encoder_decoder, prompt, length_penalty):
    wanted = manner(preset, "question", is_encoder_decoder=is_encoder_decoder)
    assert wanted.prompt == prompt and wanted.options["length_penalty"] == length_penalty
    assert (wanted.options["num_beams"], wanted.options["max_new_tokens"]) == (5, 10)


def test_a_preset_is_its_prompt_and_its_options(model, images):
    given = model.generate(
        images, "a photo of", model.settings.prompts.caption_instruction, num_beams=5, repetition_penalty=1.15,
        max_new_tokens=30, min_new_tokens=8, length_penalty=0.0,
    )  # fmt: skip
    assert model.caption(images, preset="lavis") == given
    assert model.caption(images, preset="paper") != given
    shorter = model.caption(images, "what", preset="paper", max_new_tokens=3)
    assert shorter == model.caption(images, "what", num_beams=5, max_new_tokens=3, length_penalty=1.0)
    asked = model.ask(images, "which cup?", preset="paper")
    assert asked == model.generate(
        images, "Question: which cup? Answer:", "which cup?", num_beams=5, max_new_tokens=10, length_penalty=-1.0
    )


def test_an_encoder_decoder_is_asked_for_a_short_answer(tmp_path, images):
    model = blip2.load(make_tiny_model(tmp_path, parts=("generation",), decoder_only=False).model)
    options = {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0}
    asked = model.generate(images, "Question: which cup? Short answer:", "which cup?", **options)
    assert model.ask(images, "which cup?", preset="paper") == asked


def test_what_makes_no_sense_is_refused(model, images):
    with pytest.raises(UserError, match="no preset 'best'"):
        model.caption(images, preset="best")
    with pytest.raises(UserError, match="preset has no effect"):
        model.ask(images, "which?", ["one", "two"], preset="paper")
