"""Files, folders, globs and standard input name pictures."""

import io
import sys

import pytest

from blip2.cli.inputs import expand
from blip2.errors import BadImage, MissingFile, UserError


def names(*arguments):
    return [item.name for item in expand(arguments)]


@pytest.fixture
def stdin(monkeypatch):
    """Puts bytes on standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_files_folders_and_globs_in_their_order(folder):
    assert names("bad.png", "pictures") == ["bad.png", "pictures/a.png", "pictures/b.JPG", "pictures/inside/c.webp"]
    assert names("pictures/*.png", "pictures/**/*.webp") == ["pictures/a.png", "pictures/inside/c.webp"]


def test_hidden_files_and_other_files_of_a_folder_are_left_out(folder):
    (folder / "pictures" / ".hidden.png").write_bytes(b"")
    assert len(names("pictures")) == 3


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder):
    (folder / "pictures" / "a.png").rename(folder / "[1].png")
    assert names("[1].png") == ["[1].png"]


def test_only_what_is_named_by_itself_is_lone(folder):
    assert [item.is_lone for item in expand(["pictures/a.png"])] == [True]
    assert not any(item.is_lone for item in expand(["pictures", "*.png"]))


def test_text_on_standard_input_is_a_list_of_paths(folder, stdin):
    stdin("pictures/a.png\r\n\npictures/b ü.png\n".encode())
    assert names("-") == ["pictures/a.png", "pictures/b ü.png"]


def test_a_picture_on_standard_input_is_that_picture(folder, stdin):
    for path in ("pictures/a.png", "pictures/b.JPG", "pictures/inside/c.webp"):
        stdin((folder / path).read_bytes())
        (item,) = expand(["-"])
        assert item.name == "-" and item.is_lone
        assert item.load().mode == "RGB"


def test_a_broken_picture_on_standard_input_is_called_so(stdin):
    stdin(b"\x89PNG\r\n\x1a\n\0\0\0")
    with pytest.raises(BadImage, match="the picture on standard input"):
        expand(["-"])[0].load()


def test_empty_standard_input_is_refused(stdin):
    stdin(b"\n")
    with pytest.raises(UserError, match="Standard input is empty"):
        expand(["-"])


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("nowhere.png", MissingFile, "There is no file 'nowhere.png'"),
        ("*.tiff", MissingFile, r"There is no file '\*.tiff'"),
        ("empty", BadImage, "The folder empty holds no picture"),
    ],
)
def test_what_names_nothing_tells_so_when_it_is_loaded(folder, argument, error, message):
    (folder / "empty").mkdir()
    (item,) = expand([argument])
    with pytest.raises(error, match=message):
        item.load()
