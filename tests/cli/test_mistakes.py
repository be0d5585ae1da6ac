"""What people get wrong costs them one clear line, and neither answers nor files."""

import json
import os
import socket

import pytest
from PIL import Image

from blip2.cli.inputs import Input

LATIN = os.fsdecode("\xe9t\xe9".encode("latin-1"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "pictures/a.png", LATIN),
        ("caption", "pictures/a.png", "--prompt", LATIN),
        ("match", "pictures/a.png", LATIN),
        ("embed", LATIN, "--out", "x.npz"),
    ],
)
def test_a_text_that_is_not_utf8_is_told(run, folder, tiny, arguments):
    result = run(*arguments, "--model", tiny, "-q")
    assert result.code == 2
    assert "is not UTF-8" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("arguments", [("caption", ""), ("ask", "", "what?"), ("caption", "pictures/a.png", "")])
def test_an_empty_path_is_not_the_working_folder(run, folder, tiny, arguments):
    result = run(*arguments, "--model", tiny, "-q")
    assert (result.code, result.out) == (2, "")
    assert "One of the paths is empty" in result.err


def test_names_in_a_list_need_not_be_utf8(run, folder, tiny):
    name = os.fsencode(LATIN) + b".png"
    Image.new("RGB", (9, 9), "red").save(os.fsdecode(name))
    listed = b"\xef\xbb\xbfpictures/a.png\r\n" + name + b"\n"
    lines = run("caption", "-", "--model", tiny, "--json", "-q", stdin=listed)
    assert lines.code == 0
    found = [json.loads(line)["path"] for line in lines.out.encode().decode().splitlines()]
    assert found == ["pictures/a.png", os.fsdecode(name)]


def test_a_path_with_a_line_end_stays_one_line(run, folder, tiny):
    Image.new("RGB", (9, 9), "red").save("two\nlines.png")
    result = run("caption", "two\nlines.png", "pictures/a.png", "--model", tiny, "-q")
    assert [line.partition("\t")[0] for line in result.out.splitlines()] == ["two lines.png", "pictures/a.png"]


def test_an_answer_is_there_though_its_map_cannot_be_written(run, folder, tiny, monkeypatch):
    question = ("ask", "pictures/a.png", "what ?", "--model", tiny, "-q")
    answer = run(*question).out

    def full(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    result = run(*question, "--attention", "map.png")
    assert (result.code, result.out) == (2, answer)
    assert "No space left on device" in result.err
    assert not list(folder.glob("*map*"))


@pytest.mark.parametrize(("out", "message"), [("map.txt", "no kind of picture"), ("none/map.png", "does not exist")])
def test_a_map_that_cannot_be_written_is_refused_at_once(run, folder, out, message):
    result = run("ask", "pictures/a.png", "what ?", "--attention", out, "--model", "there is no such model")
    assert result.code == 2 and message in result.err


def test_embed_holds_no_more_pictures_than_it_works_on(run, folder, tiny, monkeypatch):
    held, most = [], []
    load = Input.load

    def loaded(self):
        image = load(self)
        held.append(image.copy)  # what keeps count: pictures that were loaded and not embedded yet
        most.append(len(held))
        return image

    monkeypatch.setattr(Input, "load", loaded)
    from blip2.inference.blip2 import Blip2

    embed = Blip2.embed_images

    def embedded(self, images):
        held.clear()
        return embed(self, images)

    monkeypatch.setattr(Blip2, "embed_images", embedded)
    assert run("embed", "pictures", "--out", "x.npz", "--batch-size", "2", "--model", tiny, "-q").code == 0
    assert max(most) == 2 and len(most) == 3


def test_a_question_that_is_longer_than_the_model_reads_is_told(run, folder, tiny):
    result = run("ask", "pictures/a.png", "why is it so ? " * 4000, "--model", tiny, "-q")
    assert result.code == 2
    assert "tokens long; beside an answer of" in result.err


def test_models_are_written_over_nothing_else(run, folder, tiny):
    written = ("quantize", "--to", "int8"), ("convert", "--to", "blip2", "--part", "stage1")
    for command, *given in written:
        result = run(command, tiny, "pictures", *given)
        assert result.code == 2
        assert "holds other things and no model" in result.err
    assert (folder / "pictures" / "notes.txt").read_text() == "no picture"
    assert (folder / "pictures" / "inside" / "c.webp").is_file()


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(run, tiny):
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = run("serve", "--model", tiny, "--port", other.getsockname()[1])
    assert result.code == 2
    assert "cannot listen on 127.0.0.1" in result.err and "The page:" not in result.err
