"""blip2 train: what it prints and what it refuses, before anything is trained."""

import sys

import pytest

from blip2.cli import main

RECIPE = """
stage: stage1
name: trial
data: {mixture: [{split: train_pairs}]}
training: {steps: 10, batch_size: 4}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(RECIPE)
    return str(path)


def blip2(monkeypatch, *arguments):
    """Runs the command line; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["blip2", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code


def test_show_prints_the_resolved_recipe_with_flags_before_settings(monkeypatch, capsys, tmp_path, recipe_file):
    data = tmp_path / ("a long name " * 12) / "my #data: 1"
    code = blip2(
        monkeypatch, "train", recipe_file, "--show", "--steps", "7", "--learning-rate", "3e-5", "--data", str(data),
        "--set", "optimizer.weight_decay=0.1", "--set", "training.steps=9",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0
    for line in ("  steps: 7\n", "  learning_rate: 3.0e-05\n", "  weight_decay: 0.1\n", str(data)):
        assert line in shown
    assert "# Optimiser steps of the whole run.\n" in shown


def test_data_is_a_folder_where_there_is_one_and_else_a_name(monkeypatch, capsys, tmp_path, recipe_file):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, folder in (("here", str(tmp_path / "here")), ("open-pairs-zh", "open-pairs-zh")):
        assert blip2(monkeypatch, "train", recipe_file, "--show", "--data", given) == 0
        assert f"  folder: {folder}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optimizer.weight_dcay=1"], "did you mean optimizer.weight_decay?"),
        (["--steps", "0"], "training.steps is 0: input should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_with_exit_code_2(monkeypatch, capsys, recipe_file, arguments, message):
    assert blip2(monkeypatch, "train", recipe_file, "--show", *arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("blip2: ") and message in told.err
    assert len(told.err.splitlines()) == 1


def test_an_unknown_recipe_is_refused_with_the_known_ones(monkeypatch, capsys):
    assert blip2(monkeypatch, "train", "mini/stage9") == 2
    assert "There is no built-in recipe 'mini/stage9'" in capsys.readouterr().err
