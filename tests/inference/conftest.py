"""Tiny model folders, made once."""

import numpy as np
import pytest
from PIL import Image

import blip2

from .tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders of a tiny model with both parts and their frozen parts."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def model(tiny):
    """That model, loaded."""
    return blip2.load(tiny.model)


@pytest.fixture(scope="session")
def images():
    """Five pictures that differ in every way."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    plain = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "white")]
    return [Image.fromarray(noise), *plain, Image.fromarray(noise[::-1, :20].copy())]
