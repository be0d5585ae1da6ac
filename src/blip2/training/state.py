"""Checkpoints of a run: written so that a kill at any moment leaves a complete one to go on from.

    RUN/checkpoints/step-000200/
        model.safetensors       trainable parameters only
        optimizer.safetensors   AdamW's moments and step counts, by parameter name
        ema.safetensors         running averages of the parameters, where the recipe asks for them
        state.json              step, counters, learning rate, random state, resolved recipe
        manifest.json           size and sha256 of the others; written last
    RUN/best.json               the step of the best evaluation, where the recipe names a metric

A checkpoint is written into a hidden sibling, every file synced, then renamed. One whose manifest is missing or does
not match its files is torn, and ignored.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from blip2.errors import BadData, MissingFile, UserError

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
AVERAGE, BEST = "ema.safetensors", "best.json"
FORMAT = 1


# Writing


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from: copies, so that training may go on meanwhile.

    Attributes:
        model: trainable parameters by name.
        optimizer: moments by parameter name.
        state: what else the run needs to go on; holds "step".
        average: running averages of the parameters; empty for none.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: Mapping[str, Any]
    average: dict[str, Tensor] = field(default_factory=dict)


def take_snapshot(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    average: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """A snapshot of a module's trainable parameters and their moments, on the CPU."""
    return Snapshot(
        _copied(trainable_state(module)), _copied(optimizer_state(module, optimizer)), state, _copied(average or {})
    )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def write(run_dir: Path, snapshot: Snapshot) -> Path:
    """Writes the checkpoint of a step, all or nothing.

    Returns:
        The checkpoint's folder. One that is already there and complete is left as it is.

    Raises:
        OSError: such as a full disk; older checkpoints are then untouched.
    """
    final = checkpoint_path(run_dir, snapshot.state["step"])
    if is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        tensors = {MODEL: snapshot.model, OPTIMIZER: snapshot.optimizer}
        if snapshot.average:
            tensors[AVERAGE] = snapshot.average
        contents = {name: safetensors.torch.save(each) for name, each in tensors.items()}
        contents[STATE] = json.dumps({"format": FORMAT, **snapshot.state}, indent=1).encode()
        for name, content in contents.items():
            _write_synced(beside / name, content)
        manifest = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in contents.items()}
        _write_synced(beside / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_folder(beside)
        if final.exists():  # torn: a complete one was returned above
            remove_checkpoint(final)
        beside.rename(final)
        _sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return final


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's trainable parameters by name: the live tensors, detached."""
    return {
        name: parameter.detach().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as "exp_avg.PARAMETER" and so on; a parameter without a gradient so far has none."""
    return {
        f"{kind}.{name}": value.detach().contiguous()
        for name, parameter in module.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def prune(run_dir: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best, and what an interrupted write left behind."""
    best = (read_best(run_dir) or {}).get("step")
    for older in list_checkpoints(run_dir)[keep:]:
        if step_of(older) != best:
            remove_checkpoint(older)
    for leftover in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def discard_after(run_dir: Path, step: int) -> list[str]:
    """Removes the torn checkpoints and sets those aside that are past a step, so that a run goes on from there.

    Returns:
        What was done to which, in words.
    """
    told = []
    for path in list_checkpoints(run_dir):
        if not is_complete(path):
            remove_checkpoint(path)
            told.append(f"Removed {path}: torn")
        elif step_of(path) > step:
            aside = Path(run_dir) / "set-aside" / path.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            told.append(f"Set aside as {aside}: it is past the start")
    return told


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; a kill in the middle leaves nothing that looks like one."""
    doomed = path.with_name(f".{path.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Choosing and reading


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoints of a run, newest first, torn ones too."""
    found = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next((path for path in list_checkpoints(run_dir) if is_complete(path)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint has the size and sha256 that its manifest states."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return set(manifest) >= {MODEL, OPTIMIZER, STATE} and all(
            (checkpoint / name).stat().st_size == entry["bytes"]
            and _sha256((checkpoint / name).read_bytes()) == entry["sha256"]
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, TypeError, KeyError):
        return False


def choose_start(run_dir: Path, resume: str | Path) -> Path | None:
    """The checkpoint a run starts from, or None for a fresh start.

    Raises:
        UserError: resume is "never", but the folder holds a run.
    """
    if resume == "auto":
        return newest_checkpoint(run_dir)
    if resume == "never":
        if list_checkpoints(run_dir):
            raise UserError(f"{run_dir} already holds a run: choose another --out, or remove that folder first.")
        return None
    return find_checkpoint(resume)


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """What best.json says: step, metric and value of the run's best evaluation; None where there is none."""
    try:
        return json.loads((Path(run_dir) / BEST).read_text())
    except (OSError, ValueError):
        return None


def find_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """The checkpoint that a path means: itself, the newest complete one of a run's folder, or RUN/best: the best one.

    Raises:
        MissingFile: nothing there, or no complete checkpoint in it.
        BadData: a checkpoint that is torn or altered.
    """
    path = Path(run_or_checkpoint)
    best = read_best(path.parent) if path.name == "best" else None
    if best is not None:
        path = checkpoint_path(path.parent, best["step"])
    if not path.is_dir():
        raise MissingFile(f"There is no run or checkpoint at {path}.")
    if (path / STATE).exists() or (path / MODEL).exists():
        if not is_complete(path):
            raise BadData(
                f"The checkpoint {path} is torn or altered: its files differ from its manifest. Take another."
            )
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise MissingFile(f"{path} has no complete checkpoint: is it a run's folder, and did the run get that far?")
    return newest


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json.

    Raises:
        BadData: written by a version of another format.
    """
    state = json.loads((checkpoint / STATE).read_text())
    if state.get("format") != FORMAT:
        raise BadData(f"The checkpoint {checkpoint} has format {state.get('format')}; this version reads {FORMAT}.")
    return state


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """The checkpoint's parameters by name, to be used: their running averages where the run kept them."""
    average = checkpoint / AVERAGE
    return safetensors.torch.load_file(average if average.is_file() else checkpoint / MODEL)


def load_average(checkpoint: Path) -> dict[str, Tensor] | None:
    """The checkpoint's running averages by parameter name; None where the run kept none."""
    path = checkpoint / AVERAGE
    return safetensors.torch.load_file(path) if path.is_file() else None


def restore(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's parameters and moments back into the module and the optimizer.

    Raises:
        BadData: the checkpoint is of another model.
    """
    saved = safetensors.torch.load_file(checkpoint / MODEL)
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    others = sorted(shapes.items() ^ {(name, tuple(tensor.shape)) for name, tensor in saved.items()})
    if others:
        raise BadData(f"{checkpoint} is a checkpoint of another model: {others[0][0]} is missing or has another shape.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    optimizer.state.clear()
    for key, value in safetensors.torch.load_file(checkpoint / OPTIMIZER).items():
        kind, _, name = key.partition(".")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.to(parameter.device)


# One writer a run


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Holds the run's folder for this process; the lock ends with the process, even one that is killed.

    Raises:
        UserError: another process is training into that folder.
    """
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is training into {run_dir}: wait for it, or choose another --out."
            ) from None
        yield
