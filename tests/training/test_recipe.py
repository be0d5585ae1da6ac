"""Recipes say what they mean, and what they should not say is refused with a hint."""

import pytest

from blip2.errors import BadRecipe, MissingFile
from blip2.training.recipe import (
    apply_overrides,
    differences,
    parse_recipe,
    read_recipe,
    recipe_from_settings,
    shipped_recipes,
    to_settings,
    to_yaml,
)

GOOD = """
stage: stage2
name: trial
data:
  mixture:
  - {split: train_pairs, weight: 2}
  - {split: train_scenes, task: question}
optimizer: {learning_rate: 1e-4, warmup_steps: 10}
training: {steps: 100, batch_size: 8}
"""


@pytest.fixture
def recipe():
    return parse_recipe(GOOD, "trial.yaml")


def test_what_a_recipe_leaves_out_has_the_paper_s_values(recipe):
    assert recipe.optimizer.betas == (0.9, 0.98)
    assert recipe.optimizer.weight_decay == 0.05
    assert recipe.model.num_query_tokens == 32


def test_1e_4_is_a_number_though_yaml_reads_it_as_text(recipe):
    assert recipe.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize("with_help", [False, True])
def test_a_resolved_recipe_reads_as_the_same_recipe(recipe, with_help):
    assert parse_recipe(to_yaml(recipe, with_help), "again.yaml") == recipe


def test_what_a_run_is_judged_by_has_a_name_or_settings(recipe):
    chosen = apply_overrides(recipe, ["data.validation=[val, {source: a.csv, images: pictures, columns: {image: b}}]"])
    name, item = chosen.data.validation
    assert name == "val" and (item.source, item.images, item.columns) == ("a.csv", "pictures", {"image": "b"})
    for text in (to_yaml(chosen), to_yaml(chosen, with_help=True)):
        assert parse_recipe(text, "again.yaml") == chosen
    assert recipe_from_settings(to_settings(chosen), "state.json") == chosen


def test_settings_as_kept_in_a_checkpoint_read_as_the_same_recipe(recipe):
    assert recipe_from_settings(to_settings(recipe), "state.json") == recipe


def test_help_stands_above_each_setting(recipe):
    shown = to_yaml(recipe, with_help=True)
    assert "  # Peak learning rate, reached after the warm-up.\n  learning_rate: 0.0001\n" in shown
    assert "# one of: stage1, stage2, instruct\nstage: stage2\n" in shown


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "learning_rate",
            "learnin_rate",
            "optimizer.learnin_rate is no setting; did you mean optimizer.learning_rate?",
        ),
        ("name: trial", "name: trial\nsteps: 3", "steps is no setting; did you mean training.steps?"),
        ("weight: 2", "wieght: 2", "data.mixture.0.wieght is no setting; did you mean data.mixture.0.weight?"),
        ("steps: 100", "steps: 1.5", "training.steps is 1.5: input should be a valid integer"),
        ("steps: 100", "steps: 0", "training.steps is 0: input should be greater than 0"),
        ("steps: 100", "steps: true", "training.steps: true is no number."),
        ("steps: 100, ", "", "training.steps is missing and has no default."),
        ("1e-4", ".nan", "optimizer.learning_rate is nan: input should be a finite number"),
        ("stage2", "stage3", "stage is 'stage3': input should be 'stage1', 'stage2' or 'instruct'"),
        ("name: trial", "name: trial\nname: other", "name is given twice"),
        ("batch_size: 8", "batch_size: 8, accumulation: 3", "cannot be split into accumulation = 3 equal parts"),
        ("weight: 2", "weight: 2000", "train_scenes has a share below 0.2%"),
        ("name: trial", "name: trial\nmodel: {language: null}", "stage2 trains for a language model"),
        ("optimizer: {", "optimizer: 3\nunused: {", "optimizer is 3: it should hold settings of its own."),
        ("name: trial", "name: [", "line 5: "),
        ("{learning_rate", "{lr", "optimizer.lr is no setting; did you mean optimizer.learning_rate?"),
        ("name: trial", "name: ../../x", "name is '../../x': give one that the folder of the run can have"),
        ("name: trial", "name: ''", "name is ''"),
        ("name: trial", "name: .", "name is '.'"),
        ("data:", "data:\n  validation: [val, {split: val}]", "data: validation names val twice"),
        ("1e-4", "1e-6", "min_learning_rate 1e-05 is above learning_rate 1e-06: lower it"),
        ("data:", "data:\n  validation: [3]", "data.validation.0 is 3: input should be a valid string"),
        (
            "data:",
            "data:\n  validation: [{source: a.csv, image: b}]",
            "data.validation.0.image is no setting; did you mean data.validation.0.images?",
        ),
        ("data:", "data:\n  validation: [{images: b}]", "data.validation.0: give a split of data.folder, or a source"),
        (GOOD, "just words", "trial.yaml holds no settings"),
    ],
)
def test_a_wrong_recipe_is_refused_by_path_and_with_the_nearest_name(old, new, message):
    with pytest.raises(BadRecipe) as refusal:
        parse_recipe(GOOD.replace(old, new), "trial.yaml")
    assert str(refusal.value).startswith("trial.yaml")
    assert message in str(refusal.value)


def test_a_wrong_item_is_told_and_not_that_too_few_are_left():
    text = GOOD.replace("split: train_pairs", "splt: train_pairs").replace("split: train_scenes", "splt: train_scenes")
    with pytest.raises(BadRecipe) as refusal:
        parse_recipe(text, "trial.yaml")
    assert "mixture.0.splt" in str(refusal.value) and "tuple" not in str(refusal.value)
    with pytest.raises(BadRecipe, match=r"data\.mixture is \[\]: tuple should have at least 1 item"):
        parse_recipe("stage: stage1\nname: a\ndata: {mixture: []}\ntraining: {steps: 1, batch_size: 2}", "trial.yaml")


def test_every_fault_is_named_at_once():
    with pytest.raises(BadRecipe) as refusal:
        parse_recipe(GOOD.replace("learning_rate", "rate").replace("steps: 100", "steps: x"), "trial.yaml")
    assert len(str(refusal.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay", 0.1),
        ("optimizer.min_learning_rate=1e-6", "optimizer.min_learning_rate", 1e-6),
        ("training.threads=2", "training.threads", 2),
        ("model.freeze_word_embeddings=true", "model.freeze_word_embeddings", True),
        ("optimizer.betas=[0.9, 0.999]", "optimizer.betas", [0.9, 0.999]),
    ],
)
def test_an_override_changes_one_setting(recipe, override, path, value):
    changed = differences(recipe, apply_overrides(recipe, [override]))
    assert {name: new for name, (_, new) in changed.items()} == {path: value}


def test_an_override_reaches_into_the_mixture(recipe):
    assert apply_overrides(recipe, ["data.mixture.1.weight=4"]).data.mixture[1].weight == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.weight_dcay=1", "did you mean optimizer.weight_decay?"),
        ("weight_decay=1", "did you mean optimizer.weight_decay?"),
        ("nothing.like.it=1", "nothing.like.it is no setting."),
        ("data.mixture.5.weight=1", "data.mixture.5.weight is no setting"),
        ("training.steps", "write it as NAME=VALUE"),
        ("training.steps=[", "is no YAML value"),
        ("training.steps=many", "training.steps is 'many'"),
    ],
)
def test_a_wrong_override_is_refused(recipe, override, message):
    with pytest.raises(BadRecipe) as refusal:
        apply_overrides(recipe, [override])
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_built_in_recipe_reads(name):
    assert read_recipe(name).training.steps > 0


def test_a_recipe_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(BadRecipe, match="There is no built-in recipe 'mini/stage9'"):
        read_recipe("mini/stage9")
    with pytest.raises(MissingFile, match=r"There is no recipe file .*gone\.yaml"):
        read_recipe(tmp_path / "gone.yaml")


def test_a_recipe_file_is_read(tmp_path, recipe):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert read_recipe(path) == recipe


def test_the_presets_differ_where_the_originals_do():
    paper, lavis = read_recipe("paper/stage1-vit-g"), read_recipe("lavis/stage1")
    changed = differences(paper, lavis)
    assert changed["training.negatives"] == ("paper", "lavis-2023-02")
    assert changed["optimizer.warmup_steps"] == (2000, 5000) and changed["training.batch_size"] == (1680, 1600)
    assert paper.model == lavis.model and paper.training.label_smoothing == lavis.training.label_smoothing == 0.1
    second = read_recipe("paper/stage2-opt-2.7b")
    assert (second.training.steps, second.training.batch_size, second.training.label_smoothing) == (80_000, 1920, 0)
    assert second.optimizer.min_learning_rate == 5e-5


@pytest.mark.parametrize("setting", ["seed=99999999999999999999", "training.threads=100000"])
def test_numbers_that_no_machine_takes_are_refused(setting):
    with pytest.raises(BadRecipe, match="less than"):
        apply_overrides(read_recipe("mini/stage1"), [setting])


def test_a_recipe_that_is_not_utf8_is_told(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"name: \xe9t\xe9\n")
    with pytest.raises(BadRecipe, match="is not UTF-8"):
        read_recipe(tmp_path / "r.yaml")
