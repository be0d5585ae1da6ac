"""What graphs are fed: masks, and keys and values with their room."""

from typing import Any

import torch
from torch import Tensor

from blip2.errors import UserError
from blip2.model.graphs.layers import Heads
from blip2.model.key_values import RoomyLayer
from blip2.model.quantized import refuse_gradient

CLOSED = -1e30  # added to the score of what may not be seen; not infinite, for a row of padding may see nothing


def refuse(hidden_states: Tensor) -> None:
    """Raises UserError where a gradient would have to pass, or where states lie on another device than the graphs."""
    refuse_gradient(hidden_states)
    if hidden_states.device.type != "cpu":
        raise UserError("Quantised weights stay where they were first used. Load the model for the other device.")


def run(session: Any, names: list[str], fed: dict[str, Tensor]) -> list[Tensor]:
    """The results of those names."""
    arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in fed.items()}
    return [torch.from_numpy(result) for result in session.run(names, arrays)]


def added(seen: Tensor) -> Tensor:
    """What a mask adds to the scores: it is true, or 0, where something may be seen."""
    return torch.zeros(seen.shape).masked_fill_(~seen, CLOSED) if seen.dtype == torch.bool else seen.float()


def causal(length: int, num_known: int) -> Tensor:
    """(1, 1, T, L + T): all that is known, and of the new tokens those before."""
    return torch.ones(1, 1, length, num_known + length, dtype=torch.bool).tril(num_known)


class Before:
    """What a cache knows in the layers at some places, as a graph is fed it.

    Args:
        cache: of a decoder's own attention; None: nothing is known.
        places: of the layers.
        num_rows, length: B and T of the new tokens.

    Attributes:
        num_known: L.
    """

    def __init__(self, cache: Any, places: range, num_rows: int, heads: Heads, length: int) -> None:
        layers = {i: None if cache is None else cache.layers[i] for i in places}
        self._cache, self._places, self._length = cache, places, length
        self._buffers = {i: _room_before(layer, num_rows, heads, length) for i, layer in layers.items()}
        self.num_known: int = 0 if cache is None else cache.layers[places[0]].get_seq_length()
        self.new_names = [f"new_{kind}_{i}" for i in places for kind in ("keys", "values")]

    def fed(self, mask: Tensor) -> dict[str, Tensor]:
        """With a mask (B, H, H / Hkv * T, L + T), over the buffers with their room: of that, the rest is closed."""
        room = self._buffers[self._places[0]][0].shape[2]
        wide = mask.new_full((*mask.shape[:3], room + self._length), CLOSED)
        wide[..., : self.num_known] = mask[..., : self.num_known]
        wide[..., room:] = mask[..., self.num_known : self.num_known + self._length]
        fed = {"mask": wide, "sizes": torch.tensor([room, self._length])}
        for i, (keys, values) in self._buffers.items():
            fed |= {f"keys_{i}": keys, f"values_{i}": values}
        return fed

    def take_in(self, new: list[Tensor]) -> None:
        """The cache takes new keys and values in, in the order of `new_names`."""
        if self._cache is not None:
            for i, keys, values in zip(self._places, new[::2], new[1::2], strict=True):
                self._cache.update(keys, values, i)


def _room_before(layer: Any, num_rows: int, heads: Heads, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, Hkv, C, Dh) that begin with those that a cache's layer holds, none where there is no layer. A
    roomy one has room for `length` more then, and one without states is given none."""
    if layer is None or not layer.is_initialized:
        nothing = torch.zeros(num_rows, heads.num_shared, 0, heads.width)
        if layer is None:
            return nothing, nothing
        layer.update(nothing, nothing)
    if isinstance(layer, RoomyLayer):
        return layer.reserve(layer.keys.shape[2] + length)
    return layer.keys, layer.values
