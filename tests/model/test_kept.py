"""What was laid out of a quantised part is found again, and never what was laid out of another."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from blip2.model.graphs import kept
from blip2.model.graphs.graph import ModelFile
from blip2.model.graphs.taking_over import Product
from blip2.model.quantized import Int8Linear, to_int8


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept, "WORTH", 1)
    return tmp_path / "home" / "laid-out"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"as they were")
    return path


def product(weights, seed=0):
    """What a layer gives for one input, and whether it was laid out before."""
    torch.manual_seed(seed)
    linear = nn.Linear(64, 16).requires_grad_(False)
    file = ModelFile(weights)
    layer = Product(Int8Linear(*to_int8(linear.weight), linear.bias), file, "alone")
    layer.runtime = file.runtime()
    return layer(torch.ones(1, 64)), file.is_kept


def test_what_was_laid_out_is_found_again(home, weights):
    first, was_there = product(weights)
    assert not was_there and len(list(home.iterdir())) == 1
    again, was_there = product(weights, seed=1)  # whose own weights are not looked at
    assert was_there and torch.equal(first, again)


def test_other_weights_are_laid_out_anew_and_what_is_stale_goes(home, weights):
    first, _ = product(weights)
    weights.write_bytes(b"and as they are now")
    other, was_there = product(weights, seed=1)
    assert not was_there and not torch.equal(first, other)
    assert len(list(home.iterdir())) == 1, "what nobody will ask for again is gone"


def test_few_weights_are_not_kept(home, weights, monkeypatch):
    monkeypatch.setattr(kept, "WORTH", 100)
    assert not product(weights)[1] and not home.exists()


def test_a_place_that_is_not_whole_is_filled_anew(home, weights):
    first, _ = product(weights)
    (place,) = home.iterdir()
    (place / kept.SOURCE).unlink()
    again, was_there = product(weights)
    assert not was_there and torch.equal(first, again)


def test_without_room_or_right_it_goes_on(home, weights, monkeypatch):
    monkeypatch.setattr(kept, "ROOM", 1e12)
    first, was_there = product(weights)
    assert not was_there and not list(home.iterdir())
    home.rmdir()
    home.write_text("a file where the folder would be")
    monkeypatch.setattr(kept, "ROOM", 4)
    again, was_there = product(weights)
    assert not was_there and torch.equal(first, again)


def test_two_that_lay_out_at_once_do_not_meet(home, weights):
    """The second one finds the place filled, and works with its own files, which are gone with it."""
    first, second = ModelFile(weights), ModelFile(weights)
    layer = Int8Linear(*to_int8(torch.eye(64)), None)
    found = []
    for file in (first, second):
        alone = Product(layer, file, "alone")
        alone.runtime = file.runtime()
        found.append(alone(torch.ones(1, 64)))
    assert torch.equal(*found) and len(list(home.iterdir())) == 1


def test_what_a_process_left_that_was_ended_goes(home, weights):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left, living = home / f".a.writing-{int(ended.stdout)}-x", home / f".b.writing-{os.getppid()}-x"
    left.mkdir(parents=True)
    living.mkdir()
    product(weights)
    assert not left.exists() and living.exists()


def test_a_place_tells_what_it_was_made_of(home, weights):
    product(weights)
    (place,) = home.iterdir()
    told = json.loads((place / kept.SOURCE).read_text())
    assert told["path"] == str(weights) and told["bytes"] == weights.stat().st_size
