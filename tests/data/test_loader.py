"""Items come in order whatever the number of workers, errors come with their cause, and no process is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from blip2.data.loader import LoaderFailed, OrderedLoader
from blip2.errors import BadSample


def item(position):
    rng = np.random.default_rng(position)
    return {"position": position, "pixels": rng.random((3, 40, 40), dtype=np.float32)}


def is_alive(pid):
    """Whether a process runs; one that ended and waits to be collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(is_so, seconds=20):
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


@pytest.mark.parametrize(("workers", "ahead"), [(0, 1), (1, 1), (2, 5), (3, 64)])
def test_items_are_the_same_and_in_order_for_any_number_of_workers(workers, ahead):
    with OrderedLoader(item, workers=workers, ahead=ahead) as loader:
        for first, end in ((0, 50), (17, 30), (5, 5)):
            found = list(loader.stream(first, end))
            assert [one["position"] for one in found] == list(range(first, end))
            assert all(np.array_equal(one["pixels"], item(one["position"])["pixels"]) for one in found)


def test_a_slow_item_holds_its_place():
    def slow(position):
        time.sleep(0.2 if position == 0 else 0)
        return position

    with OrderedLoader(slow, workers=3, ahead=8) as loader:
        assert list(loader.stream(0, 30)) == list(range(30))


def test_no_more_is_read_ahead_than_was_allowed(tmp_path):
    log = tmp_path / "read"
    log.touch()

    def noted(position):
        with open(log, "ab", buffering=0) as file:
            file.write(b".")
        return position

    with OrderedLoader(noted, workers=2, ahead=6) as loader:
        stream = loader.stream(0, 1000)
        for taken in range(1, 4):
            next(stream)
            assert wait_until(lambda taken=taken: log.stat().st_size >= taken + 6)
            assert log.stat().st_size == taken + 6


def test_a_stream_left_early_does_not_disturb_the_next():
    with OrderedLoader(item, workers=2, ahead=16) as loader:
        for _ in range(5):
            stream = loader.stream(0, 100)
            assert next(stream)["position"] == 0
            stream.close()
        assert [one["position"] for one in loader.stream(40, 60)] == list(range(40, 60))


def test_a_stream_that_another_one_follows_says_so():
    with OrderedLoader(item, workers=1, ahead=2) as loader:
        first = loader.stream(0, 9)
        next(first)
        next(loader.stream(3, 9))
        with pytest.raises(LoaderFailed, match="another stream was begun"):
            next(first)


def test_tensors_and_large_arrays_arrive_as_they_were():
    def read(position):
        # float32, a view with strides, bfloat16, and something of each kind
        base = torch.arange(300_000, dtype=torch.float32).reshape(3, 100, 1000) + position
        return base, base.permute(1, 0, 2), base[0].to(torch.bfloat16), ("text", np.zeros((0, 3)), np.arange(5))

    with OrderedLoader(read, workers=2, ahead=4) as loader:
        for position, found in enumerate(loader.stream(0, 4)):
            expected = read(position)
            assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))
            assert found[3][0] == "text" and found[3][1].shape == (0, 3) and np.array_equal(found[3][2], np.arange(5))
            found[0].add_(1)  # writable


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_turn_with_its_kind(workers):
    def read(position):
        if position == 7:
            raise BadSample("s7", "a.jpg", "is empty")
        return position

    with OrderedLoader(read, workers=workers, ahead=20) as loader:
        stream = loader.stream(0, 20)
        assert [next(stream) for _ in range(7)] == list(range(7))
        with pytest.raises(BadSample, match=r"a\.jpg is empty") as caught:
            next(stream)
        if workers:
            assert "in read" in str(caught.value.__cause__) and "test_loader.py" in str(caught.value.__cause__)
        assert list(loader.stream(8, 12)) == [8, 9, 10, 11]  # the workers are still there


def test_an_error_that_cannot_be_sent_comes_in_words():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def read(position):
        raise Odd("this", "that")

    with OrderedLoader(read, workers=1, ahead=2) as loader, pytest.raises(LoaderFailed, match="Odd: this and that"):
        next(loader.stream(0, 3))


def test_an_item_that_cannot_be_sent_is_an_error():
    with (
        OrderedLoader(lambda position: lambda: position, workers=1, ahead=2) as loader,
        pytest.raises(LoaderFailed, match="of type function cannot be sent"),
    ):
        next(loader.stream(0, 3))


def test_a_worker_killed_from_outside_is_noticed():
    with OrderedLoader(lambda position: (os.getpid(), time.sleep(0.01)), workers=2, ahead=4) as loader:
        stream = loader.stream(0, 10_000)
        pid, _ = next(stream)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LoaderFailed, match=rf"\(process {pid}\) was ended by signal 9\. Out of memory"):
            for _ in stream:
                pass
    assert not is_alive(pid)


def test_workers_end_with_the_block_though_they_are_busy():
    def read(position):
        if position > 3:
            time.sleep(60)
        return os.getpid()

    begin = time.monotonic()
    with OrderedLoader(read, workers=2, ahead=8) as loader:
        stream = loader.stream(0, 100)
        pids = {next(stream) for _ in range(3)}
    assert time.monotonic() - begin < 20
    assert not any(map(is_alive, pids))
    with pytest.raises(LoaderFailed, match="was closed"):
        next(stream)


def test_a_loader_that_nobody_closes_ends_its_workers_when_it_is_forgotten():
    loader = OrderedLoader(lambda position: os.getpid(), workers=1, ahead=1)
    pid = next(loader.stream(0, 1))
    assert is_alive(pid)
    del loader
    assert wait_until(lambda: not is_alive(pid))


def test_a_thread_can_read_the_stream_and_another_close_the_loader():
    loader = OrderedLoader(lambda position: time.sleep(30), workers=1, ahead=1)
    caught = []

    def take():
        try:
            next(loader.stream(0, 5))
        except LoaderFailed as error:
            caught.append(str(error))

    thread = threading.Thread(target=take)
    thread.start()
    assert wait_until(lambda: loader._crew is not None)
    loader.close()
    thread.join(10)
    assert not thread.is_alive() and "closed" in caught[0]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least"):
        OrderedLoader(item, workers=-1, ahead=1)
    with pytest.raises(ValueError, match="at least"):
        OrderedLoader(item, workers=1, ahead=0)


PROGRAM = """
import os, sys, time
import torch
torch.ones(200, 200) @ torch.ones(200, 200)  # the parent's threads have run
from blip2.data.loader import OrderedLoader

def read(position):
    (torch.ones(300, 300) @ torch.ones(300, 300)).sum()
    if position > 8:
        time.sleep(60)
    return os.getpid()

loader = OrderedLoader(read, workers=2, ahead=16)
stream = loader.stream(0, 1000)
print(*sorted({next(stream) for _ in range(8)}), flush=True)
if sys.argv[1] == "exit":
    sys.exit(0)
if sys.argv[1] == "raise":
    raise RuntimeError("the loop failed")
next(stream), next(stream)
"""


def hear_ctrl_c() -> None:
    """A shell starts what it puts into the background deaf to Ctrl-C, and so are these tests' programs then."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", ["exit", "raise", signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_however_the_program_ends(how):
    ends_itself = isinstance(how, str)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how if ends_itself else "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    assert program.stdout is not None
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert pids
    if how == signal.SIGINT:
        os.killpg(program.pid, how)  # Ctrl-C reaches the workers, too
    elif not ends_itself:
        program.send_signal(how)
    _, told = program.communicate(timeout=30)
    assert ("the loop failed" in told) == (how == "raise")
    assert wait_until(lambda: not any(map(is_alive, pids)), 5)


def test_a_worker_that_is_ended_before_it_has_begun_does_nothing_of_this_process(tmp_path):
    """The command line's handler leaves through all that is open, which is the parent's alone."""
    is_ended = [True]
    os.register_at_fork(after_in_child=lambda: is_ended[0] and os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "left").touch())
    try:
        with OrderedLoader(str, workers=1, ahead=2) as loader, pytest.raises(LoaderFailed, match="signal 15"):
            list(loader.stream(0, 3))
    finally:
        is_ended[0] = False
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "left").exists()
