"""The table, the files and the plots from given figures."""

import json

import pytest

from blip2.evaluation.benchmarks.open_pairs_table import PLOTS, ROWS
from blip2.evaluation.report import Bars, Row, as_markdown, as_text, save, table

METRICS = {"vqa/new/accuracy": 0.5, "vqa/blind/accuracy": 0.26, "baselines/prior/new": 0.125}
COUNTS = {"vqa/new": (1000, 6000), "vqa/blind": (1000, 1000)}


def test_a_row_shows_what_is_wanted_and_what_stands_beside_it():
    row = Row("questions", "vqa/new/accuracy", {"prior": "baselines/prior/new", "absent": "x"}, wanted=0.8, goal=0.9)
    assert table([row], METRICS, COUNTS) == [
        ("questions", "1,000 of 6,000", "50.0", "80.0", "90.0", "missed", "prior 12.5")
    ]
    assert table([Row("questions", "vqa/new/accuracy", wanted=0.5)], METRICS, COUNTS)[0][5] == ""


@pytest.mark.parametrize(("margin", "verdict"), [(0.25, "missed"), (0.24, "")])
def test_blind_has_to_stay_below_seeing(margin, verdict):
    row = Row("blind", "vqa/blind/accuracy", at_most_below=("vqa/new/accuracy", margin))
    (cells,) = table([row], METRICS, COUNTS)
    assert (cells[1], cells[3], cells[5]) == ("1,000", f"<= {100 * (0.5 - margin):.1f}", verdict)


def test_what_was_not_measured_has_no_row():
    assert table([Row("captions", "captions/x")], METRICS, COUNTS) == []


def test_the_columns_line_up_and_the_markdown_is_a_table():
    rows = [Row("a", "vqa/new/accuracy", wanted=0.8), Row("a longer title", "vqa/blind/accuracy")]
    cells = table(rows, METRICS, COUNTS)
    lines = as_text(cells).splitlines()
    assert lines[1].index("50.0") == lines[2].index("26.0")
    markdown = as_markdown(cells).splitlines()
    assert markdown[1].startswith("| ---") and all(line.count("|") == 8 for line in markdown)


def test_files_are_written_whole_and_hold_the_fractions(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Row("a", "vqa/new/accuracy")]
    plots = {"a.png": [Bars("a", ("accuracy",), {"seeing": "vqa/new", "blind": "vqa/blind"})], "none.png": []}
    out = tmp_path / "new" / "folder"
    written = save(out, table(rows, METRICS, COUNTS), METRICS, COUNTS, plots, {"model": "tiny"})
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in written)
    described = json.loads((out / "evaluation.json").read_text())
    assert described["model"] == "tiny" and described["metrics"] == METRICS
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "none.png").exists()


def test_the_open_sets_rows_and_bars_name_each_metric_once():
    keys = [row.key for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert all(panel.names and panel.series for panels in PLOTS.values() for panel in panels)
