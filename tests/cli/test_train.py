"""blip2 train: what it prints and refuses before anything is trained, and how a run that was stopped leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest
from training.tiny_blip2 import make_parts, tiny_recipe

from blip2.cli import main
from blip2.training.progress import read_metrics
from blip2.training.recipe import apply_overrides, to_yaml

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


def test_a_batch_that_cannot_be_dealt_out_is_refused_before_processes_are_started(monkeypatch, capsys, recipe_file):
    monkeypatch.setattr("blip2.distributed.launch_again", lambda devices: pytest.fail("processes were started"))
    assert blip2(monkeypatch, "train", recipe_file, "--devices", "3") == 2
    assert "training.batch_size 4 in 1 parts cannot be dealt to 3 processes" in capsys.readouterr().err


def test_more_gpus_than_there_are_are_refused(monkeypatch, capsys, recipe_file):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.execv", lambda *command: pytest.fail("processes were started"))
    assert blip2(monkeypatch, "train", recipe_file, "--devices", "4") == 2
    assert "--devices is 4, and this machine has 2 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(("stop", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_was_stopped_says_so_by_its_exit_code(tmp_path, stop, code):
    (tmp_path / "parts").mkdir()
    make_parts(tmp_path / "parts")
    recipe = apply_overrides(tiny_recipe(tmp_path / "parts", "stage1", steps=100_000), ["training.log_every=1"])
    (tmp_path / "tiny.yaml").write_text(to_yaml(recipe))
    process = subprocess.Popen(
        [sys.executable, "-m", "blip2", "train", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")],
        env=os.environ | {"BLIP2_HOME": str(tmp_path / "home")},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "run"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.Signals[stop])
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    assert f"Stopped by {stop} after step" in told and "Run the same command again" in told
    assert "Traceback" not in told
