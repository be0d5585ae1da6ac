"""A prompt of a single row through all of a decoder at once, attention in it, where nothing was read before.

Of a small LLM's prompt a third of the time lies between the layers else: in PyTorch's attention, and in waking the
products' threads once for each layer.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blip2.model.graphs.attention import CLOSED, Heads, one_thread
from blip2.model.graphs.graph import ModelFile, Signature
from blip2.model.graphs.runtime import ROWS_AT_ONCE, Runtime
from blip2.model.graphs.words import Start, turned

APART = "query", "keys", "values"


class Prompts:
    """Reads a single row's prompt in the place of transformers' model; see the module's docstring.

    Args:
        decoder: what holds the layers; its memory goes when nobody else has it any more.
        heads: of its attention.
        start: as `Words` takes it.
    """

    runtime: Runtime  # once the file is complete

    def __init__(self, decoder: Any, heads: Heads, start: Start) -> None:
        self._decoder = weakref.ref(decoder)
        self._heads = heads
        self._start = start

    def takes(self, embeds: Tensor, mask: Tensor) -> bool:
        """Whether embeddings (B, T, D) are a single row's, and none of them is padding, by their mask (B, T)."""
        return len(embeds) == 1 and embeds.shape[1] <= ROWS_AT_ONCE and bool(mask.all())

    def logits(self, embeds: Tensor, cache: Any) -> Tensor:
        """Logits (1, V) float32 after embeddings (1, T, D), whose keys and values an empty cache takes."""
        places = torch.arange(embeds.shape[1], dtype=torch.float32)[:, None]
        with one_thread():
            given = self._start(self._decoder(), embeds[0].float(), 0)
            *read, states = self.runtime.run("prompt", places=places, **given)
            (logits,) = self.runtime.run("end", states=states[-1:])
        shape = 1, self._heads.num_shared, -1, self._heads.width
        for i, layer in enumerate(cache.layers):
            layer.put(read[2 * i].view(shape), read[2 * i + 1].view(shape))
        return logits


def write_prompt(
    file: ModelFile,
    signatures: list[Signature],
    heads: Heads,
    end: Callable[[Signature, int], int],
    vocabulary: Signature,
    *,
    turns: bool,
) -> None:
    """Writes the signatures "prompt" and "end" down; arguments as of `words.write_word`, and what comes before an
    attention names its queries, keys and values apart. (To cut them out of rows whose number is not told, XNNPACK has
    no kernel.)"""
    prompt, width = file.signature("prompt"), signatures[0].shapes()[0]["states"]
    x = prompt.input("states", width)
    names = ("cosines", "sines") if turns else ()
    turning = [prompt.reshape(prompt.input(name, heads.width), (-1, 1, heads.width)) for name in names]
    mask = _mask(prompt, prompt.input("places", 1), heads.num // heads.num_shared)
    found = prompt.include(signatures[0], states=x)
    for i, signature in enumerate(signatures[1:]):
        attended = _attend(prompt, i, [found[name] for name in APART], mask, turning, heads)
        found = prompt.include(signature, attended=attended, states=found["states"] if i else x)
    prompt.output("states", found["states"])
    last = file.signature("end")
    last.output("logits", last.include(vocabulary, x=end(last, last.input("states", width)))["y"])


def _mask(prompt: Signature, places: int, group: int) -> int:
    """What is added to the scores (G * T, T) of queries that share keys: nothing where a key is not after them."""
    rows = places if group == 1 else prompt.step("CONCATENATION", [places] * group, (-1, 1), axis=0)
    ahead = prompt.step("SUB", [prompt.reshape(places, (1, -1)), rows], (-1, -1))
    return prompt.multiply(prompt.step("RELU", [ahead], (-1, -1)), prompt.constant(torch.tensor([CLOSED])))


def _attend(prompt: Signature, layer: int, projected: list[int], mask: int, turning: list[int], heads: Heads) -> int:
    """(T, H * Dh) of queries, keys and values, (T, H or Hkv * Dh) each; keys and values are given out, (Hkv, T, Dh)."""
    width, shared = heads.width, heads.num_shared
    query, keys, values = (
        prompt.reshape(part, (-1, count, width))
        for part, count in zip(projected, (heads.num, shared, shared), strict=True)
    )
    query, keys = (turned(prompt, part, turning) for part in (query, keys))
    query = prompt.multiply(query, prompt.constant(torch.tensor([heads.scale])))
    query, keys, values = (_heads_first(prompt, part) for part in (query, keys, values))
    for name, one in ((f"keys {layer}", keys), (f"values {layer}", values)):
        prompt.output(name, prompt.reshape(one, (-1, shared * width)))
    query = prompt.reshape(query, (shared, -1, width))
    scores = prompt.step("BATCH_MATMUL", [query, keys], (shared, -1, -1), adjY=True)
    weights = prompt.step("SOFTMAX", [prompt.add(scores, mask)], (shared, -1, -1), beta=1.0)
    found = prompt.step("BATCH_MATMUL", [weights, values], (shared, -1, width))
    found = prompt.transpose(prompt.reshape(found, (heads.num, -1, width)), (1, 0, 2), (-1, heads.num, width))
    return prompt.reshape(found, (-1, heads.num * width))


def _heads_first(prompt: Signature, x: int) -> int:
    """(T, H, Dh) -> (H, T, Dh)."""
    _, count, width = prompt.shape(x)
    return prompt.transpose(x, (1, 0, 2), (count, -1, width))
