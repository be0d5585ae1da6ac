"""Where a run computes, and its batches brought there."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from blip2.errors import BadRecipe


def use_threads(count: int | None) -> None:
    """Computes in so many threads from now on; none given: in as many as before."""
    if count:
        torch.set_num_threads(count)


def place_and_threads(device: torch.device) -> str:
    """What can change the last bits of a float32 result besides its operands, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def run_device(name: str) -> torch.device:
    """The device of this rank: "auto" is its GPU where there is one, else the CPU.

    Raises:
        BadRecipe: a device that this machine does not have.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadRecipe(f"training.device: there is no {name} on this machine; say cpu or auto.")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def resolve_precision(precision: str, device: torch.device) -> str:
    """The arithmetic that "auto" means here: bfloat16 where the processor has matrix units for it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # PyTorch tells of these units only by private names; without them bfloat16 is slower than float32
    has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device.type == "cpu" and has_units else "float32"


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on a device: its tensors, also inside dataclasses; everything else as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
        return batch
    fields = {field.name: moved(getattr(batch, field.name), device) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **fields)
