"""From pictures as people give them to what the image encoder reads, on the device where it is."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from blip2.preprocessing.images import ImageSource, ImageTransform, load_image

READERS = min(8, os.cpu_count() or 1)  # threads; each may hold a large picture
AT_ONCE = 16  # pictures that a GPU begins with while the next are read


def pixel_values(
    images: Sequence[ImageSource], transform: ImageTransform, device: torch.device, *, reads_ahead: bool
) -> Iterator[Tensor]:
    """Pixel values (b, 3, S, S) on `device`, some pictures at a time, in the order given.

    Args:
        images: at least one.
        transform: what makes pixels of a picture; how many bits it sends to the device is its own affair.
        device: where they go.
        reads_ahead: whether threads read the next pictures while the caller works on those that it has: right where
            another processor does that work. An image that is there twice is read once.

    Raises:
        MissingFile, BadImage: as `load_image`.
    """
    if not reads_ahead or len(images) == 1:
        yield _on_device([_resized(image, transform) for image in images], transform, device)
        return
    with ThreadPoolExecutor(READERS, thread_name_prefix="blip2 pictures") as readers:
        distinct = {id(image): image for image in images}
        reading = {key: readers.submit(_resized, image, transform) for key, image in distinct.items()}
        try:
            for first in range(0, len(images), AT_ONCE):
                some = [reading[id(image)].result() for image in images[first : first + AT_ONCE]]
                yield _on_device(some, transform, device)
        finally:
            readers.shutdown(cancel_futures=True)


def _resized(image: ImageSource, transform: ImageTransform) -> Tensor:
    return transform.resize(load_image(image))


def _on_device(resized: Sequence[Tensor], transform: ImageTransform, device: torch.device) -> Tensor:
    return transform.normalise(torch.stack([*resized]).to(device))
