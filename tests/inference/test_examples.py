"""The scripts in examples/ run as they stand."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "before", "num_lines"), [("caption.py", [], 3), ("search.py", ["a red cup"], 2), ("dialogue.py", [], 2)]
)
def test_an_example_runs(script, before, num_lines, tiny, images, tmp_path, monkeypatch, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mini").symlink_to(tiny.model)
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for image, path in zip(images, paths, strict=False):
        image.save(path)
    monkeypatch.setattr(sys, "argv", [script, *before, *(paths if before else paths[:1])])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.endswith("\n") and printed.count("\n") >= num_lines  # random words may hold line ends of their own


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"caption.py", "search.py", "dialogue.py"}
