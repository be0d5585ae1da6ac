"""Checkpoints are whole or ignored, and a full disk or another model never costs an older one."""

import resource

import pytest
import torch

from blip2.errors import BadData, MissingFile, UserError
from blip2.training import state
from blip2.training.optimizer import build_optimizer

from .tiny_run import TinyModel, start_process, tiny_job, tiny_recipe


def trained(num_steps=3):
    """A tiny model and its optimizer after some steps."""
    recipe = tiny_recipe()
    job = tiny_job(recipe)
    optimizer = build_optimizer(job.module, recipe.optimizer)
    for step in range(num_steps):
        job.module(job.batches(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return job.module, optimizer


def save(run_dir, *steps):
    module, optimizer = trained()
    return [state.write(run_dir, state.take_snapshot(module, optimizer, {"step": step})) for step in steps]


def test_a_restored_model_and_optimizer_have_the_same_bits(tmp_path):
    module, optimizer = trained()
    checkpoint = state.write(tmp_path, state.take_snapshot(module, optimizer, {"step": 3}))
    fresh = TinyModel()
    fresh_optimizer = build_optimizer(fresh, tiny_recipe().optimizer)
    state.restore(checkpoint, fresh, fresh_optimizer)
    for kind in (state.trainable_state, lambda model: model.state_dict()):
        assert all(torch.equal(kind(module)[name], value) for name, value in kind(fresh).items())
    before, after = state.optimizer_state(module, optimizer), state.optimizer_state(fresh, fresh_optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_trainable_parameters_are_written(tmp_path):
    (checkpoint,) = save(tmp_path, 1)
    saved = state.load_model(checkpoint)
    assert saved and all(name.startswith("bridge.") for name in saved)


TEARS = {
    "no manifest": lambda path: (path / state.MANIFEST).unlink(),
    "half a manifest": lambda path: cut(path / state.MANIFEST),
    "no parameters": lambda path: (path / state.MODEL).unlink(),
    "half the parameters": lambda path: cut(path / state.MODEL),
    "half the moments": lambda path: cut(path / state.OPTIMIZER),
    "half the state": lambda path: cut(path / state.STATE),
    "a flipped bit": lambda path: flip(path / state.MODEL),
    "an empty manifest": lambda path: (path / state.MANIFEST).write_text("{}"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_ignored_and_the_one_before_taken(tmp_path, tear):
    older, newer = save(tmp_path, 10, 20)
    TEARS[tear](newer)
    assert state.newest_checkpoint(tmp_path) == older
    assert state.find_checkpoint(tmp_path) == older
    assert state.discard_after(tmp_path, 10) == [f"Removed {newer}: torn"]
    assert state.list_checkpoints(tmp_path) == [older]


def test_a_newer_checkpoint_is_set_aside_and_not_lost(tmp_path):
    older, newer = save(tmp_path, 10, 20)
    (told,) = state.discard_after(tmp_path, 10)
    aside = tmp_path / "set-aside" / newer.name
    assert told == f"Set aside as {aside}: it is past the start"
    assert state.list_checkpoints(tmp_path) == [older]
    assert state.find_checkpoint(aside) == aside


def test_a_torn_checkpoint_asked_for_by_name_is_refused(tmp_path):
    (checkpoint,) = save(tmp_path, 10)
    flip(checkpoint / state.MODEL)
    with pytest.raises(BadData, match="step-000010 is torn or altered"):
        state.find_checkpoint(checkpoint)


def test_a_torn_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    (checkpoint,) = save(tmp_path, 10)
    cut(checkpoint / state.MODEL)
    save(tmp_path, 10)
    assert state.is_complete(checkpoint)


def test_the_newest_are_kept_and_leftovers_of_a_kill_removed(tmp_path):
    save(tmp_path, 5, 10, 100)
    leftover = tmp_path / "checkpoints" / ".step-000020.writing"
    leftover.mkdir()
    state.prune(tmp_path, keep=2)
    assert [state.step_of(path) for path in state.list_checkpoints(tmp_path)] == [100, 10]
    assert not leftover.exists()


def save_on_a_full_disk(run_dir, step, tell):
    """Lets this process write no file beyond 1 kB, which ends a write as a full disk does, and tries to save."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    try:
        save(run_dir, step)
        tell.send("saved")
    except OSError as fault:
        tell.send(f"{type(fault).__name__}: {fault.strerror}")


def test_a_full_disk_leaves_the_older_checkpoint_intact_and_nothing_half_written(tmp_path):
    (older,) = save(tmp_path, 10)
    process, listen = start_process(save_on_a_full_disk, tmp_path, 20)
    assert listen.recv() == "OSError: File too large"
    process.join()
    assert state.newest_checkpoint(tmp_path) == older
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    (checkpoint,) = save(tmp_path, 1)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(BadData, match="checkpoint of another model: b"):
        state.restore(checkpoint, other, build_optimizer(other, tiny_recipe().optimizer))


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(MissingFile, match="has no complete checkpoint"):
        state.find_checkpoint(tmp_path)
    with pytest.raises(MissingFile, match="There is no run or checkpoint"):
        state.find_checkpoint(tmp_path / "gone")


def test_a_state_of_another_format_is_refused(tmp_path):
    (checkpoint,) = save(tmp_path, 1)
    (checkpoint / state.STATE).write_text('{"format": 99}')
    with pytest.raises(BadData, match="has format 99; this version reads 1"):
        state.read_state(checkpoint)


def test_two_processes_cannot_train_into_one_folder(tmp_path):
    refused = pytest.raises(UserError, match="Another process is training into")
    with state.only_writer(tmp_path), refused, state.only_writer(tmp_path):
        pass
    with state.only_writer(tmp_path):
        assert (tmp_path / ".lock").exists()
