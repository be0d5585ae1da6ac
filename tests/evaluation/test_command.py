"""`blip2 evaluate` as it is typed: the table, the JSON object, the files, and what it refuses."""

import json

import pytest
import typer
from inference.tiny_model import make_tiny_model
from typer.testing import CliRunner

from blip2.cli.evaluate import evaluate
from blip2.errors import MissingFile, MissingPart, UnknownModel

app = typer.Typer()
app.command()(evaluate)


@pytest.fixture
def command(tiny, open_pairs, tmp_path, monkeypatch):
    """Runs the command on the tiny model and data set; the home folder is empty."""
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path / "home"))

    def run(*arguments, model=tiny.model, data=open_pairs):
        return CliRunner().invoke(app, ["--model", str(model), "--data", str(data), *arguments])

    return run


def test_json_prints_one_object_of_fractions(command):
    result = command("--task", "retrieval", "--task", "vqa", "--json", "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    metrics = json.loads(result.stdout)
    assert {"retrieval/held_out_style/image_to_text_r1", "vqa/blind/accuracy"} <= metrics.keys()
    assert not any(name.startswith(("captions", "easy_vqa", "baselines")) for name in metrics)
    assert all(0 <= value <= 1 for value in metrics.values())


def test_the_table_is_printed_and_files_are_written_where_asked(command, tmp_path):
    pytest.importorskip("matplotlib")
    result = command("--task", "vqa", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert "new scenes, questions" in result.stdout and "answers: " in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "table.md", "vqa.png"]


def test_a_limit_is_marked_in_the_table_and_told(command):
    result = command("--task", "easy_vqa", "--limit", "3")
    assert "3 of 12" in result.stdout
    assert "Only a part was used of easy_vqa/test, easy_vqa/blind" in result.stderr


def test_a_model_without_a_part_is_measured_by_the_rest(command, tmp_path):
    parts = make_tiny_model(tmp_path, parts=("generation",))
    with pytest.raises(MissingPart, match="lacks the retrieval part, which the task retrieval needs"):
        raise command("--task", "retrieval", model=parts.model).exception
    result = command("--task", "captions", model=parts.model)
    assert result.exit_code == 0 and "captions name the noun" in result.stdout


def test_what_is_not_there_is_named(command, tmp_path):
    with pytest.raises(MissingFile, match="blip2 data build"):
        raise command(data=tmp_path).exception
    with pytest.raises(UnknownModel, match="nobody"):
        raise command(model="nobody").exception
