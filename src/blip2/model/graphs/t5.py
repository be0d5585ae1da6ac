"""The layers of a quantised T5 as graphs: those of the encoder, and those of the decoder.

encoder    states, mask with position bias  ─▶  all layers  ─▶  states
once       what the encoder gave            ─▶  keys and values of every decoder layer
decoder    states, masks, both kinds of keys and values  ─▶  all layers  ─▶  states, keys and values of the new tokens
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blip2.model.graphs.feeds import Before, added, causal, refuse, run
from blip2.model.graphs.graph import AT_ONCE, Graph, sessions
from blip2.model.graphs.layers import Fed, Heads, Known, attend, attend_to, in_heads, rms_norm
from blip2.model.key_values import RoomyLayer


class T5:
    """How FlanT5 is written down; a `Family`."""

    def fits(self, config: Any) -> bool:
        """Whether the MLP is gated, with the usual GELU."""
        return config.is_gated_act and config.dense_act_fn == "gelu_new"

    def replace(self, network: Any) -> None:
        """Puts graphs in the place of the layers, which are used up one by one."""
        heads = Heads(network.config.num_heads, network.config.num_heads, network.config.d_kv, 1.0)
        width = network.config.d_model
        for stack, write, kind in (
            (network.encoder, _encoder_graphs, _EncoderStack),
            (network.decoder, _decoder_graphs, _DecoderStack),
        ):
            biases = stack.block[0].layer[0].SelfAttention
            places: list[range] = []
            made = sessions(write(stack.block, heads, width, places))
            each = len(made) // len(places)  # graphs of the same layers
            parts = [made[i * each : (i + 1) * each] for i in range(len(places))]
            blocks = [kind(heads, biases, some, *part) for some, part in zip(places, parts, strict=True)]
            stack.block = nn.ModuleList(blocks)
            for name in ("q", "k", "v", "o"):  # only the biases of positions are still asked of it
                delattr(biases, name)


class _Stack(nn.Module):
    """Layers that follow each other, in the place of one."""

    def __init__(self, heads: Heads, biases: Any, places: range, session: Any, once: Any = None) -> None:
        super().__init__()
        self.heads = heads
        self.places = places
        self._session, self._once = session, once
        self._biases = [biases]  # no module of this one: each of several has it

    def position_bias(self, length: int, num_known: int) -> Tensor:
        """(1, H, T, L + T)."""
        return self._biases[0].compute_bias(length, num_known + length, past_seen_tokens=num_known)


class _EncoderStack(_Stack):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_bias: Tensor | None,
        *others: Any,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """As a `T5Block`: states (B, T, D); a mask (B, 1, 1 or T, T); biases, None in the first."""
        refuse(hidden_states)
        length = hidden_states.shape[1]
        bias = self.position_bias(length, 0) if position_bias is None else position_bias
        mask = bias.float() if attention_mask is None else bias.float() + added(attention_mask)
        (hidden,) = run(self._session, ["hidden"], {"states": hidden_states.float(), "mask": mask})
        return _as(hidden, hidden_states.dtype), bias, None


class _DecoderStack(_Stack):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_bias: Tensor | None,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        *others: Any,
        past_key_values: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """As a `T5Block`: states (B, T, D); a mask (B, 1, T, L + T); biases, None in the first; what the encoder gave
        (B, S, D), and its mask (B, 1, 1 or T, S); the cache of both attentions."""
        refuse(hidden_states)
        num_rows, length, _ = hidden_states.shape
        own = None if past_key_values is None else past_key_values.self_attention_cache
        before = Before(own, self.places, num_rows, self.heads, length)
        bias = self.position_bias(length, before.num_known) if position_bias is None else position_bias
        mask = bias.float() + added(causal(length, before.num_known) if attention_mask is None else attention_mask)
        seen = torch.zeros(1, 1, 1, encoder_hidden_states.shape[1])
        if encoder_attention_mask is not None:
            seen = added(encoder_attention_mask)[:, :, :1]
        fed = {"states": hidden_states.float(), "seen": seen} | before.fed(mask)
        for i, (keys, values) in self._encoded(encoder_hidden_states, past_key_values).items():
            fed |= {f"seen_keys_{i}": keys, f"seen_values_{i}": values}
        hidden, *new = run(self._session, ["hidden", *before.new_names], fed)
        before.take_in(new)
        return _as(hidden, hidden_states.dtype), bias, None

    def _encoded(self, states: Tensor, caches: Any) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values (B, H, S, Dh) of what the encoder gave; computed once where there is a cache."""
        layers = [] if caches is None else caches.cross_attention_cache.layers
        if caches is not None and caches.is_updated.get(self.places[0]):
            return {i: (layers[i].keys, layers[i].values) for i in self.places}
        names = [f"{kind}_{i}" for i in self.places for kind in ("keys", "values")]
        found = run(self._once, names, {"encoded": states.float()})
        encoded = dict(zip(self.places, zip(found[::2], found[1::2], strict=True), strict=True))
        if caches is None:
            return encoded
        for i in self.places:
            layer = layers[i]
            if isinstance(layer, RoomyLayer):
                layer.lazy_initialization(*encoded[i])
                layer.put(*encoded[i])  # no more will come, so no room is needed
            else:
                layer.update(*encoded[i])
            caches.is_updated[i] = True
        return encoded


def _as(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What float16 cannot hold becomes the largest that it can, as in transformers' layers."""
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        hidden = hidden.clamp(-most, most)
    return hidden.to(dtype)


def _project(graph: Graph, attention: Any, x: str) -> list[str]:
    """Queries, keys and values of a self-attention."""
    normed, own = rms_norm(graph, attention.layer_norm, x), attention.SelfAttention
    return graph.product(normed, own.q, own.k, own.v)


def _feed_forward(graph: Graph, layer: Any, x: str) -> str:
    mlp = layer.DenseReluDense
    gate, up = graph.product(rms_norm(graph, layer.layer_norm, x), mlp.wi_0, mlp.wi_1)
    opened = graph.node("Mul", graph.node("Gelu", gate, approximate="tanh"), up)
    return graph.node("Add", x, *graph.product(opened, mlp.wo))


def _encoder_graphs(layers: nn.ModuleList, heads: Heads, width: int, places: list[range]) -> Iterator[Graph]:
    """Graphs of as many layers as are laid out at once; which these are is appended to `places`."""
    end = 0
    while end < len(layers):
        begin, graph = end, Graph()
        x, mask = graph.input("states", "B", "T", width), graph.input("mask", "B1", heads.num, "T", "T")
        while end < len(layers) and graph.num_bytes < AT_ONCE:
            layer: Any = layers[end]
            query, keys, values = _project(graph, layer.layer[0], x)
            known = Known(*(in_heads(graph, states, heads.num, heads) for states in (keys, values)))
            attended = attend_to(graph, query, known, mask, heads)
            x = graph.node("Add", x, *graph.product(attended, layer.layer[0].SelfAttention.o))
            x = _feed_forward(graph, layer.layer[1], x)
            layers[end] = nn.Identity()
            end += 1
        graph.output("hidden", x)
        places.append(range(begin, end))
        yield graph


def _decoder_graphs(layers: nn.ModuleList, heads: Heads, width: int, places: list[range]) -> Iterator[Graph]:
    """As `_encoder_graphs`, two for the same layers: of every step, and of what is computed once."""
    end = 0
    while end < len(layers):
        begin, graph, once = end, Graph(), Graph()
        x, encoded = graph.input("states", "B", "T", width), once.input("encoded", "B", "S", width)
        fed = Fed(graph.input("mask", "B1", heads.num, "T", "CT"), graph.input("sizes", 2, dtype=torch.int64))
        seen = graph.input("seen", "B2", 1, 1, "S")
        while end < len(layers) and graph.num_bytes + once.num_bytes < AT_ONCE:
            layer: Any = layers[end]
            own, cross, mlp = layer.layer
            attended = attend(graph, _project(graph, own, x), fed, heads, end)
            x = graph.node("Add", x, *graph.product(attended, own.SelfAttention.o))
            attention = cross.EncDecAttention
            for name, states in zip(("keys", "values"), once.product(encoded, attention.k, attention.v), strict=True):
                once.output(f"{name}_{end}", in_heads(once, states, heads.num, heads))
            shape = ("B", heads.num, "S", heads.width)
            known = Known(graph.input(f"seen_keys_{end}", *shape), graph.input(f"seen_values_{end}", *shape))
            (query,) = graph.product(rms_norm(graph, cross.layer_norm, x), attention.q)
            x = graph.node("Add", x, *graph.product(attend_to(graph, query, known, seen, heads), attention.o))
            x = _feed_forward(graph, mlp, x)
            layers[end] = nn.Identity()
            end += 1
        graph.output("hidden", x)
        places.append(range(begin, end))
        yield graph
        yield once
