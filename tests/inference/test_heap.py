"""What was freed goes back to the system, also where something that stays lies above it."""

from itertools import pairwise
from pathlib import Path

import pytest
from parity.hf_checkpoints import pictures

from blip2.inference import heap

COUNT, SIZE = 4000, 16 << 10


def _resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(heap._malloc_trim() is None, reason="only glibc can be asked")
def test_holes_in_the_heap_are_given_back():
    heap.give_back()
    before = _resident()
    blocks = [bytearray(b"1" * SIZE) for _ in range(COUNT)]  # too small for pages of their own
    staying = blocks[:: COUNT // 20]
    full = _resident() - before
    del blocks
    heap.give_back()
    assert full > 0.9 * COUNT * SIZE
    assert _resident() - before < 0.2 * full
    assert len(staying) == 20


def test_it_takes_half_a_percent_of_the_time(monkeypatch):
    clock, asked = [0.0], []

    def give_back():
        asked.append(clock[0])
        clock[0] += 0.1

    monkeypatch.setattr(heap.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(heap, "give_back", give_back)
    holes = heap.Holes()
    for _ in range(100):
        clock[0] += 1
        holes.after(1)
    assert asked[0] in (6, 7), "it is taken to be 0.03 s, before it was measured"
    gaps = [after - before for before, after in pairwise(asked)]
    assert len(gaps) == 4 and all(20 <= gap < 21.5 for gap in gaps), "and 0.1 s after that"


def test_only_pictures_that_are_encoded_count(model, monkeypatch):
    told = []
    monkeypatch.setattr(model._holes, "after", told.append)
    model.image_cache.clear()
    for image in pictures(3):
        model.image_features(image)
        model.image_features(image)  # which is known
    assert len(told) == 3 and min(told) > 0
