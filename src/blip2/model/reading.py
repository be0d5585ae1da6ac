"""What an LLM keeps of what it has read, between two tokens.

Reading   rows that are written side by side: keys and values, masks; rows join, leave and change places
Prefix    keys and values over one visual prompt, to go on from
Encoded   what an encoder-decoder's encoder gave
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2.model.key_values import is_roomy, join_layers
from blip2.model.replay import FixedStep

WORTH_TRIMMING = 16  # positions; fewer cost less than a copy


@dataclass
class Prefix:
    """What a decoder LLM has computed over a visual prompt, to go on from instead of reading it again.

    Attributes:
        keys_and_values: of every layer in turn, each (1, H, Q, Dh); empty where it has not read it yet. `start`
            fills it then, with parts of what it holds itself, unless the LLM keeps only a window of what it read.
    """

    keys_and_values: Sequence[Tensor] = ()


@dataclass
class Encoded:
    """What an encoder-decoder's encoder gave.

    Attributes:
        states: (B, N, Dl).
        mask: (B, N), 1 where the position is real.
    """

    states: Tensor
    mask: Tensor

    def select(self, rows: Tensor) -> "Encoded":
        """Its rows in another order, or some of them."""
        return Encoded(self.states[rows], self.mask[rows])

    def join(self, other: "Encoded") -> "Encoded":
        """With another's rows below these, the shorter ones padded on the right."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        states = [F.pad(one.states, (0, 0, 0, length - one.mask.shape[1])) for one in (self, other)]
        return Encoded(torch.cat(states), _stack([self.mask, other.mask], right=True))


@dataclass
class Reading:
    """What an LLM keeps of the rows it has read, between two tokens.

    Attributes:
        cache: keys and values of all positions but the newest token's; None where the LLM reads everything each time.
        mask: (B, L), 1 where the decoder's position is real.
        written: (B, T) tokens after the prompt, of an encoder-decoder with the start token before them; where there is
            a cache, of what was written since only the newest.
        encoded: of an encoder-decoder.
        bound: the recorded step that has the keys and values now, in place of `cache`.
    """

    cache: Any
    mask: Tensor
    written: Tensor
    encoded: Encoded | None = None
    bound: FixedStep | None = None

    def release(self) -> None:
        """Has the keys and values in its own cache again."""
        if self.bound is not None:
            self.bound.give_back()

    @property
    def can_join(self) -> bool:
        """Whether other rows can be put beside these."""
        return self.cache is not None and is_roomy(self._own_cache)

    @property
    def _own_cache(self) -> Any:
        return self.cache if self.encoded is None else self.cache.self_attention_cache

    def select(self, rows: Tensor) -> None:
        """Makes row i what row `rows[i]` was: drops, repeats and reorders."""
        self.release()
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        self.mask, self.written = self.mask[rows], self.written[rows]
        self.encoded = self.encoded.select(rows) if self.encoded is not None else None
        if self.can_join:
            self._trim()

    def shorten(self, length: int) -> None:
        """Forgets what was read after so many positions, of a decoder's rows that can join others."""
        self.mask = self.mask[:, :length]
        for layer in self._own_cache.layers:
            layer.shorten(length)

    def _trim(self) -> None:
        """Lets go of positions that are padding in all rows: where rows join and leave, they have no end else."""
        first = int(self.mask.any(dim=0).int().argmax())
        if first >= WORTH_TRIMMING:
            self.mask = self.mask[:, first:]
            for layer in self._own_cache.layers:
                layer.cut(first, None)
        if self.encoded is not None:
            longest = int(self.encoded.mask.sum(dim=1).max())
            if longest <= self.encoded.mask.shape[1] - WORTH_TRIMMING:
                self.encoded = Encoded(self.encoded.states[:, :longest], self.encoded.mask[:, :longest])
                for layer in self.cache.cross_attention_cache.layers:
                    layer.cut(0, longest)

    def join(self, other: "Reading") -> None:
        """Puts another reading's rows below these; both can join."""
        self.release()
        other.release()
        join_layers(self._own_cache, other._own_cache)
        if self.encoded is not None and other.encoded is not None:
            join_layers(self.cache.cross_attention_cache, other.cache.cross_attention_cache, right=True)
            self.encoded = self.encoded.join(other.encoded)
        self.mask = _stack([self.mask, other.mask])
        self.written = _stack([self.written, other.written])


def _stack(parts: Sequence[Tensor], *, right: bool = False) -> Tensor:
    """Rows of (B, L) below each other, the shorter ones padded with 0 on the left, or on the right."""
    length = max(part.shape[1] for part in parts)
    short = [length - part.shape[1] for part in parts]
    return torch.cat([F.pad(part, (0, n) if right else (n, 0)) for part, n in zip(parts, short, strict=True)])


def states_of(cache: Any) -> list[Tensor]:
    """Keys and values (B, H, L, Dh) of every layer in turn."""
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]
