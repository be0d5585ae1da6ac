"""`blip2 bench`: both sides say the same, every measure is there, and what fails is told."""

import json
from pathlib import Path

import pytest
from inference.tiny_model import make_tiny_model
from parity.hf_checkpoints import make
from typer.testing import CliRunner

from blip2.cli.main import app
from blip2.errors import UserError
from blip2.evaluation import speed, speed_report

MEASURES = {"start", "vision", "first_token", "second_question", "caption", "token", "image_of_3", "own_bytes"}


def run(*arguments):
    """A command of blip2; an error is raised."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A comparison with transformers, and the folder it was saved to."""
    root = tmp_path_factory.mktemp("bench")
    checkpoint = make("blip2-opt", root / "checkpoint").folder
    out = root / "out"
    result = run("bench", "--model", checkpoint, "--runs", 2, "--tokens", 4, "--batch", 3, "--json", "--out", out)
    return json.loads(result.stdout), out


def test_both_sides_say_the_same_and_every_measure_is_there(found):
    told, _ = found
    ours, peer = told["contenders"]
    assert (ours["kind"], peer["kind"]) == ("blip2", "transformers")
    assert set(told["same_text"].values()) == {1.0}
    for contender in (ours, peer):
        assert contender["measures"].keys() >= MEASURES
        assert len(contender["measures"]["caption"]["values"]) == 2
        for measure in contender["measures"].values():
            assert (
                0 < measure["least"] <= measure["median"] <= measure["most"]
                or measure is contender["measures"]["token"]
            )
    ratio = told["ratios"][ours["name"]]["caption"]
    assert ratio == peer["measures"]["caption"]["median"] / ours["measures"]["caption"]["median"]


def test_the_report_is_for_people_and_programs(found):
    told, out = found
    assert json.loads((out / "bench.json").read_text()) == told
    assert (out / "bench.png").stat().st_size > 5000
    table = (out / "bench.md").read_text()
    assert "| second question to first word |" in table and "a picture of 3 in one call" in table
    assert "100%" in speed_report.as_text(told) and "2 rounds" in table


def test_our_own_models_peer_is_their_parts_one_after_the_other(tmp_path):
    folder = make_tiny_model(tmp_path).model
    result = run("bench", "--model", folder, "--runs", 1, "--tokens", 3, "--json", "--quiet")
    told = json.loads(result.stdout)
    assert [contender["kind"] for contender in told["contenders"]] == ["blip2", "plain"]
    assert set(told["same_text"].values()) == {1.0}


def test_what_cannot_run_is_told(tmp_path):
    with pytest.raises(UserError, match="is no checkpoint"):
        run("bench", "--model", make_tiny_model(tmp_path).model, "--peer", tmp_path)
    plan = speed.Plan(runs=1, num_tokens=2)
    with pytest.raises(UserError, match="plain nowhere"):
        speed.compare([speed.Contender("plain", str(Path("/nowhere")))], plan, lambda _: None)


def test_pictures_repeat_by_seed_and_differ_otherwise():
    assert speed.picture(3).tobytes() == speed.picture(3).tobytes() != speed.picture(4).tobytes()
