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


def room_before(layer: Any, num_rows: int, heads: Heads, length: int) -> tuple[Tensor, Tensor]:
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


def added(seen: Tensor) -> Tensor:
    """What a mask adds to the scores: it is true, or 0, where something may be seen."""
    return torch.zeros(seen.shape).masked_fill_(~seen, CLOSED) if seen.dtype == torch.bool else seen.float()


def causal(length: int, num_known: int) -> Tensor:
    """(1, 1, T, L + T): all that is known, and of the new tokens those before."""
    return torch.ones(1, 1, length, num_known + length, dtype=torch.bool).tril(num_known)


def spread(mask: Tensor, num_known: int, room: int) -> Tensor:
    """A mask (B, H, T, L + T) over buffers with room, of which the rest is closed: (B, H, T, C + T)."""
    length = mask.shape[2]
    wide = mask.new_full((*mask.shape[:3], room + length), CLOSED)
    wide[..., :num_known] = mask[..., :num_known]
    wide[..., room:] = mask[..., num_known : num_known + length]
    return wide
