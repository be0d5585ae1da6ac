"""What was freed goes back to the system, also where something that stays lies above it."""

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


def test_it_is_done_once_in_so_many_pictures(model, monkeypatch):
    asked = []
    monkeypatch.setattr(heap, "PICTURES", 5)
    monkeypatch.setattr(heap, "give_back", lambda: asked.append(True))
    monkeypatch.setattr(model, "_num_encoded", 0)
    images = pictures(9)
    model.image_cache.clear()
    for image in images:
        model.image_features(image)
        model.image_features(image)  # which is known
    assert len(asked) == 1
