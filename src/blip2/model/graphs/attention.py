"""Attention between two products of rows, by PyTorch; masks as transformers' layers are given them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2.errors import UserError
from blip2.model.quantized import refuse_gradient

CLOSED = -1e30  # added to the score of what may not be seen; not infinite, for a row of padding may see nothing


@dataclass
class _Outside:
    threads: int = 1  # PyTorch's, where no product is computed


_outside = _Outside()
_known = threading.local()  # threads that were here before, whose number was set here since


@dataclass(frozen=True)
class Heads:
    """How a layer's attention is shaped.

    Attributes:
        num: of the queries.
        num_shared: of the keys and of the values.
        width: of each.
        scale: that scores are multiplied with.
    """

    num: int
    num_shared: int
    width: int
    scale: float

    @property
    def widths(self) -> list[int]:
        """Of queries, keys and values side by side."""
        return [self.num * self.width, self.num_shared * self.width, self.num_shared * self.width]


def in_heads(rows: Tensor, num_rows: int, width: int) -> Tensor:
    """(B * T, H * Dh) -> (B, H, T, Dh)."""
    return rows.view(num_rows, -1, rows.shape[1] // width, width).transpose(1, 2)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, heads: Heads) -> Tensor:
    """(B, H, T, Dh) over (B, Hkv, S, Dh), with what `added` gave of a mask (B or 1, H or 1, T or 1, S), as rows
    (B * T, H * Dh)."""
    shared = heads.num_shared != heads.num
    if query.shape[:3] == (1, heads.num, 1) and not shared:  # one token: a product would read memory at half the rate
        scores = (keys * query).sum(dim=3) * heads.scale  # (1, H, S)
        weights = torch.softmax(scores if mask is None else scores + mask[:, :, 0], dim=2)
        return (weights[..., None] * values).sum(dim=2).flatten(1)
    attended = F.scaled_dot_product_attention(query, keys, values, mask, scale=heads.scale, enable_gqa=shared)
    return attended.float().transpose(1, 2).flatten(2).flatten(0, 1)


def added(seen: Tensor) -> Tensor:
    """What a mask adds to the scores: it is true, or 0, where something may be seen."""
    return torch.zeros(seen.shape).masked_fill_(~seen, CLOSED) if seen.dtype == torch.bool else seen.float()


def causal(length: int, num_known: int) -> Tensor:
    """(1, 1, T, L + T): all that is known, and of the new tokens those before."""
    return torch.ones(1, 1, length, num_known + length, dtype=torch.bool).tril(num_known)


def turns(positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, T, Dh) as `rotated` takes them, (B or 1, 1, T, Dh), for all layers."""
    cosines, sines = (part.float()[:, None] for part in positions)
    left, right = sines.chunk(2, dim=-1)
    return cosines, torch.cat([-left, right], dim=-1)


def rotated(x: Tensor, turning: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys (B, H, T, Dh) by their positions, with what `turns` gave, if there is anything."""
    if turning is None:
        return x
    cosines, sines = turning
    return x * cosines + x.roll(x.shape[-1] // 2, dims=-1) * sines


def refuse(hidden_states: Tensor) -> None:
    """Raises UserError where a gradient would have to pass, or where states lie on another device than the graphs."""
    refuse_gradient(hidden_states)
    if hidden_states.device.type != "cpu":
        raise UserError("Weights that were laid out for a CPU stay there. Load the model for the other device.")


def extended(cache: Any, keys: Tensor, values: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """All keys and values of a layer, where a cache takes the new ones in; None: there are no others."""
    return (keys, values) if cache is None else cache.update(keys, values, place)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's other threads wait for work by spinning, on the cores that the products' threads are on: there are none
    meanwhile. A thread that first uses PyTorch meanwhile has one as well, which nobody asked for, and goes on with as
    many as others had."""
    now = torch.get_num_threads()
    is_meant = now > 1 or hasattr(_known, "thread") or threading.current_thread() is threading.main_thread()
    if is_meant:
        _outside.threads = now
    after = _outside.threads
    _known.thread = True
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _outside.threads = after
        torch.set_num_threads(after)
