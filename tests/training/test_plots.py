"""Curves are drawn to PNG files, and a metric that a run lacks is refused by name."""

import pytest
from PIL import Image

from blip2.errors import BadData
from blip2.training.plots import compare_runs, draw_run

LINES = [{"kind": "train", "step": step, "loss": 1 / step, "itc": 0.5 / step, "seconds": step} for step in range(1, 9)]
LINES.append({"kind": "evaluate", "step": 8, "accuracy": 0.5})


def test_a_run_s_curves_make_a_picture(tmp_path):
    draw_run(LINES, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.width > 500
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_run_without_a_line_yet_draws_nothing(tmp_path):
    draw_run([], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_runs_are_compared_on_one_metric(tmp_path):
    compare_runs({"with stage 1": LINES, "without": LINES[::2]}, "loss", tmp_path / "both.png", title="Stage 2")
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.format == "PNG"


def test_a_metric_that_a_run_lacks_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(BadData, match=r"The run mine has no metric bleu. It has: accuracy, itc, loss, seconds"):
        compare_runs({"mine": LINES}, "bleu", tmp_path / "x.png")
