"""A token of a single row through all of a decoder at once, attention and the vocabulary in it.

Keys and values of what was read before are read where a cache has them, in buffers with room (`RoomyLayer`): their
size changes once in some tens of tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from blip2.model.graphs.attention import CLOSED, Heads, one_thread
from blip2.model.graphs.graph import ModelFile, Signature
from blip2.model.graphs.runtime import Runtime
from blip2.model.key_values import RoomyLayer
from blip2.model.reading import Reading


class Words:
    """Reads a token of a single row in the place of transformers' model; see the module's docstring.

    Args:
        start: (token ids (1,), position) -> states (1, D), and cosines and sines (1, Dh) of the position, if queries
            and keys are turned by it.
    """

    runtime: Runtime  # once the file is complete

    def __init__(self, start: Callable[[Tensor, int], dict[str, Tensor]]) -> None:
        self._start = start

    def takes(self, reading: Reading) -> bool:
        """Whether a reading is a single row, with something in buffers with room."""
        if len(reading.mask) != 1 or reading.encoded is not None or reading.cache is None:
            return False
        return all(isinstance(layer, RoomyLayer) and layer.get_seq_length() for layer in reading.cache.layers)

    def logits(self, reading: Reading, token_ids: Tensor) -> Tensor:
        """Logits (1, V) float32 after a token (1,), which the reading's mask counts already."""
        layers: list[RoomyLayer] = reading.cache.layers
        length = layers[0].get_seq_length()
        held = {}
        for i, layer in enumerate(layers):
            held[f"keys {i}"], held[f"values {i}"] = layer.reserve(length + 1)
        seen = torch.full((held["keys 0"].shape[2],), CLOSED)
        seen[:length].masked_fill_(reading.mask[0, :length].bool(), 0.0)
        with one_thread():
            given = self._start(token_ids, int(reading.mask.sum()) - 1)
            *new, logits = self.runtime.run("word", {**held, "seen": seen}, **given)
        for i, layer in enumerate(layers):
            key, value = (one.view(1, -1, 1, held["keys 0"].shape[3]) for one in new[2 * i : 2 * i + 2])
            layer.update(key, value)
        return logits


def write(
    file: ModelFile,
    signatures: list[Signature],
    heads: Heads,
    end: Callable[[Signature, int], int],
    vocabulary: Signature,
    *,
    turns: bool,
) -> None:
    """Writes the signature "word" down.

    Args:
        signatures: what comes before the first attention, and what comes after each.
        end: (signature, states) -> what the product with the vocabulary is given.
        vocabulary: that product.
        turns: whether queries and keys are turned by their positions.
    """
    word, shared, width = file.signature("word"), heads.num_shared, heads.width
    x = word.input("states", signatures[0].shapes()[0]["states"])
    seen = word.input("seen", 1, (-1,))
    turning = [word.input(name, width) for name in ("cosines", "sines")] if turns else []
    found = word.include(signatures[0], states=x)
    for i, signature in enumerate(signatures[1:]):
        query, key, value = _split(word, found["projected"], heads)
        query, key = (_turned(word, part, turning) for part in (query, key))
        for name, new in ((f"key {i}", key), (f"value {i}", value)):
            word.output(name, word.reshape(new, (-1, shared * width)))
        keys, values = (word.input(f"{name} {i}", width, (shared, 1, -1, width)) for name in ("keys", "values"))
        attended = _attended(word, (query, key, value), keys, values, seen, heads)
        x = found["states"] if i else x
        found = word.include(signature, attended=attended, states=x)
    word.output("logits", word.include(vocabulary, x=end(word, found["states"]))["y"])


def _split(word: Signature, projected: int, heads: Heads) -> list[int]:
    """Queries, keys and values (H, Dh) each."""
    parts, begin = [], 0
    for size in heads.widths:
        parts.append(word.reshape(word.slice(projected, (0, begin), (1, size)), (-1, heads.width)))
        begin += size
    return parts


def _turned(word: Signature, x: int, turning: list[int]) -> int:
    """(H, Dh) by its position, as `attention.rotated`."""
    if not turning:
        return x
    (cosines, sines), width = turning, word.width(x)
    half = torch.eye(width // 2)
    nothing = torch.zeros_like(half)
    swapped = word.times(x, torch.cat([torch.cat([nothing, half], dim=1), torch.cat([-half, nothing], dim=1)]))
    return word.add(word.multiply(x, cosines), word.multiply(swapped, sines))


def _attended(word: Signature, new: tuple[int, int, int], keys: int, values: int, seen: int, heads: Heads) -> int:
    """(1, H * Dh) of the new token's query, key and value (H or Hkv, Dh) and what is known (Hkv, 1, S, Dh). Sums of
    products take less time here than matrix products, which lay keys and values out anew."""
    shared, width = heads.num_shared, heads.width
    group = heads.num // shared
    scale = word.constant(torch.tensor([heads.scale]))
    query = word.reshape(word.multiply(new[0], scale), (shared, group, 1, width))
    key, value = (word.reshape(one, (shared, 1, 1, width)) for one in new[1:])
    of_known = word.sum(word.step("MUL", [keys, query], (shared, group, -1, width)), 3)
    of_known = word.step("ADD", [of_known, seen], (shared, group, -1))
    of_new = word.sum(word.multiply(query, key), 3)  # (Hkv, G, 1)
    among_known = word.reshape(word.step("SOFTMAX", [of_known], (shared, group, -1), beta=1.0), (shared, group, -1, 1))
    known = word.step("MUL", [among_known, values], (shared, group, -1, width))
    known = word.sum(known, 2, keeps=True)
    scores = word.step("CONCATENATION", [of_new, of_known], (shared, group, -1), axis=2)
    among_all = word.step("SOFTMAX", [scores], (shared, group, -1), beta=1.0)
    share = word.reshape(word.slice(among_all, (0, 0, 0), (shared, group, 1)), (shared, group, 1, 1))
    towards = word.multiply(word.step("SUB", [value, known], (shared, group, 1, width)), share)
    return word.reshape(word.add(known, towards), (-1, heads.num * width))
