"""Passes that a GPU records once for each shape and then replays.

At batch 1 the image encoder, the Q-Former and the LLM's pass over a prompt are hundreds of kernels of microseconds
each, and launching them one by one takes several times as long as running them. A CUDA graph is one launch. What may
not be recorded (on a CPU, with gradients, of many rows) runs as it is.

    Recorded     a function of tensors, replayed for shapes that came a few times
    record       what both it and a token's step (replay.py) are recorded with
"""

import inspect
import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SEEN_BEFORE = 2  # times that a shape runs as it is before it is recorded
SEEN_AGAIN = 20  # and once it was forgotten: recording takes as long as some ten runs
MOST_SHAPES = 16  # kept of one function; the one that was not asked for longest is forgotten
MOST_BYTES = 1 << 30  # of their inputs and results
MOST_COUNTED = 1024  # shapes that are counted

_logger = logging.getLogger(__name__)

# All graphs of a GPU share the memory of what lies between input and result, so no two may run at once: whoever records
# or replays holds this, until the results are copied.
replaying = threading.RLock()


class Tape(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Computes the results anew from what the inputs hold now."""


Recorder = Callable[[Callable[[], Any], torch.device], tuple[Tape, Any]]


@dataclass
class _Studio:
    """What all recordings of one GPU share.

    Attributes:
        stream: that they are made on; libraries keep memory for each.
        pool: memory of what lies between input and result.
        holder: a graph that keeps the pool: one that was let go cannot be taken again.
    """

    stream: Any
    pool: Any
    holder: Any


_studios: dict[int, _Studio] = {}
_broken: list[_Studio] = []  # a recording failed in them; other graphs live in their memory


def record(function: Callable[[], Any], device: torch.device) -> tuple[Tape, Any]:
    """Records what a function launches.

    Args:
        function: launches the same kernels on the same memory whenever it is called.
        device: the GPU that they run on.

    Returns:
        The graph, and what the function returned: a replay puts its results in the same tensors.

    Raises:
        RuntimeError: the function does what cannot be recorded; others can be recorded afterwards.
    """
    with replaying, torch.cuda.device(device):
        studio = _studio()
        before = torch.cuda.current_stream()
        studio.stream.wait_stream(before)
        with torch.cuda.stream(studio.stream):
            for _ in range(2):  # libraries choose their kernels before anything is recorded
                function()
        before.wait_stream(studio.stream)
        try:
            return _captured(function, studio.stream, studio.pool)
        except BaseException:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own behind
            _broken.append(_studios.pop(torch.cuda.current_device()))
            raise


def _studio() -> _Studio:
    device = torch.cuda.current_device()
    if device not in _studios:
        stream = torch.cuda.Stream()
        pool = torch.cuda.graph_pool_handle()
        holder, _ = _captured(lambda: torch.zeros(1, device="cuda"), stream, pool)
        _studios[device] = _Studio(stream, pool, holder)
    return _studios[device]


def _captured(function: Callable[[], Any], stream: Any, pool: Any) -> tuple[Any, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        results = function()
    return graph, results


@dataclass
class _Run:
    tape: Tape
    inputs: Sequence[Tensor]
    results: Any  # a tensor or a tuple of tensors

    @property
    def num_bytes(self) -> int:
        results = self.results if isinstance(self.results, tuple) else (self.results,)
        return sum(tensor.nbytes for tensor in (*self.inputs, *results))


class Recorded:
    """A function of tensors that gives a tensor or a tuple of tensors; see the module's docstring.

    Args:
        function: of one value for the same inputs, with nothing that waits for the device. A method does not keep what
            it belongs to alive.
        weights: a tensor that the function reads: where it moves, what was recorded holds no longer.
        most_rows: inputs of more rows run as they are: launching is not what takes the time then.
        device: where it records.
        recorder: as `record`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        weights: Callable[[], Tensor],
        most_rows: int,
        device: str = "cuda",
        recorder: Recorder = record,
    ) -> None:
        self._function, self._weights = _weakly(function), _weakly(weights)
        self._most_rows = most_rows
        self._device = device
        self._recorder = recorder
        self._runs: OrderedDict[Any, _Run] = OrderedDict()
        self._seen: Counter[Any] = Counter()
        self._is_recordable = True

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function gives of these inputs; the tensors are the caller's own."""
        function = self._function()
        if not self._may_record(inputs):
            return function(*inputs)
        weights = self._weights()()
        shapes = (weights.data_ptr(), weights.dtype, *((*one.shape, one.dtype, one.device) for one in inputs))
        with replaying:
            run = self._runs.get(shapes) or self._recorded(function, shapes, inputs)
            if run is not None:
                self._runs.move_to_end(shapes)
                for own, given in zip(run.inputs, inputs, strict=True):
                    own.copy_(given)
                run.tape.replay()
                return _copied(run.results)
        return function(*inputs)

    def _may_record(self, inputs: Sequence[Tensor]) -> bool:
        first = inputs[0]
        return (
            self._is_recordable
            and first.device.type == self._device
            and len(first) <= self._most_rows
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(first.device.type)
        )

    def _recorded(self, function: Callable[..., Any], shapes: Any, inputs: Sequence[Tensor]) -> _Run | None:
        """The run of these shapes, once they came often enough."""
        if len(self._seen) >= MOST_COUNTED:
            self._seen.clear()
        self._seen[shapes] += 1
        if self._seen[shapes] <= SEEN_BEFORE:
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():  # tensors that any mode may write to
                own = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
                tape, results = self._recorder(lambda: function(*own), own[0].device)
        except torch.OutOfMemoryError:
            self._seen[shapes] = -SEEN_AGAIN
            return None
        except RuntimeError as error:
            self._is_recordable = False
            name = getattr(function, "__qualname__", "a function")
            _logger.warning("%s cannot be recorded on this GPU and runs as it is: %s", name, error)
            return None
        self._runs[shapes] = _Run(tape, own, results)
        while len(self._runs) > MOST_SHAPES or (len(self._runs) > 1 and self._num_bytes > MOST_BYTES):
            gone, _ = self._runs.popitem(last=False)
            self._seen[gone] = -SEEN_AGAIN
        return self._runs[shapes]

    @property
    def _num_bytes(self) -> int:
        return sum(run.num_bytes for run in self._runs.values())


def _weakly(function: Callable[..., Any]) -> Callable[[], Any]:
    return weakref.WeakMethod(function) if inspect.ismethod(function) else lambda: function


def _copied(results: Any) -> Any:
    return tuple(map(_copied, results)) if isinstance(results, tuple) else results.clone()
