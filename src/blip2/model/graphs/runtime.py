"""Runs what a `graph.ModelFile` describes.

LiteRT lays the weights out for this processor once, into a file that is mapped: the system may take its pages back
where memory is short, and reads them again.
"""

import atexit
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.cpu_options import CpuOptions
from ai_edge_litert.environment import Environment
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options
from ai_edge_litert.tensor_buffer import TensorBuffer
from torch import Tensor

ROWS_AT_ONCE = 512  # of a product: bounds the memory for what lies between
ALIGNED, FLOAT_BYTES = 64, 4

NOTHING: Mapping[str, "Tensor | Memory"] = MappingProxyType({})

_silence = threading.Lock()

Widths = dict[str, int]


class Memory:
    """A tensor's numbers, contiguous, for LiteRT to read where they are, as often as it runs."""

    def __init__(self, x: Tensor) -> None:
        self._there = x.detach().numpy().reshape(-1)
        is_aligned = self._there.ctypes.data % ALIGNED == 0
        self._array = self._there if is_aligned else _aligned(self._there.size)
        self._buffer = TensorBuffer.create_from_host_memory(self._array)

    def read(self) -> tuple[np.ndarray, TensorBuffer]:
        """What it holds now; a copy where LiteRT cannot read it in its place."""
        if self._array is not self._there:
            np.copyto(self._array, self._there)
        return self._array, self._buffer


class Runtime:
    """Signatures ready to be run, one at a time whichever thread asks.

    Args:
        path: of the model; it may be deleted afterwards.
        shapes: the widths of inputs and outputs of each signature.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[Widths, Widths]]) -> None:
        self._laid_out = path.with_name("laid-out")
        processor = CpuOptions(num_threads=torch.get_num_threads())
        processor.xnnpack_weight_cache_path = str(self._laid_out)
        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=processor)
        with _silent_stderr():
            self._model = CompiledModel.from_file(str(path), environment=_environment(), options=options)
            self._model.create_input_buffers(0)[0].write(np.zeros(1, np.float32))  # the first of a process tells
        _let_go(_mapped(path))  # of what was laid out they are not read again
        self._shapes = shapes
        self._places = {name: self._model.get_signature_index(name) for name in shapes}
        found = {name: self._model.get_signature_by_index(place) for name, place in self._places.items()}
        self._order = {name: (one["inputs"], one["outputs"]) for name, one in found.items()}
        self._weights_at: list[tuple[int, int]] = []
        self._sizes: dict[tuple[str, int], int] = {}
        self._arrays: dict[tuple[str, int], tuple[np.ndarray, TensorBuffer]] = {}
        self._lock = threading.Lock()

    def run(self, name: str, held: Mapping[str, Tensor | Memory] = NOTHING, /, **inputs: Tensor) -> list[Tensor]:
        """The outputs (R, width) of a signature for inputs (R, width), float32, in the order they were named in.

        Args:
            held: inputs in memory of their own, contiguous, that are read where they are.
        """
        (num_rows,) = {len(x) for x in inputs.values()}
        (given, taken), (given_order, taken_order) = self._shapes[name], self._order[name]
        if num_rows == 0:
            return [torch.zeros(0, width) for width in taken.values()]
        kept = {key: (x if isinstance(x, Memory) else Memory(x)).read() for key, x in held.items()}
        with self._lock:
            arguments = []
            for i, key in enumerate(given_order):
                array, buffer = kept[key] if key in kept else self._array(f"{key} in", num_rows * given[key])
                if self._sizes.get((name, i)) != array.size:
                    self._model.resize_input_tensor(i, [array.size], self._places[name])
                    self._sizes[name, i] = array.size
                if key in inputs:
                    np.copyto(array.reshape(num_rows, -1), inputs[key].detach().numpy())
                arguments.append(buffer)
            results = [self._array(f"{key} out", num_rows * taken[key]) for key in taken_order]
            self._model.run_by_index(self._places[name], arguments, [one[1] for one in results])
            found = {
                key: array.reshape(num_rows, -1).copy() for key, (array, _) in zip(taken_order, results, strict=True)
            }
        return [torch.from_numpy(found[key]) for key in taken]

    def run_rows(self, name: str, **inputs: Tensor) -> list[Tensor]:
        """As `run`, of a signature whose rows do not look at each other: some at a time."""
        if max(len(x) for x in inputs.values()) <= ROWS_AT_ONCE:
            return self.run(name, **inputs)
        parts = zip(*(x.split(ROWS_AT_ONCE) for x in inputs.values()), strict=True)
        found = [self.run(name, **dict(zip(inputs, part, strict=True))) for part in parts]
        return [torch.cat(pieces) for pieces in zip(*found, strict=True)]

    def let_go(self) -> None:
        """Takes the weights out of this process's memory until they are used again, which costs little where the system
        still has them."""
        self._weights_at = self._weights_at or _mapped(self._laid_out)
        _let_go(self._weights_at)

    def _array(self, key: str, size: int) -> tuple[np.ndarray, TensorBuffer]:
        """Numbers that LiteRT reads or writes where they are, which signatures share; the last size of each is kept."""
        found = self._arrays.get((key, size))
        if found is None:
            self._arrays = {other: kept for other, kept in self._arrays.items() if other[0] != key}
            array = _aligned(size)
            found = self._arrays[key, size] = array, TensorBuffer.create_from_host_memory(array)
        return found


def _aligned(size: int) -> np.ndarray:
    """So many float32 from where LiteRT can read and write them."""
    room = np.empty(size * FLOAT_BYTES + ALIGNED, np.uint8)
    begin = -room.ctypes.data % ALIGNED
    return room[begin : begin + size * FLOAT_BYTES].view(np.float32)


@cache
def _environment() -> Environment:
    """What all models of the process share. It is never let go of, for it tells of that too, and so does another one
    that the library makes for itself and ends with the process."""
    environment = Environment.create()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment))
    atexit.register(_to_nowhere)
    return environment


def _to_nowhere() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """LiteRT tells of accelerators that it does not find, and nothing makes it silent. What it says when it fails is
    in its exception."""
    with _silence:
        sys.stderr.flush()
        kept = os.dup(2)
        _to_nowhere()
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _mapped(path: Path) -> list[tuple[int, int]]:
    """Where a file's parts lie in memory, and their lengths; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not (hasattr(mmap, "MADV_DONTNEED") and maps.exists()):
        return []
    found, names = [], (f" {path.resolve()}", f" {path.resolve()} (deleted)")
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith(names):
            begin, end = (int(number, 16) for number in line.partition(" ")[0].split("-"))
            found.append((begin, end - begin))
    return found


def _let_go(parts: list[tuple[int, int]]) -> None:
    """Takes parts of a file out of this process's memory: what is used is read again."""
    for begin, length in parts:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
