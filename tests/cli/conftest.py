"""The command line run in this process, a tiny model, and a folder of pictures."""

import io
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from inference.tiny_model import make_tiny_model
from PIL import Image

from blip2.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The path of a tiny model folder with both parts."""
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny")).model)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `blip2` with arguments and standard input."""

    def run_command(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["blip2", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main.main()
        captured = capsys.readouterr()
        return Result(left.value.code or 0, captured.out, captured.err)

    return run_command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: three good pictures, one in a folder inside, a broken one beside them, and a text file."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    inside = tmp_path / "pictures" / "inside"
    inside.mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "pictures" / "a.png")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / "b.JPG", "JPEG")
    Image.new("RGB", (9, 9), "blue").save(inside / "c.webp")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    return tmp_path
