"""Who keeps the others waiting: each rank tells once a second where it is, and a run that hangs says whose fault it is.

    RUN/ranks/3.json      {"rank": 3, "host": "node-1", "pid": 4711, "step": 120, "doing": "computing", ...}

A rank that has not moved for `patience` seconds reads what all have told, names the one that is behind, and leaves with
HUNG, so that torchrun can start the run again from its newest checkpoint.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

HUNG = 74  # the exit code; sysexits' EX_IOERR, the nearest there is
TOLD_EVERY, SILENT_AFTER = 1.0, 5.0
READING, COMPUTING = "reading its batch", "computing"


@dataclass(frozen=True)
class Whereabouts:
    """What one rank tells: where it is, and since when it has been alive to tell."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    since: float
    at: float


class HangWatch:
    """Tells where this rank is, and notices when the run stands still."""

    def __init__(self, run_dir: Path, rank: int, patience: float) -> None:
        """`patience` in seconds; 0 for a watch that never barks."""
        self._folder, self._rank, self._patience = run_dir / "ranks", rank, patience
        self._step, self._doing, self._since = 0, COMPUTING, time.time()
        self._is_off = True
        self._closed = threading.Event()

    def at(self, step: int, doing: str) -> None:
        """This rank has come to a step, and is reading or computing."""
        self._step, self._doing, self._since = step, doing, time.time()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, what takes long is no hang: an evaluation, a checkpoint."""
        self._is_off = True
        try:
            yield
        finally:
            self._is_off, self._since = False, time.time()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the watch is kept, in a thread of its own."""
        if not self._patience:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._is_off, self._since = False, time.time()
        self._tell()  # at once: one that hangs from the first second must be known to the others
        thread = threading.Thread(target=self._keep_watch, name="hang-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closed.set()
            thread.join()

    def _keep_watch(self) -> None:
        while not self._closed.wait(TOLD_EVERY):
            self._tell()
            if not self._is_off and time.time() - self._since > self._patience:
                print(accusation(list(self._heard()), self._rank), file=sys.stderr, flush=True)
                os._exit(HUNG)  # the main thread is stuck in a collective, and cannot raise

    def _tell(self) -> None:
        place = Whereabouts(
            self._rank, socket.gethostname(), os.getpid(), self._step, self._doing, self._since, time.time()
        )
        path = self._folder / f"{self._rank}.json"
        beside = path.with_suffix(".writing")
        beside.write_text(json.dumps(asdict(place)))
        os.replace(beside, path)

    def _heard(self) -> Iterator[Whereabouts]:
        for path in sorted(self._folder.glob("*.json")):
            yield Whereabouts(**json.loads(path.read_text()))


def accusation(heard: Sequence[Whereabouts], own: int) -> str:
    """Which rank the others wait for: a silent one, else the one furthest behind, reading before computing.

    Args:
        heard: what each rank told last.
        own: the rank that asks.
    """
    now = max(place.at for place in heard)
    silent = [place for place in heard if now - place.at > SILENT_AFTER]
    guilty = min(silent or heard, key=lambda place: (place.step, place.doing == COMPUTING, place.since))
    others = ", ".join(str(place.rank) for place in heard if place.rank != guilty.rank)
    did = "has not been heard of" if guilty in silent else f"has been {guilty.doing}"
    for_seconds = now - (guilty.at if guilty in silent else guilty.since)
    return (
        f"The run hangs. Rank {guilty.rank} (host {guilty.host}, process {guilty.pid}) {did} for {for_seconds:.0f} s, "
        f"at step {guilty.step + 1}; rank {others} waits for it. Rank {own} leaves, so that the run can start again."
    )
