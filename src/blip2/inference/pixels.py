"""From pictures as people give them to the pixels that the device of the image encoder is sent: eight bits each."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from blip2.preprocessing.images import ImageSource, ImageTransform, load_image

READERS = min(8, os.cpu_count() or 1)  # threads; each may hold a large picture
AT_ONCE = 16  # pictures that a GPU begins with while the next are read


def resized(image: ImageSource, transform: ImageTransform) -> Tensor:
    """Pixels (S, S, 3), uint8.

    Raises:
        MissingFile, BadImage: as `load_image`.
    """
    return transform.resize(load_image(image))


def batches(images: Sequence[ImageSource], transform: ImageTransform, *, reads_ahead: bool) -> Iterator[Tensor]:
    """Pixels (b, S, S, 3), uint8, some pictures at a time, in the order given.

    Args:
        images: at least one.
        transform: what makes pixels of a picture.
        reads_ahead: whether threads read the next pictures while the caller works on those that it has: right where
            another processor does that work. An image that is there twice is read once.

    Raises:
        MissingFile, BadImage: as `load_image`.
    """
    if not reads_ahead or len(images) == 1:
        yield torch.stack([resized(image, transform) for image in images])
        return
    with ThreadPoolExecutor(READERS, thread_name_prefix="blip2 pictures") as readers:
        distinct = {id(image): image for image in images}
        reading = {key: readers.submit(resized, image, transform) for key, image in distinct.items()}
        try:
            for first in range(0, len(images), AT_ONCE):
                yield torch.stack([reading[id(image)].result() for image in images[first : first + AT_ONCE]])
        finally:
            readers.shutdown(cancel_futures=True)
