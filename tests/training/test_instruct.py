"""Answers classified beside those of the LLM: what counts, what is learnt, and what is exported."""

import dataclasses

import pytest
import torch
from safetensors import safe_open

from blip2.errors import BadRecipe
from blip2.training.export import export
from blip2.training.instruct import NOT_LISTED, AnswerBatch, list_answers
from blip2.training.loop import train
from blip2.training.recipe import recipe_from_settings, to_settings
from blip2.training.sections import Recipe
from blip2.training.state import MODEL, OPTIMIZER, newest_checkpoint

from .tiny_blip2 import COLOURS, build_in, make_parts, tiny_recipe, train_telling
from .tiny_run import kill_five_times


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    make_parts(root)
    return root


@pytest.fixture(autouse=True)
def home(monkeypatch, root):
    monkeypatch.setenv("BLIP2_HOME", str(root / "home"))


def with_answers(root, steps: int = 6, *, kinds=(), learning_rate: float = 1e-3, **training) -> Recipe:
    recipe = tiny_recipe(root, "instruct", steps, dropout=0.0)
    item = dataclasses.replace(recipe.data.mixture[0], kinds=kinds)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, mixture=(item,)),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=learning_rate),
        training=dataclasses.replace(recipe.training, **({"answer_samples": 8} | training)),
    )


def run(root, run_dir, tell=None):
    return train_telling(root, with_answers(root), run_dir, tell)


def test_the_commonest_answers_are_listed_and_ties_go_by_alphabet():
    assert list_answers({"two": 3, "red": 1, "blue": 1, "yes": 9}, 3) == ["yes", "two", "blue"]


def test_the_classifier_learns_the_colours_and_never_hears_other_answers(root, tmp_path):
    recipe = with_answers(
        root, 300, kinds=("colour",), learning_rate=1e-2, answer_samples=12, batch_size=1, checkpoint_every=300
    )
    job = build_in(root, recipe, tmp_path)
    assert sorted(job.batches.number_of) == sorted(COLOURS)
    first = float(job.module.eval()(job.batches(0))["answer_accuracy"])
    train(job, recipe, tmp_path)
    last = float(job.module.eval()(job.batches(0))["answer_accuracy"])
    assert last > 0.8 > first


def test_the_loss_is_that_of_the_llm_and_the_weighted_classification(root, tmp_path):
    job = build_in(root, with_answers(root, answer_weight=3.0), tmp_path)
    job.module.eval()
    batch = job.batches(0)
    losses = job.module(batch)
    torch.testing.assert_close(losses["loss"], losses["lm"] + 3 * losses["answers"])
    alone = build_in(root, with_answers(root, answer_samples=0), tmp_path / "alone")
    alone.module.load_state_dict(job.module.state_dict(), strict=False)
    spoken = alone.batches(0)
    assert torch.equal(spoken.target.input_ids, batch.spoken.target.input_ids)  # the LLM hears the same samples
    torch.testing.assert_close(alone.module.eval()(spoken)["loss"], losses["lm"])


def test_classified_samples_are_others_than_those_the_llm_answers(root, tmp_path):
    batches = build_in(root, with_answers(root, answer_samples=4), tmp_path).batches
    same = [torch.equal(b.spoken.image_features, b.listed.image_features) for b in map(batches, range(6))]
    assert not any(same)


def test_an_answer_that_is_not_listed_does_not_count(root, tmp_path):
    job = build_in(root, with_answers(root), tmp_path)
    listed = job.batches(0).listed
    step = job.module.eval()
    some = listed.answer.clone()
    some[1:] = NOT_LISTED
    alone = AnswerBatch(listed.image_features[:1], listed.instruction[torch.tensor([0])], listed.answer[:1])
    torch.testing.assert_close(step.classify(dataclasses.replace(listed, answer=some))[0], step.classify(alone)[0])
    loss, right = step.classify(dataclasses.replace(listed, answer=torch.full_like(some, NOT_LISTED)))
    assert loss == 0 and right == 0


def test_a_short_list_leaves_the_rarest_answers_out(root, tmp_path):
    batches = build_in(root, with_answers(root, num_answers=3), tmp_path).batches
    assert "yes" in batches.number_of and len(batches.number_of) == 3
    assert {n for i in range(8) for n in batches(i).listed.answer.tolist()} <= {NOT_LISTED, 0, 1, 2}


def test_five_kills_leave_the_bits_of_an_uninterrupted_run(root, tmp_path):
    run(root, tmp_path / "whole")
    assert kill_five_times(3, run, root, tmp_path / "killed") >= 3
    assert run(root, tmp_path / "killed").finished
    whole, killed = (newest_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    for file in (MODEL, OPTIMIZER):
        assert (whole / file).read_bytes() == (killed / file).read_bytes()


def test_the_classifier_is_not_exported(root, tmp_path):
    run(root, tmp_path / "run")
    export(tmp_path / "model", "tiny", generation=tmp_path / "run")
    with safe_open(tmp_path / "model" / "generation.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "query_tokens" in names and not any("classifier" in name for name in names)


def test_what_cannot_be_is_refused(root, tmp_path):
    with pytest.raises(BadRecipe, match=r"colour.*relation"):
        build_in(root, with_answers(root, kinds=("shape",)), tmp_path)
    settings = to_settings(with_answers(root))
    settings["model"]["instruction_aware"] = False
    with pytest.raises(BadRecipe, match="instruction_aware"):
        recipe_from_settings(settings, "mine")
    with pytest.raises(BadRecipe, match="answer_samples 6"):
        recipe_from_settings(to_settings(with_answers(root)) | {"training": {"steps": 1, "batch_size": 4,
            "accumulation": 4, "answer_samples": 6}}, "mine")  # fmt: skip
