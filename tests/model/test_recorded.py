"""A pass that is replayed gives what it gives when it runs; which passes are recorded, and for how long."""

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from blip2.model import recorded
from blip2.model.recorded import MOST_SHAPES, SEEN_BEFORE, Recorded

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
WEIGHT = torch.zeros(1, device=DEVICE)


@dataclass
class _Rerun:
    """Stands for a graph where there is no GPU: computes on the recorded inputs, into the recorded results."""

    function: Any
    results: Any

    def replay(self):
        found = self.function()
        pairs = zip(self.results, found, strict=True) if isinstance(found, tuple) else [(self.results, found)]
        for own, new in pairs:
            own.copy_(new)


def _rerun(function, device):
    results = function()
    return _Rerun(function, results), results


def _recorded(function, *, most_rows=8):
    recorder = recorded.record if HAS_GPU else _rerun
    return Recorded(function, weights=lambda: WEIGHT, most_rows=most_rows, device=DEVICE, recorder=recorder)


def _inputs(rows=3, width=5):
    return torch.randn(rows, width, device=DEVICE), torch.randn(1, width, device=DEVICE)


@torch.inference_mode()
def test_replays_give_what_runs_give():
    def function(a, b):
        return a @ b.T, (a * b).sum(dim=1)

    replayed = _recorded(function)
    kept = []
    for _ in range(SEEN_BEFORE + 4):
        a, b = _inputs()
        expected, found = function(a, b), replayed(a, b)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        kept.append((found, expected))
    for found, expected in kept:  # no later replay wrote into an earlier one's result
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_shape_is_recorded_once_it_came_often_enough():
    ran = []

    def function(a, b):
        ran.append(a.shape)
        return a + b

    replayed = _recorded(function)
    for number in range(SEEN_BEFORE):
        replayed(*_inputs())
        assert len(ran) == number + 1 and not replayed._runs
    replayed(*_inputs())
    assert len(replayed._runs) == 1
    replayed(*_inputs(rows=4))  # another shape counts for itself
    assert len(replayed._runs) == 1


@torch.no_grad()
def test_the_shape_not_asked_for_longest_is_forgotten():
    replayed = _recorded(lambda a, b: a + b)

    def ask(width):
        a, b = _inputs(width=width)
        assert torch.equal(replayed(a, b), a + b)

    for width in range(1, MOST_SHAPES + 2):
        for _ in range(SEEN_BEFORE + 1):
            ask(width)
        ask(1)
    assert len(replayed._runs) == MOST_SHAPES
    widths = {shapes[2][1] for shapes in replayed._runs}
    assert 1 in widths and 2 not in widths


def test_what_may_not_be_recorded_runs_as_it_is():
    replayed = _recorded(lambda a, b: a + b, most_rows=3)
    for _ in range(SEEN_BEFORE + 2):
        with torch.no_grad():
            replayed(*_inputs(rows=4))
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                replayed(*_inputs())
        a, b = _inputs()
        replayed(a.requires_grad_(), b).sum().backward()
        assert a.grad is not None
    assert not replayed._runs
    elsewhere = Recorded(lambda a: a + 1, weights=lambda: WEIGHT, most_rows=8, device="meta")
    with torch.no_grad():
        assert all(torch.equal(elsewhere(a), a + 1) for a, _ in (_inputs() for _ in range(SEEN_BEFORE + 2)))


@torch.no_grad()
def test_a_pass_that_cannot_be_recorded_goes_on_running_and_says_so_once(caplog):
    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    replayed = Recorded(lambda a, b: a + b, weights=lambda: WEIGHT, most_rows=8, device=DEVICE, recorder=refuse)
    for _ in range(SEEN_BEFORE + 3):
        a, b = _inputs()
        assert torch.equal(replayed(a, b), a + b)
    assert len([record for record in caplog.records if "not permitted" in record.getMessage()]) == 1


def test_what_one_mode_recorded_any_mode_replays():
    replayed = _recorded(lambda a, b: a + b)
    with torch.inference_mode():
        for _ in range(SEEN_BEFORE + 1):
            replayed(*_inputs())
    assert replayed._runs
    a, b = _inputs()
    with torch.no_grad():
        assert torch.equal(replayed(a, b), a + b)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu_what_waits_for_the_device_runs_as_it_is():
    replayed = Recorded(lambda a: a * float(a.sum()), weights=lambda: WEIGHT, most_rows=8)
    for _ in range(SEEN_BEFORE + 3):
        a, _ = _inputs()
        assert torch.equal(replayed(a), a * float(a.sum()))
    assert not replayed._runs
    stream = torch.cuda.current_stream()
    assert stream == torch.cuda.default_stream()
    torch.multinomial(torch.ones(1, 5, device=DEVICE), 1)
    others = _recorded(lambda a, b: a + b)  # what failed keeps nobody else from being recorded
    for _ in range(SEEN_BEFORE + 1):
        a, b = _inputs()
        assert torch.equal(others(a, b), a + b)
    assert others._runs


@torch.no_grad()
def test_shapes_in_rotation_are_not_recorded_over_and_over(monkeypatch):
    monkeypatch.setattr(recorded, "MOST_SHAPES", 3)
    made = []

    def count(function, device):
        made.append(True)
        return _rerun(function, device)

    replayed = Recorded(lambda a: a + 1, weights=lambda: WEIGHT, most_rows=8, device=DEVICE, recorder=count)
    for _ in range(15):
        for width in range(1, 6):
            a, _ = _inputs(width=width)
            assert torch.equal(replayed(a), a + 1)
    assert len(made) == 5 and len(replayed._runs) == 3


@torch.no_grad()
def test_what_is_recorded_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(recorded, "MOST_BYTES", 3 * 2 * 3 * 4 * 4)  # about three of the runs below
    replayed = _recorded(lambda a, b: a + b)
    for width in range(4, 8):
        for _ in range(SEEN_BEFORE + 1):
            replayed(*_inputs(width=width))
    assert 1 <= len(replayed._runs) <= 3


@torch.no_grad()
def test_memory_that_is_short_keeps_nothing_from_being_recorded_later():
    asked = []

    def short(function, device):
        asked.append(True)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _rerun(function, device)

    replayed = Recorded(lambda a: a + 1, weights=lambda: WEIGHT, most_rows=8, device=DEVICE, recorder=short)
    for width in (3, 4):
        for _ in range(SEEN_BEFORE + 1):
            a, _ = _inputs(width=width)
            assert torch.equal(replayed(a), a + 1)
    assert len(replayed._runs) == 1


class _Part:
    def __init__(self):
        self.weight = torch.ones(1, device=DEVICE)
        recorder = recorded.record if HAS_GPU else _rerun
        self.recorded = Recorded(self.add, weights=lambda: WEIGHT, most_rows=8, device=DEVICE, recorder=recorder)

    def add(self, a):
        return a + self.weight


@torch.no_grad()
def test_a_method_does_not_keep_its_owner_alive():
    part = _Part()
    for _ in range(SEEN_BEFORE + 1):
        part.recorded(_inputs()[0])
    assert part.recorded._runs
    owner = weakref.ref(part)
    part.recorded._runs.clear()  # the stand-in for a graph holds the function; a graph does not
    gc.disable()
    try:
        del part
        assert owner() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_weights_elsewhere_are_recorded_anew():
    weight = [torch.ones(1, device=DEVICE)]
    recorder = recorded.record if HAS_GPU else _rerun
    replayed = Recorded(
        lambda a: a + weight[0], weights=lambda: weight[0], most_rows=8, device=DEVICE, recorder=recorder
    )
    for number in range(1, 3):
        weight[0] = torch.full((1,), float(number), device=DEVICE)
        for _ in range(SEEN_BEFORE + 1):
            a, _ = _inputs()
            assert torch.equal(replayed(a), a + number)
    assert len(replayed._runs) == 2
