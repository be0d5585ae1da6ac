"""Where things lie on disk. Everything is under one folder: BLIP2_HOME, or ~/.cache/blip2.

    packages/   registry packages as downloaded, checked by sha256
    models/     frozen parts, unpacked or converted once
    data/       data sets built from the packages
    runs/       training runs
    features/   image features of frozen encoders
    converted/  .pth files of the original code, as model folders

A folder that is not there is made when something is put into it.
"""

import os
from pathlib import Path


def home() -> Path:
    """The folder that holds all downloads and products: the variable BLIP2_HOME, else ~/.cache/blip2."""
    chosen = os.environ.get("BLIP2_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "blip2"


def packages_dir() -> Path:
    """Registry packages as downloaded."""
    return home() / "packages"


def models_dir() -> Path:
    """Frozen parts, unpacked or converted once."""
    return home() / "models"


def data_dir() -> Path:
    """Data sets built from the packages."""
    return home() / "data"


def runs_dir() -> Path:
    """Training runs, one folder each."""
    return home() / "runs"
