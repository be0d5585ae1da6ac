"""A tiny model behind a real server, made once."""

import numpy as np
import pytest
from inference.tiny_model import make_tiny_model
from PIL import Image

import blip2
from blip2.server.settings import ServerSettings

from .serving import serving


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The path of a tiny model folder with both parts."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny")).model


@pytest.fixture(scope="session")
def alone(tiny_folder):
    """The same model outside any server, to compare with."""
    return blip2.load(tiny_folder)


@pytest.fixture(scope="session")
def images():
    """Three pictures that differ in every way."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.new("RGB", (9, 9), "red"), Image.fromarray(noise[::-1, :20].copy())]


@pytest.fixture(scope="session")
def served(tiny_folder):
    """The tiny model's server with the settings that nobody changed."""
    with serving(blip2.load(tiny_folder), ServerSettings(name="tiny")) as running:
        yield running


@pytest.fixture(scope="session")
def server_url():
    """The address of a server of the mini model."""
    with serving(blip2.load("mini"), ServerSettings(name="mini")) as running:
        yield running.url
