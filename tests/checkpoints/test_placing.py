"""A model folder is put where it belongs, and nothing else that is there goes."""

import os
from pathlib import Path

import pytest

from blip2.checkpoints import placing
from blip2.errors import UserError

MARK = "model.json"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def put(folder, **files):
    place = placing.checked_place(folder, MARK)
    new = placing.beside(place)
    placing.put(write(new, **files), place, lambda name: name in (MARK, "weights", "language"))


def found(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_and_an_empty_folder_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/below"):
        put(tmp_path / name, model__json="1", weights="w")
        assert found(tmp_path / name) == {"model.json": "1", "weights": "w"}


def test_a_folder_of_other_things_is_refused_and_stays(tmp_path):
    mine = write(tmp_path / "mine" / "photos", **{"baby__txt": "precious"}).parent
    with pytest.raises(UserError, match="holds other things and no model"):
        put(mine, model__json="1")
    assert found(mine) == {"photos/baby.txt": "precious"}


def test_of_a_models_folder_only_what_is_ours_is_replaced(tmp_path):
    old = write(tmp_path / "m", model__json="0", weights="old", README__md="card")
    write(old / "language", weights="old")
    write(old / "photos" / "2024", baby__txt="precious")
    put(old, model__json="1")
    assert found(old) == {"README.md": "card", "model.json": "1", "photos/2024/baby.txt": "precious"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is a file"):
        put(tmp_path / "thesis.txt", model__json="1")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    (tmp_path / "dangling").symlink_to("later")
    for name, place in (("link", "big"), ("dangling", "later")):
        put(tmp_path / name, model__json="1")
        assert (tmp_path / name).is_symlink()
        assert found(tmp_path / place) == {"model.json": "1"}


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_the_working_folder_and_those_above_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(write(tmp_path / "here"))
    with pytest.raises(UserError, match="is the folder you are in"):
        placing.checked_place(name, MARK)


def test_where_the_new_folder_cannot_be_put_the_old_one_stays(tmp_path, monkeypatch):
    old = write(tmp_path / "m", model__json="0")
    rename = Path.rename

    def fail(self, target):
        if ".writing-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        put(old, model__json="1")
    assert found(old) == {"model.json": "0"}


def test_files_that_are_put_have_the_rights_of_new_ones(tmp_path):
    umask = os.umask(0o027)
    try:
        new = placing.beside(tmp_path / "model")
        (new / "weights").write_text("x")
        (new / "weights").chmod(0o600)  # as safetensors does it
        placing.put(new, tmp_path / "model", lambda name: True)
    finally:
        os.umask(umask)
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == 0o640
