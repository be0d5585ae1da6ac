"""A token of a single row through all of a decoder at once, attention and the vocabulary in it.

Keys and values of what was read before are read where a cache has them, in buffers with room (`RoomyLayer`): their
size changes once in some tens of tokens.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blip2.model.graphs.attention import CLOSED, Heads, one_thread
from blip2.model.graphs.graph import ModelFile, Signature
from blip2.model.graphs.runtime import Memory, Runtime
from blip2.model.key_values import Room, RoomyLayer
from blip2.model.reading import Reading

Start = Callable[[Any, Tensor, int], dict[str, Tensor]]


class Words:
    """Reads a token of a single row in the place of transformers' model; see the module's docstring.

    Args:
        decoder: what holds the layers; its memory goes when nobody else has it any more.
        start: (decoder, embeddings (T, D), position of the first) -> states (T, D), and cosines and sines (T, Dh) of
            the positions, if queries and keys are turned by them.
    """

    runtime: Runtime  # once the file is complete

    def __init__(self, decoder: Any, start: Start) -> None:
        self._decoder = weakref.ref(decoder)
        self._start = start
        self._shared: weakref.WeakKeyDictionary[Room, tuple[Memory, Memory]] = weakref.WeakKeyDictionary()

    def takes(self, reading: Reading) -> bool:
        """Whether a reading is a single row, with something in buffers with room."""
        if len(reading.mask) != 1 or reading.cache is None:
            return False
        return all(isinstance(layer, RoomyLayer) and layer.get_seq_length() for layer in self.own_layers(reading))

    def logits(self, reading: Reading, token_ids: Tensor) -> Tensor:
        """Logits (1, V) float32 after a token (1,), which the reading's mask counts already."""
        layers = self.own_layers(reading)
        length = layers[0].get_seq_length()
        rooms = [layer.reserve(length + 1) for layer in layers]
        places, width = rooms[0].keys.shape[2:]
        with one_thread():
            held: dict[str, Tensor | Memory] = {**self.held(reading, length, places)}
            for i, room in enumerate(rooms):
                held[f"keys {i}"], held[f"values {i}"] = self._memory(room)
            decoder: Any = self._decoder()
            embeds = decoder.embed_tokens(token_ids).float()
            given = self._start(decoder, embeds, int(reading.mask.sum()) - 1)
            *new, logits = self.runtime.run("word", held, **given)
        for i, layer in enumerate(layers):
            key, value = (one.view(1, -1, 1, width) for one in new[2 * i : 2 * i + 2])
            layer.update(key, value)
        return logits

    def own_layers(self, reading: Reading) -> list[Any]:
        """What is kept for the attention to what was written."""
        return reading.cache.layers

    def _memory(self, room: Room) -> tuple[Memory, Memory]:
        """What LiteRT reads of a layer's buffers; sixty would take two milliseconds to make for each token."""
        found = self._shared.get(room)
        if found is None:
            found = self._shared[room] = Memory(room.keys), Memory(room.values)
        return found

    def held(self, reading: Reading, length: int, room: int) -> dict[str, Tensor]:
        """What else is held: what is added to the scores of buffers, of which so many places are filled."""
        seen = torch.full((room,), CLOSED)
        seen[:length].masked_fill_(reading.mask[0, :length].bool(), 0.0)
        return {"seen": seen}


def write_word(
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
    word = file.signature("word")
    x = word.input("states", signatures[0].shapes()[0]["states"])
    seen = word.input("seen", 1, (-1,))
    turning = [word.input(name, heads.width) for name in ("cosines", "sines")] if turns else []
    scale = word.constant(torch.tensor([heads.scale]))
    found = word.include(signatures[0], states=x)
    for i, signature in enumerate(signatures[1:]):
        query, key, value = split(word, found["projected"], heads)
        query, key = (turned(word, part, turning) for part in (query, key))
        attended = attend_on(word, i, (word.multiply(query, scale), key, value), seen, heads)
        x = found["states"] if i else x
        found = word.include(signature, attended=attended, states=x)
    word.output("logits", word.include(vocabulary, x=end(word, found["states"]))["y"])


def split(word: Signature, projected: int, heads: Heads) -> list[int]:
    """Queries, keys and values (H, Dh) each."""
    parts, begin = [], 0
    for size in heads.widths:
        parts.append(word.reshape(word.slice(projected, (0, begin), (1, size)), (-1, heads.width)))
        begin += size
    return parts


def attend_on(
    word: Signature, layer: int, new: tuple[int, int, int], seen: int, heads: Heads, of_itself: int | None = None
) -> int:
    """(1, H * Dh) of a new token over itself and what was written, of a cache's layer, which takes it in.

    Args:
        new: its queries, times the scale, and keys and values (H or Hkv, Dh).
        seen: what is added to the scores of what was written.
        of_itself: to its own, (H, 1, 1).
    """
    shared, group, width = heads.num_shared, heads.num // heads.num_shared, heads.width
    for name, one in ((f"key {layer}", new[1]), (f"value {layer}", new[2])):
        word.output(name, word.reshape(one, (-1, shared * width)))
    query = word.reshape(new[0], (shared, group, 1, width))
    key, value = (word.reshape(one, (shared, 1, 1, width)) for one in new[1:])
    keys, values = (word.input(f"{name} {layer}", width, (shared, 1, -1, width)) for name in ("keys", "values"))
    known, of_known = attend_to(word, query, keys, values, seen)
    of_new = word.sum(word.multiply(query, key), 3)  # (Hkv, G, 1)
    of_new = of_new if of_itself is None else word.add(of_new, of_itself)
    scores = word.step("CONCATENATION", [of_new, of_known], (shared, group, -1), axis=2)
    among_all = word.step("SOFTMAX", [scores], (shared, group, -1), beta=1.0)
    share = word.reshape(word.slice(among_all, (0, 0, 0), (shared, group, 1)), (shared, group, 1, 1))
    towards = word.multiply(word.step("SUB", [value, known], (shared, group, 1, width)), share)
    return word.reshape(word.add(known, towards), (-1, heads.num * width))


def attend_to(word: Signature, query: int, keys: int, values: int, seen: int) -> tuple[int, int]:
    """What queries (Hkv, G, 1, Dh) find in keys and values (Hkv, 1, S, Dh), of the queries' shape; and their scores
    (Hkv, G, S). Sums of products take less time than matrix products, which lay keys and values out anew, unless
    several queries share them."""
    shared, group, _, width = word.shape(query)
    if group > 1:
        keys, values = (word.reshape(one, (1, shared, -1, width)) for one in (keys, values))
        query = word.reshape(query, (1, shared, group, width))
        scores = word.step("BATCH_MATMUL", [query, keys], (1, shared, group, -1), adjY=True)
        scores = word.step("ADD", [scores, seen], (1, shared, group, -1))
        weights = word.step("SOFTMAX", [scores], (1, shared, group, -1), beta=1.0)
        found = word.step("BATCH_MATMUL", [weights, values], (1, shared, group, width))
        return word.reshape(found, (shared, group, 1, width)), word.reshape(scores, (shared, group, -1))
    scores = word.sum(word.step("MUL", [keys, query], (shared, 1, -1, width)), 3)
    scores = word.step("ADD", [scores, seen], (shared, 1, -1))
    weights = word.reshape(word.step("SOFTMAX", [scores], (shared, 1, -1), beta=1.0), (shared, 1, -1, 1))
    return word.sum(word.step("MUL", [weights, values], (shared, 1, -1, width)), 2, keeps=True), scores


def turned(word: Signature, x: int, turning: list[int]) -> int:
    """(..., Dh) by its position, as `attention.rotated`, where there are cosines and sines for it."""
    if not turning:
        return x
    (cosines, sines), shape, width = turning, word.shape(x), word.shape(x)[-1]
    half = torch.eye(width // 2)
    nothing = torch.zeros_like(half)
    swap = torch.cat([torch.cat([nothing, half], dim=1), torch.cat([-half, nothing], dim=1)])
    swapped = word.reshape(word.times(word.reshape(x, (-1, width)), swap), shape)
    return word.add(word.multiply(x, cosines), word.multiply(swapped, sines))
