"""What was computed of a picture, kept for the next question about it.

    pixels                      -> image features          (the image encoder is not run again)
    features and instruction    -> visual prompt           (nor the Q-Former)
    visual prompt               -> the LLM's keys and values over it   (nor the LLM over the picture's part)

Keys are digests of contents, so the same picture is known again from another file, and another picture under the same
name is not taken for it. The least recently used goes when a bound in bytes is reached.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

DEFAULT_BYTES = 256 << 20


class ImageCache:
    """Tensors by key, up to so many bytes; may be used from several threads.

    Attributes:
        max_bytes: what is kept at most; 0 keeps nothing.
        num_bytes: what is kept now.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> tuple[Tensor, ...] | None:
        """What was put under `key`; None where it is not, or no longer, there."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Keeps tensors, which must not be changed afterwards; what is larger than the bound is not kept at all."""
        size = sum(tensor.nbytes for tensor in tensors)
        with self._lock:
            if size > self.max_bytes or key in self._kept:
                return
            self._kept[key] = tuple(tensors)
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, gone = self._kept.popitem(last=False)
                self.num_bytes -= sum(tensor.nbytes for tensor in gone)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0


def digest(tensor: Tensor) -> bytes:
    """Sixteen bytes that stand for a tensor's contents."""
    raw = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).digest()
