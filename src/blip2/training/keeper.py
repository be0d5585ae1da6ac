"""Which checkpoints of a run are kept, and where: written while training goes on, the newest few and the best.

    RUN/checkpoints/step-000200/   as state.py writes them
    RUN/best.json                  {"step": 150, "metric": "held_out/r1", "value": 0.61}

The training waits only for a copy in memory; writing, syncing and hashing happen in a thread. With a mirror, each
complete checkpoint is copied to another place (a folder or an fsspec store), its manifest last; a run whose own folder
is gone goes on from there.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blip2.errors import UserError
from blip2.training import state as checkpoints
from blip2.training.state import BEST, Snapshot


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far.

    Attributes:
        step: when it was.
        metric: what was compared.
        value: its value then.
    """

    step: int
    metric: str
    value: float


class Keeper:
    """Writes a run's checkpoints, one at a time, in a thread; keeps the newest `keep` and the best."""

    def __init__(self, run_dir: Path, keep: int, mirror: str | None = None) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._mirror = Mirror(mirror) if mirror else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: Future[Path] | None = None

    def save(self, snapshot: Snapshot, best: Best | None = None) -> None:
        """Begins to write a checkpoint; the one before it is waited for first. `best` is noted once it is there.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, snapshot, best)

    def wait(self) -> Path | None:
        """Returns when nothing is being written any more; the checkpoint that was, or None.

        Raises:
            OSError: it could not be written, for a full disk perhaps; the older ones stand.
        """
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def close(self) -> None:
        """Lets what is being written end."""
        self._pool.shutdown(wait=True)

    def crown(self, best: Best) -> None:
        """Notes the best step; its checkpoint is not pruned until another is better."""
        beside = self._run_dir / f".{BEST}.writing"
        beside.write_text(json.dumps({"step": best.step, "metric": best.metric, "value": best.value}) + "\n")
        os.replace(beside, self._run_dir / BEST)

    def _write(self, snapshot: Snapshot, best: Best | None) -> Path:
        path = checkpoints.write(self._run_dir, snapshot)
        if best is not None:
            self.crown(best)
        checkpoints.prune(self._run_dir, self._keep)
        if self._mirror:
            self._mirror.put(path)
            self._mirror.keep_only(checkpoints.list_checkpoints(self._run_dir))
        return path


def better(metric: str, value: float, best: Best | None) -> bool:
    """Whether a value beats the best so far: a smaller loss, a greater anything else."""
    if best is None or best.metric != metric:
        return True
    return value < best.value if "loss" in metric else value > best.value


class Mirror:
    """Another place that has the run's complete checkpoints: a folder, or what fsspec opens (s3://..., gs://...)."""

    def __init__(self, place: str) -> None:
        """Opens the place.

        Raises:
            UserError: fsspec, or what it needs for such a place, is not installed.
        """
        if find_spec("fsspec") is None:
            raise UserError("training.mirror needs fsspec: pip install 'blip2[data]'.")
        import fsspec  # optional

        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as fault:
            raise UserError(f"training.mirror: {place} cannot be opened: {fault}.") from None

    def put(self, checkpoint: Path) -> None:
        """Copies a checkpoint there, its manifest last: one that was broken off has none, and counts for nothing."""
        there = f"{self._root}/{checkpoint.name}"
        self._files.makedirs(there, exist_ok=True)
        names = sorted(path.name for path in checkpoint.iterdir() if path.name != checkpoints.MANIFEST)
        for name in [*names, checkpoints.MANIFEST]:
            self._files.put_file(str(checkpoint / name), f"{there}/{name}")

    def keep_only(self, kept: list[Path]) -> None:
        """Removes there what is not kept here."""
        names = {path.name for path in kept}
        for there in self._complete():
            if there not in names:
                self._files.rm(f"{self._root}/{there}", recursive=True)

    def fetch_newest(self, run_dir: Path) -> Path | None:
        """Brings the newest complete checkpoint into the run's folder if that has none as new; None where not."""
        newest = max(self._complete(), default=None)
        own = checkpoints.newest_checkpoint(run_dir)
        if newest is None or (own is not None and own.name >= newest):
            return None
        here = run_dir / "checkpoints" / newest
        here.mkdir(parents=True, exist_ok=True)
        for there in self._files.ls(f"{self._root}/{newest}", detail=False):
            self._files.get_file(there, str(here / Path(there).name))
        return here if checkpoints.is_complete(here) else None

    def _complete(self) -> list[str]:
        if not self._files.isdir(self._root):
            return []
        names = [Path(path).name for path in self._files.ls(self._root, detail=False)]
        steps = [name for name in names if name.startswith("step-")]
        return [name for name in steps if self._files.exists(f"{self._root}/{name}/{checkpoints.MANIFEST}")]


def read_best(run_dir: Path) -> Best | None:
    """The best evaluation noted in a run's folder, or None."""
    noted: Mapping[str, Any] | None = checkpoints.read_best(run_dir)
    return Best(**noted) if noted else None


def recall(run_dir: Path, metric: str, evaluations: Sequence[tuple[int, float]], step: int) -> tuple[Best | None, int]:
    """The best evaluation up to a step whose checkpoint is there, and how many came after it.

    Args:
        run_dir: the run's folder.
        metric: what is compared.
        evaluations: steps and values up to `step`, in their order.
        step: where the run goes on.
    """
    found = None
    for at, value in evaluations:
        if better(metric, value, found):
            found = Best(at, metric, value)
    for best in (found, read_best(run_dir)):
        if best is None or best.metric != metric or best.step > step:
            continue
        if checkpoints.is_complete(checkpoints.checkpoint_path(run_dir, best.step)):
            return best, sum(at > best.step for at, _ in evaluations)
    return None, 0
