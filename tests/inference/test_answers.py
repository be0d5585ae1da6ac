"""Ranking of given answers against the plain computation, one answer at a time."""

import pytest
import torch

from blip2.inference.answers import rank, score_answers
from blip2.preprocessing.prompts import question_prompt

ANSWERS = ["red", "a blue cup", "two", "a star left of the cup"]


def plain_score(model, image, question, answer):
    """Sum of the log-probabilities of the answer's tokens and the end, computed with no batch and no padding."""
    generator = model.generator
    tokenizer, network = generator.tokenizer, generator.language_model.model
    visual_prompt = generator.visual_prompt(model.image_features(image), [question])  # (1, Q, Dl)
    prompt = tokenizer.encode_prompts([question_prompt(question)]).input_ids
    target = tokenizer.encode_targets([answer]).input_ids
    embeds = network.get_input_embeddings()(torch.cat([prompt, target], dim=1))
    with torch.no_grad():
        logits = network(inputs_embeds=torch.cat([visual_prompt, embeds], dim=1)).logits
    log_probability = logits[0, -target.shape[1] - 1 : -1].log_softmax(dim=-1)  # (T, V)
    return log_probability.gather(1, target[0][:, None]).sum()


def test_scores_are_the_log_probabilities_of_the_whole_answers(model, images):
    questions = ["what is this ?", "which colour is the cup left of the star ?", "how many"]
    rankings = model.rank_answers(images[:3], questions, ANSWERS)
    for image, question, ranking in zip(images, questions, rankings, strict=False):
        for row in ranking:
            expected = plain_score(model, image, question, row.text)
            assert row.log_probability == pytest.approx(float(expected), abs=2e-4)  # of -100; measured 2.3e-5


def test_the_answer_is_the_one_with_the_greatest_score(model, images):
    for image in images:
        (ranking,) = model.rank_answers([image], "which colour ?", ANSWERS)
        scores = [row.log_probability for row in ranking]
        assert scores == sorted(scores, reverse=True)
        assert {row.text for row in ranking} == set(ANSWERS)
        assert model.ask(image, "which colour ?", answers=ANSWERS) == ranking[0].text
        assert sum(row.share for row in ranking) == pytest.approx(1, abs=1e-5)


def test_more_pairs_than_go_in_one_pass_give_the_same_scores(model, images, monkeypatch):
    generator = model.generator
    visual_prompt = generator.visual_prompt(model.image_features(images), ["what ?"] * 5)
    given = (generator.language_model, generator.tokenizer, visual_prompt, ["what ?"] * 5, ANSWERS)
    at_once = score_answers(*given)
    monkeypatch.setattr("blip2.inference.answers.ROWS_AT_ONCE", 3)
    assert torch.allclose(at_once, score_answers(*given), atol=2e-4)
    assert at_once.shape == (5, 4)


def test_an_answer_after_nothing_begins_without_the_space_that_parts(model, images):
    generator = model.generator
    tokenizer, language_model = generator.tokenizer, generator.language_model
    visual_prompt = generator.visual_prompt(model.image_features(images[:2]), [""] * 2)
    scores = score_answers(language_model, tokenizer, visual_prompt, ["", "what ?"], ANSWERS)
    prompt = tokenizer.encode_prompts([""])
    for answer, score in zip(ANSWERS, scores[0], strict=True):
        target = tokenizer.encode_targets([answer], prompts=[""])
        assert not torch.equal(target.input_ids, tokenizer.encode_targets([answer]).input_ids)
        texts = (prompt.input_ids, prompt.attention_mask, target.input_ids, target.attention_mask)
        expected = -language_model.token_losses(visual_prompt[:1], *texts).sum()
        assert float(score) == pytest.approx(float(expected), abs=2e-4)


def test_of_equal_scores_the_earlier_answer_wins():
    ranking = rank(torch.tensor([-2.0, -1.0, -1.0]), ["a", "b", "c"])
    assert [row.text for row in ranking] == ["b", "c", "a"]
