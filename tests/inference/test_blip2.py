"""A loaded model answers a row the same way alone and among others, whole and in pieces."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.errors import MissingPart, UserError
from blip2.inference.decoding import make_candidates
from blip2.inference.stage1_losses import Stage1Batch
from blip2.model.stage1 import Text
from blip2.training.stage1 import Stage1Step

from .tiny_model import make_tiny_model

# One row of a batch is computed by other kernels than the same row alone; worst difference measured: 1.5e-7.
CLOSE = {"atol": 2e-6, "rtol": 0}


@pytest.mark.filterwarnings("ignore:Passing .repetition_penalty")
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": -1.0}, {"repetition_penalty": 1.5}]
)
def test_a_caption_does_not_depend_on_its_batch(model, images, options):
    together = model.caption(images, max_new_tokens=12, **options)
    assert together == [model.caption(image, max_new_tokens=12, **options) for image in images]
    assert len(set(together)) == len(images)  # the pictures are seen


def test_an_answer_does_not_depend_on_the_length_of_other_questions(model, images):
    questions = ["what is this ?", "which colour is the red cup left of the star ?", "how many", "a cat ?", "which cup"]
    together = model.ask(images, questions, max_new_tokens=12)
    assert together == [model.ask(*row, max_new_tokens=12) for row in zip(images, questions, strict=True)]


def test_the_number_of_pictures_at_once_changes_nothing(model, images):
    whole = (model.caption(images), model.embed_images(images))
    model.batch_size = 2
    try:
        parted = (model.caption(images), model.embed_images(images))
    finally:
        model.batch_size = 8
    assert whole[0] == parted[0]
    assert np.allclose(whole[1], parted[1], **CLOSE)


def test_one_image_gives_one_text_and_a_list_gives_a_list(model, images):
    assert isinstance(model.caption(images[0]), str)
    assert model.caption(images[:1]) == [model.caption(images[0])]
    assert model.ask(images[:2], "what ?") == [model.ask(image, "what ?") for image in images[:2]]


def test_every_kind_of_source_gives_the_same_caption(model, images, tmp_path):
    path = tmp_path / "a.png"
    images[0].save(path)
    sources = [path, str(path), path.read_bytes(), images[0], np.asarray(images[0])]
    assert len(set(model.caption(sources))) == 1


@pytest.mark.parametrize("options", [{}, {"sample": True, "temperature": 2.0}, {"num_beams": 7}])
def test_of_several_captions_the_most_similar_is_given(model, images, options):
    torch.manual_seed(0)
    chosen = model.caption(images, best_of=5, max_new_tokens=8, **options)
    torch.manual_seed(0)
    decoding = make_candidates({"max_new_tokens": 8, **options}, 5)
    prompts = model.settings.prompts
    for image, given in zip(images, chosen, strict=True):
        if "sample" in options:  # the draws of a batch are others than those of a row
            torch.manual_seed(0)
            given = model.caption(image, best_of=5, max_new_tokens=8, **options)
            torch.manual_seed(0)
        features = model.image_features(image)
        (made,) = model.generator.propose(features, [prompts.caption], [prompts.caption_instruction], decoding)
        similarity = [match.itc for match in model.match(image, made)]
        assert len(set(made)) > 1 and given == made[int(np.argmax(similarity))]
    assert set(chosen) != set(model.caption(images, max_new_tokens=8))  # the choice is not the first


def test_a_model_that_chooses_its_captions_does_so_unless_told_otherwise(model, images):
    best, plain = model.caption(images, best_of=4), model.caption(images)
    settings = model.settings
    model.settings = replace(settings, caption_best_of=4)
    try:
        assert model.caption(images) == best
        assert model.caption(images, best_of=1) == plain
        assert model.caption(images, num_beams=2) == model.caption(images, best_of=1, num_beams=2)
    finally:
        model.settings = settings


def test_the_losses_of_stage_1_are_those_of_a_training_step(model, images):
    text = model.retriever.tokenizer.encode(["a red cup", "the cat left of the star ?", "blue", "one", "two cats"])
    pixel_values = model.transform.batch(images)
    found = model.losses(pixel_values, text.input_ids, text.attention_mask, negatives="hardest")
    step = Stage1Step(model.retriever.model, bos_id=model.retriever.tokenizer.dec_id, negatives="hardest")
    batch = Stage1Batch(
        model.image_features(images), Text(text.input_ids, text.attention_mask), groups=torch.arange(len(images))
    )
    expected = step.eval()(batch)
    for name in ("itc", "itm", "itg"):
        torch.testing.assert_close(getattr(found, name), expected[name], atol=1e-6, rtol=0)
    same = model.losses(pixel_values, text.input_ids, text.attention_mask, groups=torch.zeros(5, dtype=torch.long))
    assert same.itm == model.losses(pixel_values, text.input_ids, text.attention_mask, groups=torch.zeros(5)).itm
    assert same.itc != found.itc  # all are each other's positives
    with pytest.raises(UserError, match=r"There are 4 pictures, texts of shape \(5, \d+\)"):
        model.losses(pixel_values[:4], text.input_ids, text.attention_mask)


def test_the_prompt_and_the_question_change_what_is_said(model, images):
    said = {model.caption(images[0]), model.caption(images[0], "this is"), model.caption(images[0], "")}
    assert len(said) == 3
    assert model.ask(images[0], "what is this ?") != model.ask(images[0], "how many ?")


def test_the_qformer_reads_the_instruction(model, images):
    same_prompt = [model.generate(images[:1], "a", instruction) for instruction in ("which colour ?", "how many ?")]
    assert same_prompt[0] != same_prompt[1]


def test_a_model_that_reads_no_instruction_is_not_changed_by_one(tmp_path, images):
    unaware = blip2.load(make_tiny_model(tmp_path, aware=False).model)
    assert unaware.generate(images, "a", "which colour ?") == unaware.generate(images, "a", "how many ?")
    assert len(set(unaware.caption(images))) == len(images)


def test_sampling_follows_the_seed(model, images):
    def draw(seed):
        torch.manual_seed(seed)
        return model.caption(images[0], sample=True, top_p=0.95, temperature=1.5)

    assert draw(1) == draw(1) != draw(2)


def test_the_bounds_of_the_length_are_kept(model, images, monkeypatch):
    lengths, decode = [], model.generator.tokenizer.decode
    monkeypatch.setattr(model.generator.tokenizer, "decode", lambda ids: lengths.append(ids.shape[1]) or decode(ids))
    model.caption(images, max_new_tokens=3)
    model.caption(images, max_new_tokens=60, min_new_tokens=60)
    assert lengths == [3, 60]


@pytest.mark.parametrize("question", [None, "what is this ?", "which colour ?"])
def test_streamed_pieces_join_to_the_whole(model, images, question):
    for image in images:
        pieces = list(model.stream(image, question, max_new_tokens=20))
        whole = (
            model.caption(image, max_new_tokens=20)
            if question is None
            else model.ask(image, question, max_new_tokens=20)
        )
        assert "".join(pieces) == whole
        assert len(pieces) > 1


def test_a_stream_that_is_left_early_stops_the_language_model(model, images, monkeypatch):
    steps = []
    language_model = model.generator.language_model
    for name in ("step", "step_through"):
        step = getattr(language_model, name)
        monkeypatch.setattr(language_model, name, lambda *given, step=step: steps.append(1) or step(*given))
    stream = model.stream(images[0], max_new_tokens=400)
    next(stream)
    stream.close()
    assert len(steps) < 10
    assert list(stream) == []


def test_what_fails_while_streaming_is_raised_to_the_reader(model, images, monkeypatch):
    def fail(*given, **named):
        raise UserError("the language model is out of breath")

    for name in ("step", "step_through"):
        monkeypatch.setattr(model.generator.language_model, name, fail)
    with pytest.raises(UserError, match="out of breath"):
        list(model.stream(images[0]))


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(model, images):
    texts = ["a red cup", "a cat left of the blue star", "one"]
    image_embeds, text_embeds = model.embed_images(images), model.embed_texts(texts)
    assert image_embeds.shape == (5, 4, 16) and text_embeds.shape == (3, 16)
    assert np.allclose(np.linalg.norm(image_embeds, axis=-1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(text_embeds, axis=-1), 1, atol=1e-5)
    assert np.allclose(image_embeds[1:2], model.embed_images(images[1]), **CLOSE)
    assert np.allclose(text_embeds[2:], model.embed_texts("one"), **CLOSE)


def test_matches_are_the_cosine_of_the_best_query_and_the_probability_of_the_joint_pass(model, images):
    texts = ["a red cup", "a cat left of the blue star", "one"]
    matches = model.match(images[0], texts)
    cosines = (model.embed_images(images[0])[0] @ model.embed_texts(texts).T).max(axis=0)
    assert [match.text for match in matches] == texts
    assert np.allclose([match.itc for match in matches], cosines, **CLOSE)
    retriever = model.retriever
    logits = retriever.model.match(model.image_features(images[0]).expand(3, -1, -1), retriever._tokenise(texts))
    assert np.allclose([match.itm for match in matches], logits.softmax(dim=-1)[:, 1].detach(), **CLOSE)
    (alone,) = model.match(images[0], "one")
    assert np.allclose([matches[2].itc, matches[2].itm], [alone.itc, alone.itm], **CLOSE)


def test_text_longer_than_the_qformer_reads_is_cut(model):
    assert np.allclose(model.embed_texts("red " * 31), model.embed_texts("red " * 300), **CLOSE)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model, image: model.ask(image, " "), "The question is empty"),
        (lambda model, image: model.ask(image, "what ?", answers=[]), "The list of answers is empty"),
        (lambda model, image: model.ask(image, "what ?", answers=["a", ""]), "holds an empty answer"),
        (lambda model, image: model.ask(image, "what ?", answers=["a"], num_beams=2), "num_beams has no effect"),
        (lambda model, image: model.ask([image] * 2, ["what ?"] * 3), "There are 2 images and 3 questions"),
        (lambda model, image: model.caption([]), "The list is empty"),
        (lambda model, image: model.caption(image, top_p=0.5), "top_p has no effect without sampling"),
        (lambda model, image: model.caption(image, length_penalty=2.0), "length_penalty has no effect without beams"),
        (lambda model, image: model.caption(image, num_beams=0), "num_beams is 0; it must lie between 1 and 64"),
        (lambda model, image: model.caption(image, sample=True, top_p=1.5), "top_p is 1.5"),
        (lambda model, image: model.caption(image, max_new_tokens=0), "max_new_tokens is 0"),
        (lambda model, image: model.caption(image, min_new_tokens=99), "min_new_tokens is 99"),
        (lambda model, image: model.caption(image, best_of=0), "best_of is 0; it must lie between 1 and 64"),
        (lambda model, image: model.caption(image, beams=2), "No option of decoding is called beams"),
        (lambda model, image: model.stream(image, num_beams=2), "cannot be streamed"),
        (lambda model, image: model.match(image, []), "The list is empty"),
    ],
)
def test_what_makes_no_sense_is_refused(model, images, use, message):
    with pytest.raises(UserError, match=message):
        use(model, images[0])


@pytest.mark.parametrize(
    ("parts", "use", "message"),
    [
        (("stage1",), lambda model, image: model.caption(image), "so it cannot caption and answer"),
        (("stage1",), lambda model, image: model.chat(image), "so it cannot caption and answer"),
        (("generation",), lambda model, image: model.caption(image, best_of=2), "so it cannot embed and match"),
        (("generation",), lambda model, image: model.match(image, "a"), "so it cannot embed and match"),
        (("generation",), lambda model, image: model.embed_texts("a"), r"`blip2 info` lists the models"),
    ],
)
def test_a_model_that_lacks_a_part_says_so_and_names_one_that_has_it(tmp_path, parts, use, message):
    model = blip2.load(make_tiny_model(tmp_path, parts=parts).model)
    with pytest.raises(MissingPart, match=message) as caught:
        use(model, Image.new("RGB", (4, 4)))
    assert "mini" in str(caught.value)
