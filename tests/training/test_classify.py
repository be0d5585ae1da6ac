"""Answer classification: what counts, what is asked for, and what instruction tuning takes over."""

import dataclasses

import pytest
import torch

from blip2.errors import BadRecipe
from blip2.training.classify import NOT_LISTED, ClassifyBatch, list_answers
from blip2.training.export import export
from blip2.training.loop import train
from blip2.training.recipe import recipe_from_settings, to_settings

from .tiny_blip2 import COLOURS, build_in, make_parts, run_blip2, tiny_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    make_parts(root)
    return root


def with_item(recipe, **changes):
    item = dataclasses.replace(recipe.data.mixture[0], **changes)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mixture=(item,)))


def test_the_commonest_answers_are_listed_and_ties_go_by_alphabet():
    assert list_answers({"two": 3, "red": 1, "blue": 1, "yes": 9}, 3) == ["yes", "two", "blue"]


def test_it_learns_the_colours_and_never_hears_other_answers(root, tmp_path):
    recipe = with_item(tiny_recipe(root, "classify", steps=300, dropout=0.0), kinds=("colour",))
    recipe = dataclasses.replace(
        recipe,
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=1e-2),
        training=dataclasses.replace(recipe.training, batch_size=12, checkpoint_every=300),
    )
    job = build_in(root, recipe, tmp_path)
    assert sorted(job.batches.number_of) == sorted(COLOURS)
    first = float(job.module.eval()(job.batches(0))["accuracy"])
    train(job, recipe, tmp_path)
    last = float(job.module.eval()(job.batches(0))["accuracy"])
    assert last > 0.8 > first


def test_an_answer_that_is_not_listed_does_not_count(root, tmp_path):
    job = build_in(root, tiny_recipe(root, "classify"), tmp_path)
    batch = job.batches(0)
    step = job.module.eval()
    some = batch.answer.clone()
    some[1:] = NOT_LISTED
    alone = ClassifyBatch(batch.image_features[:1], batch.instruction[torch.tensor([0])], batch.answer[:1])
    torch.testing.assert_close(step(dataclasses.replace(batch, answer=some))["loss"], step(alone)["loss"])
    nothing = step(dataclasses.replace(batch, answer=torch.full_like(some, NOT_LISTED)))
    assert nothing["loss"] == 0 and nothing["accuracy"] == 0


def test_a_short_list_leaves_the_rarest_answers_out(root, tmp_path):
    recipe = tiny_recipe(root, "classify")
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, num_answers=3))
    job = build_in(root, recipe, tmp_path)
    assert "yes" in job.batches.number_of and len(job.batches.number_of) == 3
    assert {n for i in range(8) for n in job.batches(i).answer.tolist()} <= {NOT_LISTED, 0, 1, 2}


def test_instruction_tuning_goes_on_from_it(root, tmp_path):
    run_blip2(root, "instruct", tmp_path / "spoken", steps=2)
    classify = tiny_recipe(root, "classify", init_from=str(tmp_path / "spoken"))
    train(build_in(root, classify, tmp_path / "told"), classify, tmp_path / "told")
    before = build_in(root, tiny_recipe(root, "classify", init_from=str(tmp_path / "spoken")), tmp_path / "x").module
    after = build_in(root, tiny_recipe(root, "instruct", init_from=str(tmp_path / "told")), tmp_path / "y").module
    assert torch.equal(before.model.language_projection.weight, after.model.language_projection.weight)
    assert not torch.equal(before.model.query_tokens, after.model.query_tokens)


def test_what_cannot_be_is_refused(root, tmp_path):
    with pytest.raises(BadRecipe, match=r"colour.*relation"):
        build_in(root, with_item(tiny_recipe(root, "classify"), kinds=("shape",)), tmp_path)
    settings = to_settings(tiny_recipe(root, "classify"))
    settings["model"]["instruction_aware"] = False
    with pytest.raises(BadRecipe, match="instruction_aware"):
        recipe_from_settings(settings, "mine")
    run_blip2(root, "classify", tmp_path / "told", steps=2)
    with pytest.raises(BadRecipe, match="classify"):
        export(tmp_path / "model", "tiny", generation=tmp_path / "told")
