"""Opens the model a command asked for: on the device there is, without the libraries' chatter."""

import sys
import warnings
from typing import TYPE_CHECKING

from blip2.errors import UserError

if TYPE_CHECKING:
    from blip2.inference.blip2 import Blip2


def open_model(name: str, part: str, *, device: str = "auto", quiet: bool = False) -> "Blip2":
    """The model with one part loaded, "stage1" or "generation"; only that part costs time and memory."""
    if not quiet and sys.stderr.isatty():
        print(f"Loading {name} ...", end="\r", file=sys.stderr, flush=True)
    import torch
    from transformers.utils import logging

    from blip2.inference.loading import load

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(name, _device(device, torch.cuda.is_available()), parts=[part])


def _device(asked: str, has_gpu: bool) -> str:
    if asked == "auto":
        return "cuda" if has_gpu else "cpu"
    kind = asked.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"There is no device {asked!r}. Give cpu, cuda, cuda:1 or auto.")
    if kind == "cuda" and not has_gpu:
        raise UserError("No CUDA device is found here. Give --device cpu.")
    return asked
