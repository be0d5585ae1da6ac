"""Bad samples: counted exactly, named in a file, and an end to the run where they are too many.

A run over millions of pictures meets some that are missing, broken or without a text. Each is skipped, and each is a
line of `faults.jsonl`: {"sample": id, "where": file, "reason": what is wrong}.
"""

import json
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from blip2.errors import BadData, BadSample

MIN_SEEN = 100  # below that a share says little
_SHOWN = 3


@dataclass(frozen=True)
class Fault:
    """One thing that was left out, and why; `reason` is the end of a sentence that begins with `where`."""

    sample: str
    where: str
    reason: str


class FaultLog:
    """Counts what was seen and what was bad of it. Safe to use from several threads of one process.

    Attributes:
        num_seen: samples tried, the bad ones among them.
        num_faults: bad ones, each as often as it was met.
        num_named: different ones, the lines of the file.
    """

    def __init__(self, path: Path | str | None, *, stop_share: float = 0.1, min_seen: int = MIN_SEEN) -> None:
        """Goes on where a log of that path ended: what is named there is not named again.

        Args:
            path: of faults.jsonl, made with the first fault; one a process. None for a log that only counts.
            stop_share: more than this share of bad samples is an error.
            min_seen: samples before that is judged.
        """
        self.path = Path(path) if path is not None else None
        self.stop_share, self.min_seen = stop_share, min_seen
        self.num_seen = self.num_faults = 0
        self._since_seen = 0
        self._reasons: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._named = _read_names(self.path)
        self._file: Any = None

    @property
    def num_named(self) -> int:
        """Different bad samples."""
        return len(self._named)

    def record(self, error: BadSample | Fault | Exception, *, sample_id: str = "", where: str = "") -> None:
        """Counts a bad sample and names it in the file.

        Args:
            error: what was raised for it. An error other than BadSample, such as BadImage, gives the reason; then
                `sample_id` and `where` tell the sample.

        Raises:
            BadData: `min_seen` faults came in a row without a `seen` between them.
        """
        fault = error if isinstance(error, Fault) else fault_of(error, sample_id=sample_id, where=where)
        with self._lock:
            self.num_faults += 1
            self._since_seen += 1
            self._reasons[fault.reason] += 1
            if (fault.sample, fault.where) not in self._named:
                self._named.add((fault.sample, fault.where))
                self._write(fault)
            if self._since_seen >= max(self.min_seen, 1) and self.stop_share < 1:
                raise BadData(f"{self._since_seen} samples in a row are bad. {self._told()}")

    def seen(self, count: int) -> None:
        """Counts samples that were tried, good and bad ones together.

        Raises:
            BadData: more than `stop_share` of all are bad.
        """
        with self._lock:
            self.num_seen += count
            self._since_seen = 0
            is_enough = self.num_seen >= self.min_seen and self.stop_share < 1
            if is_enough and self.num_faults > self.stop_share * self.num_seen:
                raise BadData(f"{self.num_faults:,} of {self.num_seen:,} samples are bad. {self._told()}")

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"seen": self.num_seen, "faults": self.num_faults, "reasons": dict(self._reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from counts that `state_dict` gave."""
        self.num_seen, self.num_faults = int(state["seen"]), int(state["faults"])
        self._reasons = Counter(state["reasons"])

    def summary(self) -> str:
        """One line: "3 of 400 samples were bad: is empty (2), does not exist (1)"."""
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common(_SHOWN))
        return f"{self.num_faults:,} of {self.num_seen:,} samples were bad" + (f": {reasons}" if reasons else "")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "FaultLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _write(self, fault: Fault) -> None:
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # line by line, so that a kill loses none
            self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        line = {"sample": fault.sample, "where": fault.where, "reason": fault.reason}
        self._file.write(json.dumps(line) + "\n")

    def _told(self) -> str:
        """The most frequent reasons, and what to do."""
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common(_SHOWN))
        listed = f" All are listed in {self.path}." if self.path is not None else ""
        return (
            f"Most frequent: {reasons}.{listed} More than {self.stop_share:.0%} stop the run: mend the data, "
            "give the right folder of pictures, or allow a larger share."
        )


def fault_of(error: Exception, *, sample_id: str, where: str) -> Fault:
    """What an error tells of a sample; one other than BadSample, such as BadImage, gives the reason alone."""
    if isinstance(error, BadSample):
        return Fault(error.sample_id, error.where, error.reason)
    return Fault(sample_id, where, _reason(error, sample_id, where))


def _reason(error: Exception, *names: str) -> str:
    """What an error says, without the name it begins with, so that equal reasons are counted as one."""
    text = str(error) or type(error).__name__
    for name in names:
        text = text.removeprefix(name) if name else text
    return text.strip().rstrip(".")


def _read_names(path: Path | None) -> set[tuple[str, str]]:
    """What a log names already; a last line that was broken off is written again."""
    named: set[tuple[str, str]] = set()
    if path is None or not path.is_file():
        return named
    kept = b""
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            fault = json.loads(line)
            named.add((fault["sample"], fault["where"]))
            kept += line if line.endswith(b"\n") else line + b"\n"
        except (ValueError, KeyError, TypeError):
            continue
    if kept != path.read_bytes():
        path.write_bytes(kept)
    return named
