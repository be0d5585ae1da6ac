"""A turn of a row's inputs that lets one scale serve the whole row.

An LLM has a few inputs many times as large as the rest. Rounded to eight bits with a scale for the row, the rest are
left a few steps. A Hadamard matrix is orthogonal and makes of each input a sum over all of its block, with signs: what
stood out is spread, and no product changes if the weight's columns were turned likewise, x W^T = (x H) (W H)^T.

Source: https://arxiv.org/abs/2404.00456 (QuaRot), there over whole rows.
"""

from functools import cache

import torch
from torch import Tensor

CPU = torch.device("cpu")
LARGEST_BLOCK = 64  # inputs that are turned together: 128 spread a tenth better and take twice the time


@cache
def hadamard(size: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tensor:
    """(size, size), symmetric, its own inverse; size is a power of two."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
        return (matrix / size**0.5).to(device, dtype)


def block_of(width: int) -> int:
    """How many inputs of a row as wide are turned together: the largest power of two that divides it, 64 at most."""
    return min(width & -width, LARGEST_BLOCK)


def turned(x: Tensor, block: int) -> Tensor:
    """(..., K) with every `block` of them turned, in x's dtype; turned twice is x again."""
    if block < 2:
        return x
    return (x.unflatten(-1, (-1, block)) @ hadamard(block, x.device, x.dtype)).flatten(-2)
