"""benchmarks/stage1_step.py runs LAVIS's own code and ours on the same batch and insists that both compute the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stage1_step.py"
LAVIS = os.environ.get("BLIP2_LAVIS", "")


def run(*options: str | Path) -> subprocess.CompletedProcess:
    """The script at its tiny size."""
    command = [sys.executable, SCRIPT, "--size", "tiny", "--batch", "4", "--rounds", "2", "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.skipif(not LAVIS, reason="needs the original code: BLIP2_LAVIS=a checkout of salesforce/LAVIS")
def test_the_script_measures_both_sides_at_a_tiny_size(tmp_path):
    done = run("--lavis", LAVIS, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert "peak memory" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    ours, theirs = (found["checked"][side] for side in ("blip2", "lavis"))
    assert ours.keys() == theirs.keys() >= {"itc", "itm", "itg", "gradient of query_tokens"}
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert found["times_faster"] > 0 and min(found["peak_bytes"].values()) > 0


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    done = run("--lavis", tmp_path)
    assert done.returncode == 1
    assert "is no checkout of LAVIS" in done.stderr and "Traceback" not in done.stderr
