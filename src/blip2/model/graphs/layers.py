"""What transformers' layers are made of, written down as steps of a `Graph`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blip2.model.graphs.graph import MICROSOFT, Graph


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


@dataclass(frozen=True)
class Fed:
    """Names of what all layers of a decoder are given.

    Attributes:
        mask: added to the scores, (B or 1, H or 1, H / Hkv * T, C + T).
        sizes: (2,), C and T.
        turning: cosines and sines (B or 1, 1, T, Dh), where positions turn queries and keys.
    """

    mask: str
    sizes: str
    turning: tuple[str, str] | None = None


@dataclass(frozen=True)
class Known:
    """Names of a layer's keys and values (B, Hkv, C, Dh), of which the mask closes what is not filled."""

    keys: str
    values: str


def attend(graph: Graph, states: list[str], fed: Fed, heads: Heads, place: int) -> str:
    """Attention over what is known and what is new, whose scores are put side by side: nothing that is known is copied.

    Args:
        states: queries, keys and values of the new tokens, (B, T, heads * Dh) each.
        place: of the layer, by which its known keys and values are fed and its new ones (B, Hkv, T, Dh) fetched.

    Returns:
        (B, T, H * Dh).
    """
    shape = ("B", heads.num_shared, "C", heads.width)
    known = Known(graph.input(f"keys_{place}", *shape), graph.input(f"values_{place}", *shape))
    counts = (heads.num, heads.num_shared, heads.num_shared)
    query, keys, values = (in_heads(graph, x, count, heads) for x, count in zip(states, counts, strict=True))
    if fed.turning is not None:
        query, keys = (_turned(graph, x, heads.width, fed.turning) for x in (query, keys))
    graph.output(f"new_keys_{place}", keys)
    graph.output(f"new_values_{place}", values)
    query = graph.node("Reshape", query, graph.shape(0, heads.num_shared, -1, heads.width))  # (B, Hkv, H / Hkv * T, Dh)
    scores = [_scores(graph, query, some, heads) for some in (known.keys, keys)]
    weights = _weights(graph, graph.node("Concat", *scores, axis=3), fed.mask)
    on_known, on_new = graph.split(weights, fed.sizes, 2)
    attended = graph.node("Add", graph.node("MatMul", on_known, known.values), graph.node("MatMul", on_new, values))
    attended = graph.node("Reshape", attended, graph.shape(0, heads.num, -1, heads.width))  # (B, H, T, Dh)
    return _together(graph, attended, heads)


def attend_to(graph: Graph, query: str, known: Known, mask: str, heads: Heads) -> str:
    """Attention of (B, T, H * Dh) over keys and values (B, H, S, Dh) -> (B, T, H * Dh); the mask is added to scores."""
    scores = _scores(graph, in_heads(graph, query, heads.num, heads), known.keys, heads)
    return _together(graph, graph.node("MatMul", _weights(graph, scores, mask), known.values), heads)


def in_heads(graph: Graph, x: str, count: int, heads: Heads) -> str:
    """(B, T, count * Dh) -> (B, count, T, Dh)."""
    return graph.node("Transpose", graph.node("Reshape", x, graph.shape(0, 0, count, heads.width)), perm=[0, 2, 1, 3])


def _together(graph: Graph, x: str, heads: Heads) -> str:
    """(B, H, T, Dh) -> (B, T, H * Dh)."""
    x = graph.node("Transpose", x, perm=[0, 2, 1, 3])
    return graph.node("Reshape", x, graph.shape(0, 0, heads.num * heads.width))


def _scores(graph: Graph, query: str, keys: str, heads: Heads) -> str:
    return graph.node("FusedMatMul", query, keys, domain=MICROSOFT, transB=1, alpha=heads.scale)


def _weights(graph: Graph, scores: str, mask: str) -> str:
    return graph.node("Softmax", graph.node("Add", scores, mask), axis=-1)


def _turned(graph: Graph, x: str, width: int, turning: tuple[str, str]) -> str:
    cosines, sines = turning
    left, right = graph.split(x, graph.shape(width // 2, width // 2), 2)
    crossed = graph.node("Concat", graph.node("Neg", right), left, axis=-1)
    return graph.node("Add", graph.node("Mul", x, cosines), graph.node("Mul", crossed, sines))


def layer_norm(graph: Graph, norm: nn.LayerNorm, x: str) -> str:
    """(..., D) normed."""
    weight = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight.float()
    bias = torch.zeros(norm.normalized_shape) if norm.bias is None else norm.bias.float()
    return graph.node("LayerNormalization", x, graph.constant(weight), graph.constant(bias), epsilon=norm.eps, axis=-1)


def rms_norm(graph: Graph, norm: Any, x: str) -> str:
    """(..., D) divided by its root mean square, as Llama and T5 do it."""
    weight = graph.constant(norm.weight.float())
    return graph.node("SimplifiedLayerNormalization", x, weight, epsilon=norm.variance_epsilon, axis=-1)
