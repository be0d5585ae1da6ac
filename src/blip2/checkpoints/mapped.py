"""Weights of a safetensors file, mapped into memory, whose memory can be given back after each use.

A mapped file's pages count as a process's memory once they are read. What an image encoder reads once a picture need
not stay: the kernel finds it again in its own cache of files.
"""

import json
import mmap
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

CAN_LET_GO = sys.platform == "linux" and hasattr(mmap, "MADV_DONTNEED")
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedFile:
    """A safetensors file in one private mapping. Its tensors must not be written to: that would be lost.

    Args:
        path: the file.

    Raises:
        SafetensorError: it is no whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):  # the library checks sizes and offsets
            pass
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(self._mapping[:8], "little")
        header = json.loads(self._mapping[8 : 8 + length])
        header.pop("__metadata__", None)
        self._header = header
        self._data = 8 + length

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, none of them read yet."""
        return {name: self._tensor(name) for name in self._header}

    def _tensor(self, name: str) -> Tensor:
        told = self._header[name]
        dtype, (begin, end) = DTYPES[told["dtype"]], told["data_offsets"]
        if begin == end:
            return torch.empty(told["shape"], dtype=dtype)
        count = (end - begin) // dtype.itemsize
        return torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=self._data + begin).view(told["shape"])

    def let_go_after(self, module: nn.Module, name: str) -> None:
        """From now on the memory of the tensor `name` is given back each time `module` has computed."""
        begin, end = (self._data + offset for offset in self._header[name]["data_offsets"])
        begin -= begin % mmap.PAGESIZE
        module.register_forward_hook(lambda *_: self._mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin))
