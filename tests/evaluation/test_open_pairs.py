"""The whole benchmark on a tiny model and data set: its figures equal those of the plain way, one by one."""

import pytest
import torch

from blip2.data.sample import Question
from blip2.data.shards import open_split
from blip2.errors import MissingFile, UserError
from blip2.evaluation.benchmarks.open_pairs import TASKS, caption_metrics, prior_metrics, run, spread
from blip2.evaluation.encoding import encode, encode_pooled
from blip2.evaluation.matching import match_pairs, similarity_matrix
from blip2.evaluation.speaking import Asked, answer_all, answer_blind, caption_all, caption_choosing
from blip2.evaluation.vqa import AnswerPrior
from blip2.model.stage1 import Text

TEXTS = ["cat", "a red cup", "two cats and a star", "blue star"]


def silent(_):
    """Says nothing."""


@pytest.fixture(scope="session")
def results(model, tiny, open_pairs, tmp_path_factory):
    """All tasks, without a limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_HOME", str(tmp_path_factory.mktemp("home")))
        return run(model, open_pairs, limit=0, sentence_model=str(tiny.text_init), say=silent)


@pytest.fixture(scope="session")
def samples(open_pairs):
    """The held-out style."""
    return open_split(open_pairs, "held_out_style")[:]


@pytest.fixture(scope="session")
def features(model, samples):
    """Their image features."""
    return encode(model, samples, "some", silent)


def test_every_promised_figure_is_there_and_a_fraction(results):
    recalls = [f"{way}_{name}" for way in ("image_to_text", "text_to_image") for name in ("r1", "r5", "r10")]
    promised = [
        *(
            f"retrieval/{split}/{name}"
            for split in ("held_out_style", "held_out_concepts", "new_scenes")
            for name in (*recalls, "image_to_text_reranked_r1", "text_to_image_reranked_as_original_r1", "chance")
        ),
        *(f"vqa/{split}/{name}" for split in ("new_scenes", "new_noun_pairs") for name in ("accuracy", "majority")),
        *(f"vqa/{split}/{name}" for split in ("blind", "shuffled") for name in ("accuracy", "colour", "count")),
        "captions/held_out_style/noun_accuracy",
        "captions/held_out_style/cider",
        "easy_vqa/test/accuracy",
        "easy_vqa/blind/accuracy",
        *(f"baselines/{name}/held_out_style/image_to_text_r1" for name in ("nearest_neighbour", "ridge")),
        "baselines/nearest_neighbour_whitened/held_out_style/image_to_text_r1",
        "baselines/ridge/held_out_concepts/text_to_image_r10",
    ]
    assert [name for name in promised if name not in results.metrics] == []
    assert all(0 <= value <= (10 if name.endswith("cider") else 1) for name, value in results.metrics.items())
    assert all(used == total for used, total in results.counts.values())


def test_the_benchmark_gives_the_same_figures_twice(model, open_pairs, results):
    tasks = [task for task in TASKS if task != "baselines"]
    again = run(model, open_pairs, tasks, limit=0, batch_size=2, say=silent)
    assert again.metrics == {name: v for name, v in results.metrics.items() if not name.startswith("baselines/")}


def test_similarities_are_those_of_blip2_match(model, samples):
    exact = model.image_features([sample.image for sample in samples])
    similarity = similarity_matrix(model.retriever, exact, TEXTS, silent)
    plain = [[match.itc for match in model.match(sample.image, TEXTS)] for sample in samples]
    assert torch.allclose(similarity, torch.tensor(plain), atol=1e-5)  # float32 in other batches; at most 6e-8 seen


def test_match_logits_are_those_of_one_pair_at_a_time(model, features):
    retriever = model.retriever
    pairs = torch.tensor([[i, j] for i in range(len(features)) for j in range(len(TEXTS))])
    together = match_pairs(retriever, features, TEXTS, pairs, silent)
    for (image, number), logit in zip(pairs.tolist(), together, strict=True):
        tokens = retriever.tokenizer.encode([TEXTS[number]])
        plain = retriever.model.match(
            features[image : image + 1].float(), Text(tokens.input_ids, tokens.attention_mask)
        )
        assert logit.tolist() == pytest.approx(plain[0].tolist(), abs=1e-4)  # padding; at most 2e-7 seen


def test_captions_are_those_of_blip2_caption(model, samples, features):
    prompts = model.settings.prompts
    said = caption_all(model.generator, features.float(), prompts.caption, prompts.caption_instruction, silent)
    assert said == caption_all(
        model.generator, features.float(), prompts.caption, prompts.caption_instruction, silent, batch_size=1
    )
    exact = model.image_features([sample.image for sample in samples])
    again = caption_all(model.generator, exact, prompts.caption, prompts.caption_instruction, silent)
    assert again == model.caption([sample.image for sample in samples], max_new_tokens=30)


def test_chosen_captions_are_those_of_blip2_caption(model, samples):
    images = [sample.image for sample in samples]
    features, prompts = model.image_features(images), model.settings.prompts
    told = (prompts.caption, prompts.caption_instruction, silent)
    said = caption_choosing(model.generator, model.retriever, 3, features, *told)  # all at once, as below: of random
    assert said == model.caption(images, best_of=3, max_new_tokens=30)  # weights long beams may tie but for rounding
    parted = caption_choosing(model.generator, model.retriever, 3, features, *told, batch_size=4)
    assert len(parted) == len(images)


def test_answers_come_in_the_order_of_the_questions(model, samples):
    features = model.image_features([sample.image for sample in samples])
    asked = [
        Asked(row, Question(question, "?", "k"))
        for row, question in (
            (2, "What colour is the star?"),
            (0, "What?"),
            (2, "How many cats are there?"),
            (1, "What?"),
        )
    ]
    template = model.settings.prompts.question
    answered = answer_all(model.generator, features, asked, template, silent, batch_size=2)
    assert [row.question for row in answered] == [row.question for row in asked]
    plain = [model.ask(samples[row.row].image, row.question.question, max_new_tokens=10) for row in asked]
    assert [row.given for row in answered] == plain


def test_blind_answers_depend_on_the_question_alone(model):
    questions = [Question(text, "?", "k") for text in ("What?", "How many cats?", "What?")]
    first, _, again = answer_blind(model.generator, questions, model.settings.prompts.question, silent, batch_size=1)
    assert first.given == again.given
    together = answer_blind(model.generator, questions, model.settings.prompts.question, silent)
    assert together[0].given == first.given


def test_a_limit_takes_evenly_spread_samples_and_says_so(model, open_pairs):
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 10) == spread(3, 0) == [0, 1, 2]
    results = run(model, open_pairs, ["retrieval", "vqa"], limit=2, say=silent)
    assert results.counts["retrieval/held_out_style"] == (2, 6)
    assert results.counts["vqa/new_scenes"] == (2, 18)
    assert "retrieval/held_out_style/image_to_text_reranked_r1" in results.metrics
    # fewer pictures to search would make it look easier
    assert not [name for name in results.metrics if "held_out_style/text_to_image" in name]


def test_pooled_features_are_kept_and_read_again(model, tiny, open_pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))
    said = []
    first = run(model, open_pairs, ["baselines"], limit=0, sentence_model=str(tiny.text_init), say=said.append)
    assert any("train_pairs" in line for line in said)
    again = run(
        model, open_pairs, ["baselines"], limit=0, sentence_model=str(tiny.text_init), say=said.clear() or said.append
    )
    assert not any("train_pairs" in line for line in said)
    assert first.metrics == again.metrics
    kept = sorted(path.suffix for path in (tmp_path / "features").iterdir())
    assert kept == [".npy"] * 3  # train_pairs, train_styles, held_out_style (concepts are read from it)


def test_pooled_features_are_mean_and_maximum(model, samples, features):
    pooled = torch.from_numpy(encode_pooled(model, samples, "some", silent)).float()
    expected = torch.cat([features.float().mean(dim=1), features.float().amax(dim=1)], dim=1)
    assert torch.allclose(pooled, expected, atol=5e-3)  # of values to 3, rounded to float16 before


def test_caption_metrics_of_perfect_captions():
    metrics = caption_metrics(["a red cup", "cat"], [("red cup",), ("cat",)])
    assert metrics["noun_accuracy"] == metrics["exact"] == 1.0 and metrics["most_common_noun"] == 0.5
    assert caption_metrics(["cup", "dog"], [("red cup",), ("cat",)])["noun_accuracy"] == 0.5


def test_the_prior_knows_only_the_training_questions():
    prior = AnswerPrior([Question("How many?", "two", "count"), Question("Is it?", "yes", "exists")] * 2)
    asked = [Question("How many?", "two", "count"), Question("Is it?", "no", "exists")]
    assert prior_metrics(prior, asked) == {"majority": 0.5, "question_prior": 0.5}


def test_what_cannot_be_measured_is_refused(model, open_pairs, tmp_path):
    with pytest.raises(UserError, match=r"No task is called 'speed'.*retrieval, captions"):
        run(model, open_pairs, ["speed"], say=silent)
    with pytest.raises(UserError, match="or 0 for all"):
        run(model, open_pairs, limit=-1, say=silent)
    with pytest.raises(MissingFile, match="blip2 data build"):
        run(model, tmp_path, ["retrieval"], say=silent)
