"""What a run trains, on what, and how it ended."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from blip2.data.faults import FaultLog
from blip2.data.loader import OrderedLoader
from blip2.errors import BadSample
from blip2.training.prefetch import prefetched

STEPS_AHEAD = 2  # that each process reads while one is computed

Metrics = dict[str, float]


@dataclass
class Job:
    """What a run trains, on what, and how it is judged.

    Attributes:
        module: forward(batch) gives scalars by name; "loss" is minimised, the others are logged.
        batches: index -> this rank's part of the batch, the same for the same index. Batch i holds the samples at the
            run's positions i * micro_batch_size ... (i + 1) * micro_batch_size - 1, dealt to the ranks in equal parts,
            and a step takes `accumulation` batches in turn. Called in other threads: it must not draw from torch's
            global generator.
        evaluators: (every so many steps, function giving metrics); each runs after the last step too, and 0 means only
            then. The module is in eval mode meanwhile, and no gradients are recorded. Every rank runs them.
        faults: where samples that cannot be read are counted; None where none are expected.
        take_faults: gives those met since it was last asked, in the thread or process that called `batches`.
        workers: processes that read batches ahead, where that is much work; None: a thread does.
        leaves_some_out: whether a step may leave a trainable parameter without gradient.
        is_sharded: whether the module's frozen parts are dealt out to the ranks, so that none can compute alone.
        texts: name of a source -> hash of what it says; kept in checkpoints, so that a change is told.
    """

    module: nn.Module
    batches: Callable[[int], Any]
    evaluators: Sequence[tuple[int, Callable[[], Mapping[str, float]]]] = ()
    faults: FaultLog | None = None
    take_faults: Callable[[], list[BadSample]] = list
    workers: int | None = None
    leaves_some_out: bool = False
    is_sharded: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def reading(self, first: int, end: int, accumulation: int) -> Iterator[Iterator["StepParts"]]:
        """The parts of the steps first ... end - 1, read ahead."""

        def read(step: int) -> StepParts:
            batches = [self.batches(step * accumulation + part) for part in range(accumulation)]
            return StepParts(batches, self.take_faults())

        if self.workers is None:
            with prefetched(read, first, end) as steps:
                yield steps
        else:
            ahead = STEPS_AHEAD * max(1, self.workers)
            with OrderedLoader(read, workers=self.workers, ahead=ahead) as loader:
                yield loader.stream(first, end)


@dataclass(frozen=True)
class StepParts:
    """What one step computes with on this rank: its batches, and the bad samples met while they were read."""

    batches: list[Any]
    faults: list[BadSample]


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        step: steps made in all.
        finished: whether these are all of the recipe's steps, or it got no better; if not, it was told to stop.
        skipped: steps that changed nothing, since loss or gradient were not finite.
        checkpoint: the last one.
        metrics: of the last evaluation, else of the last log line.
        stopped_by: the signal that ended it before its time, or nothing.
    """

    step: int
    finished: bool
    skipped: int
    checkpoint: Path
    metrics: Metrics
    stopped_by: str = ""
