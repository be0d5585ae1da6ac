"""Passes that a GPU records once for each shape and then replays.

At batch 1 the image encoder, the Q-Former and the LLM's pass over a prompt are hundreds of kernels of microseconds
each, and launching them one by one takes several times as long as running them. A CUDA graph is one launch. What may
not be recorded (on a CPU, with gradients, of many rows) runs as it is.

    Recorded     a function of tensors, replayed for shapes that came a few times
    record       what both it and a token's step (replay.py) are recorded with
"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SEEN_BEFORE = 2  # times that a shape runs as it is before it is recorded: recording takes as long as some ten runs
MOST_SHAPES = 16  # kept of one function; the one that was not asked for longest is forgotten
MOST_COUNTED = 1024  # shapes that are counted

_logger = logging.getLogger(__name__)
# Memory of what lies between input and result, by GPU: no two replays run at once. A graph holds it for as long as the
# process lives, since a pool that was let go cannot be taken again.
_pools: dict[int, tuple[Any, torch.cuda.CUDAGraph]] = {}


class Tape(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Computes the results anew from what the inputs hold now."""


Recorder = Callable[[Callable[[], Any], torch.device], tuple[Tape, Any]]


def record(function: Callable[[], Any], device: torch.device) -> tuple[Tape, Any]:
    """Records what a function launches.

    Args:
        function: launches the same kernels on the same memory whenever it is called.
        device: the GPU that they run on.

    Returns:
        The graph, and what the function returned: a replay puts its results in the same tensors.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their kernels before anything is recorded
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
            results = function()
    return graph, results


def _pool() -> Any:
    device = torch.cuda.current_device()
    if device not in _pools:
        holder = torch.cuda.CUDAGraph()
        with torch.cuda.graph(holder):
            torch.zeros(1, device="cuda")
        _pools[device] = holder.pool(), holder
    return _pools[device][0]


@dataclass
class _Run:
    tape: Tape
    inputs: Sequence[Tensor]
    results: Any  # a tensor or a tuple of tensors


class Recorded:
    """A function of tensors that gives a tensor or a tuple of tensors; see the module's docstring.

    Args:
        function: of one value for the same inputs, with nothing that waits for the device.
        most_rows: inputs of more rows run as they are: launching is not what takes the time then.
        device: where it records.
        recorder: as `record`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        most_rows: int,
        device: str = "cuda",
        recorder: Recorder = record,
    ) -> None:
        self._function = function
        self._most_rows = most_rows
        self._device = device
        self._recorder = recorder
        self._runs: OrderedDict[Any, _Run] = OrderedDict()
        self._seen: Counter[Any] = Counter()
        self._is_recordable = True
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function gives of these inputs; the tensors are the caller's own."""
        if not self._may_record(inputs):
            return self._function(*inputs)
        shapes = tuple((*tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        with self._lock:
            run = self._runs.get(shapes) or self._recorded(shapes, inputs)
            if run is not None:
                self._runs.move_to_end(shapes)
                for own, given in zip(run.inputs, inputs, strict=True):
                    own.copy_(given)
                run.tape.replay()
                return _copied(run.results)
        return self._function(*inputs)

    def _may_record(self, inputs: Sequence[Tensor]) -> bool:
        first = inputs[0]
        return (
            self._is_recordable
            and first.device.type == self._device
            and len(first) <= self._most_rows
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(first.device.type)
        )

    def _recorded(self, shapes: Any, inputs: Sequence[Tensor]) -> _Run | None:
        """The run of these shapes, once they came often enough."""
        if len(self._seen) >= MOST_COUNTED:
            self._seen.clear()
        self._seen[shapes] += 1
        if self._seen[shapes] <= SEEN_BEFORE:
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():  # tensors that any mode may write to
                own = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
                tape, results = self._recorder(lambda: self._function(*own), own[0].device)
        except RuntimeError as error:
            self._is_recordable = False
            name = getattr(self._function, "__qualname__", "a function")
            _logger.warning("%s cannot be recorded on this GPU and runs as it is: %s", name, error)
            return None
        if len(self._runs) >= MOST_SHAPES:
            self._runs.popitem(last=False)
        self._runs[shapes] = _Run(tape, own, results)
        return self._runs[shapes]


def _copied(results: Any) -> Any:
    return tuple(map(_copied, results)) if isinstance(results, tuple) else results.clone()
