"""What was computed of a picture, kept for the next question about it.

    pixels                      -> image features          (the image encoder is not run again)
    features and instruction    -> visual prompt           (nor the Q-Former)
    visual prompt               -> the LLM's keys and values over it   (nor the LLM over the picture's part)

Keys are digests of contents, so the same picture is known again from another file, and another picture under the same
name is not taken for it. The least recently used goes when a bound is reached.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

DEFAULT_BYTES = 256 << 20
DEFAULT_ENTRIES = 256  # of small ones: memory is as it stays after the first few hundred pictures, not after thousands
ROWS_AT_ONCE = 16  # that a GPU digests: bounds the memory that takes


class ImageCache:
    """Tensors by key, up to so many bytes and entries; may be used from several threads.

    Attributes:
        max_bytes: what is kept at most; 0 keeps nothing.
        max_entries: how many of them.
        num_bytes: what is kept now.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES, max_entries: int = DEFAULT_ENTRIES) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
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
        """Keeps copies of tensors; of what is larger than the bound none."""
        size = sum(tensor.nbytes for tensor in tensors)
        with self._lock:
            if size > self.max_bytes or key in self._kept:
                return
            self._kept[key] = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)
            self.num_bytes += size
            while self.num_bytes > self.max_bytes or len(self._kept) > self.max_entries:
                _, gone = self._kept.popitem(last=False)
                self.num_bytes -= sum(tensor.nbytes for tensor in gone)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0


def digests(rows: Tensor) -> list[bytes]:
    """Sixteen bytes that stand for the contents of each row of (B, ...); those of one device are comparable.

    A GPU's rows stay there, for a copy to the host and its hash take as long as the Q-Former. They are hashed as by
    Lemire and Kaser's multilinear family ("Strongly universal string hashing is fast", 2014), four times: whoever does
    not know the secret numbers finds no two rows that are taken for each other, but with a chance of 2^-128.
    """
    if rows.device.type == "cpu":
        return [digest(row) for row in rows]
    hashed = torch.cat([multilinear(some) for some in rows.split(ROWS_AT_ONCE)])
    return [row.tobytes() for row in hashed.cpu().numpy()]


def multilinear(rows: Tensor) -> Tensor:
    """(B, 4) int32, each the upper half of a sum of a row's 32-bit words times secret numbers, modulo 2^64."""
    raw = rows.detach().flatten(1).contiguous().view(torch.uint8)
    words = torch.nn.functional.pad(raw, (0, -raw.shape[1] % 4)).view(torch.int32).long()  # (B, N)
    secret = secrets(words.shape[1] + 1, words.device)  # (4, 1 + N)
    return torch.stack([(words * numbers[1:]).sum(dim=1).add_(numbers[0]) >> 32 for numbers in secret], dim=1).int()


@lru_cache(maxsize=64)
def secrets(count: int, device: torch.device) -> Tensor:
    """Numbers (4, `count`) int64 that nobody knows outside of this process."""
    drawn = np.frombuffer(os.urandom(4 * count * 8), dtype=np.int64).reshape(4, count)
    return torch.from_numpy(drawn.copy()).to(device)


def digest(tensor: Tensor) -> bytes:
    """Sixteen bytes that stand for a tensor's contents."""
    raw = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).digest()
