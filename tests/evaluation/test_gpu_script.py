"""benchmarks/gpu.py runs from its beginning to its end, here on a tiny checkpoint and without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from parity.hf_checkpoints import made_on_first_use

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_script_measures_a_tiny_checkpoint_on_a_cpu(tmp_path_factory, tmp_path):
    folder = made_on_first_use(tmp_path_factory)("blip2-opt").folder
    command = [sys.executable, SCRIPT, "--work", tmp_path, "--model", folder, "--device", "cpu", "--dtype", "float32"]
    more = ["--runs", "1", "--tokens", "3", "--batch", "2"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "whole caption" in done.stdout and "second caption" in done.stdout
    found = json.loads((tmp_path / "gpu-results" / "bench.json").read_text())
    assert found["same_text"].popitem()[1] == 1.0 and found["start"]["load"] > 0
    assert {"caption", "image_of_2"} <= found["contenders"][0]["measures"].keys()
