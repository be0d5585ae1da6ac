"""From pictures as people give them to what the image encoder reads, on the device where it is."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

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
            another processor does that work.

    Raises:
        MissingFile, BadImage: as `load_image`.
    """
    if not reads_ahead or len(images) == 1:
        yield _on_device([transform.resize(load_image(image)) for image in images], transform, device)
        return
    with ThreadPoolExecutor(READERS, thread_name_prefix="blip2 pictures") as readers:
        ready = readers.map(lambda image: transform.resize(load_image(image)), images)
        while some := list(islice(ready, AT_ONCE)):
            yield _on_device(some, transform, device)


def _on_device(resized: Sequence[Tensor], transform: ImageTransform, device: torch.device) -> Tensor:
    return transform.normalise(torch.stack([*resized]).to(device))
