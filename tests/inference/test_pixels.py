"""Pictures that are read ahead are those that are read one after the other, in their order."""

import threading

import pytest
import torch
from parity.hf_checkpoints import pictures

from blip2.errors import BadImage
from blip2.inference import pixels
from blip2.inference.pixels import AT_ONCE, batches
from blip2.preprocessing.images import ImageTransform

TRANSFORM = ImageTransform(28, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


@pytest.mark.parametrize("count", [1, 2, AT_ONCE, 2 * AT_ONCE + 3])
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_pixels_are_those_of_each_picture(count, reads_ahead):
    images = pictures(count)
    parts = list(batches(images, TRANSFORM, reads_ahead=reads_ahead))
    assert torch.equal(torch.cat(parts), torch.stack([TRANSFORM.resize(image) for image in images]))
    assert len(parts) == (-(-count // AT_ONCE) if reads_ahead else 1)


def test_the_next_pictures_are_read_while_the_caller_works(monkeypatch):
    readers, read = set(), threading.Semaphore(0)

    def load(image):
        readers.add(threading.current_thread())
        read.release()
        return image

    monkeypatch.setattr(pixels, "load_image", load)
    parts = batches(pictures(2 * AT_ONCE), TRANSFORM, reads_ahead=True)
    next(parts)
    for _ in range(2 * AT_ONCE):  # also those of the second part, which nobody has asked for yet
        assert read.acquire(timeout=60)
    assert threading.current_thread() not in readers
    assert len(list(parts)) == 1


def test_a_broken_picture_among_them_is_told():
    images = [*pictures(3), b"no picture", *pictures(2)]
    with pytest.raises(BadImage):
        list(batches(images, TRANSFORM, reads_ahead=True))


def test_a_picture_that_is_there_twice_is_read_once(monkeypatch):
    one, other = pictures(2)
    read = []
    monkeypatch.setattr(pixels, "load_image", lambda image: read.append(image) or image)
    (found,) = batches([one, other, one, one], TRANSFORM, reads_ahead=True)
    assert len(read) == 2
    assert torch.equal(found, torch.stack([TRANSFORM.resize(image) for image in (one, other, one, one)]))
