"""A run that is killed or stopped at any moment ends as if nothing had happened."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from blip2.training.progress import TIMING, read_metrics
from blip2.training.state import MODEL, OPTIMIZER, STATE, newest_checkpoint, read_state

from .tiny_run import run_tiny, start_process


def outcome(run_dir: Path) -> dict:
    """All that a run leaves, but for how long it took."""
    checkpoint = newest_checkpoint(run_dir)
    state = json.loads((checkpoint / STATE).read_text())
    del state["counters"]["seconds"], state["counters"]["waited"]
    lines = [{name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(run_dir)]
    files = {name: (checkpoint / name).read_bytes() for name in (MODEL, OPTIMIZER)}
    return {"checkpoint": checkpoint.name, "state": state, "lines": lines, **files}


SETTINGS = ("training.checkpoint_every=3",)  # so that many kills fall into the writing of a checkpoint


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    run_tiny(run_dir, SETTINGS)
    return outcome(run_dir)


def kill_at_random(run_dir: Path, chance: random.Random, last_step: int) -> int:
    """Starts the run and kills it with SIGKILL at a random step and moment; returns its exit code."""
    process, listen = start_process(run_tiny, run_dir, SETTINGS)
    try:
        until = listen.recv() + chance.randrange(1, last_step)
        while listen.recv() < until:
            pass
        moment = time.monotonic() + chance.uniform(0, 0.02)  # a step, or writing a checkpoint, takes a few ms
        while time.monotonic() < moment:
            pass
    except EOFError:
        pass  # the run was quicker than the kill
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("seed", [0, 1])
def test_five_kills_at_random_leave_the_result_of_an_uninterrupted_run(tmp_path, uninterrupted, seed):
    chance = random.Random(seed)
    kills = [kill_at_random(tmp_path, chance, last_step=15) for _ in range(5)]
    assert kills.count(-9) >= 3, "the run was over before it could be killed"
    assert run_tiny(tmp_path, SETTINGS).finished
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.slow
def test_fifty_kills_always_leave_a_complete_checkpoint_to_go_on_from(tmp_path, uninterrupted):
    chance = random.Random(2)
    reached = 0
    for _ in range(50):
        kill_at_random(tmp_path, chance, last_step=5)
        newest = newest_checkpoint(tmp_path)
        step = read_state(newest)["step"] if newest else 0
        assert step >= reached, "a kill lost a checkpoint"
        reached = step
    assert run_tiny(tmp_path, SETTINGS).finished
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize("stop", ["SIGTERM", "SIGINT"])
def test_a_run_told_to_stop_finishes_its_step_saves_and_leaves(tmp_path, uninterrupted, stop):
    process, listen = start_process(run_tiny, tmp_path, SETTINGS)
    while listen.recv() < 20:
        pass
    os.kill(process.pid, signal.Signals[stop])
    process.join()
    assert process.exitcode == 0
    step = read_state(newest_checkpoint(tmp_path))["step"]
    assert 19 <= step < 60, "the step under way is finished, and no other begun"
    run_tiny(tmp_path, SETTINGS)
    assert outcome(tmp_path) == uninterrupted
