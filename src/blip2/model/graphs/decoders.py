"""The layers of OPT and Llama as one graph, or a few.

transformers' model stays around them: embeddings, masks, the last norm. In place of its layers stand `Stack`s.

    states, mask, keys and values of before  ─▶  all layers  ─▶  states, keys and values of the new tokens
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2.model.graphs.feeds import added, causal, refuse, room_before, run, spread
from blip2.model.graphs.graph import AT_ONCE, Graph, sessions
from blip2.model.graphs.layers import Fed, Heads, Known, attend, layer_norm, rms_norm


class Stack(nn.Module):
    """Layers of a decoder that follow each other, in the place of one; see the module's docstring."""

    def __init__(self, session: Any, heads: Heads, places: range, *, turns: bool) -> None:
        super().__init__()
        self._session = session
        self._heads = heads
        self._places = places
        self._turns = turns
        self._names = ["hidden", *(f"new_{kind}_{i}" for i in places for kind in ("keys", "values"))]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> Tensor:
        """As one of transformers' layers, but for several.

        Args:
            hidden_states: (B, T, D) of the new tokens.
            attention_mask: (B or 1, 1, T, L + T), true or 0 where a position may be seen; None: all before it.
            position_embeddings: cosines and sines (B or 1, T, Dh), where the family turns its positions.
            past_key_values: the cache with L positions, which takes the new ones in; None: L is 0.

        Returns:
            (B, T, D).
        """
        refuse(hidden_states)
        num_rows, length, _ = hidden_states.shape
        layers: dict[int, Any] = dict.fromkeys(self._places)
        if past_key_values is not None:
            layers = {i: past_key_values.layers[i] for i in self._places}
        before = {i: room_before(layer, num_rows, self._heads, length) for i, layer in layers.items()}
        first = self._places[0]
        room = before[first][0].shape[2]
        num_known = layers[first].get_seq_length() if past_key_values is not None else 0
        seen = causal(length, num_known) if attention_mask is None else attention_mask
        mask = spread(added(seen), num_known, room).repeat(1, 1, self._heads.num // self._heads.num_shared, 1)
        fed = {"states": hidden_states.float(), "mask": mask, "sizes": torch.tensor([room, length])}
        if self._turns:
            assert position_embeddings is not None
            cosines, sines = (turned.float()[:, None] for turned in position_embeddings)
            fed |= {"cosines": cosines, "sines": sines}
        for i, (keys, values) in before.items():
            fed |= {f"keys_{i}": keys, f"values_{i}": values}
        hidden, *new = run(self._session, self._names, fed)
        if past_key_values is not None:
            for i, keys, values in zip(self._places, new[::2], new[1::2], strict=True):
                past_key_values.update(keys, values, i)
        return hidden.to(hidden_states.dtype)


@dataclass(frozen=True)
class DecoderOnly:
    """How one kind of LLM is written down.

    Attributes:
        activation: the setting of the MLP's activation, and the one that `layer` writes down.
        heads: of a configuration.
        layer: (graph, layer, x, fed, heads, known) -> x, new keys and values.
        turns: positions by turning queries and keys.
    """

    activation: tuple[str, str]
    heads: Callable[[Any], Heads]
    layer: Callable[..., tuple[str, Known]]
    turns: bool

    def fits(self, config: Any) -> bool:
        """Whether a configuration is one that `layer` can write down."""
        setting, wanted = self.activation
        return getattr(config, setting) == wanted

    def replace(self, network: Any) -> None:
        """Puts graphs in the place of the layers: several, so that not all weights are held twice while they are laid
        out. The layers are used up one by one, which frees what they held."""
        decoder, heads = network.get_decoder(), self.heads(network.config)
        places: list[range] = []
        made = sessions(self._graphs(network.config, heads, decoder.layers, places))
        stacks = [Stack(one, heads, some, turns=self.turns) for one, some in zip(made, places, strict=True)]
        decoder.layers = nn.ModuleList(stacks)

    def _graphs(self, config: Any, heads: Heads, layers: nn.ModuleList, places: list[range]) -> Iterator[Graph]:
        """Of as many layers as are laid out at once; which these are is appended to `places`."""
        while not places or places[-1].stop < len(layers):
            graph, end = self._graph(config, heads, layers, places[-1].stop if places else 0)
            places.append(range(places[-1].stop if places else 0, end))
            yield graph

    def _graph(self, config: Any, heads: Heads, layers: nn.ModuleList, begin: int) -> tuple[Graph, int]:
        """Layers from `begin` on, and where the next graph begins."""
        graph = Graph()
        x = graph.input("states", "B", "T", config.hidden_size)
        fed = Fed(graph.input("mask", "B1", 1, "RT", "CT"), graph.input("sizes", 2, dtype=torch.int64))
        if self.turns:
            names = [graph.input(name, "B2", 1, "T", heads.width) for name in ("cosines", "sines")]
            fed = Fed(fed.mask, fed.sizes, (names[0], names[1]))
        end = begin
        while end < len(layers) and graph.num_bytes < AT_ONCE:
            shape = ("B", heads.num_shared, "C", heads.width)
            known = Known(graph.input(f"keys_{end}", *shape), graph.input(f"values_{end}", *shape))
            x, new = self.layer(graph, layers[end], x, fed, heads, known)
            graph.output(f"new_keys_{end}", new.keys)
            graph.output(f"new_values_{end}", new.values)
            layers[end] = nn.Identity()
            end += 1
        graph.output("hidden", x)
        return graph, end


# Families


def _opt_layer(graph: Graph, layer: Any, x: str, fed: Fed, heads: Heads, known: Known) -> tuple[str, Known]:
    attention, first = layer.self_attn, layer.do_layer_norm_before
    normed = layer_norm(graph, layer.self_attn_layer_norm, x) if first else x
    states = graph.product(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    attended, new = attend(graph, states, fed, heads, known)
    x = graph.node("Add", x, *graph.product(attended, attention.out_proj))
    x = x if first else layer_norm(graph, layer.self_attn_layer_norm, x)
    normed = layer_norm(graph, layer.final_layer_norm, x) if first else x
    wide = graph.node("Relu", *graph.product(normed, layer.fc1))
    x = graph.node("Add", x, *graph.product(wide, layer.fc2))
    return x if first else layer_norm(graph, layer.final_layer_norm, x), new


def _llama_layer(graph: Graph, layer: Any, x: str, fed: Fed, heads: Heads, known: Known) -> tuple[str, Known]:
    attention, mlp = layer.self_attn, layer.mlp
    normed = rms_norm(graph, layer.input_layernorm, x)
    states = graph.product(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    attended, new = attend(graph, states, fed, heads, known)
    x = graph.node("Add", x, *graph.product(attended, attention.o_proj))
    gate, up = graph.product(rms_norm(graph, layer.post_attention_layernorm, x), mlp.gate_proj, mlp.up_proj)
    opened = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
    return graph.node("Add", x, *graph.product(opened, mlp.down_proj)), new


def _opt_heads(config: Any) -> Heads:
    width = config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_attention_heads, width, width**-0.5)


def _llama_heads(config: Any) -> Heads:
    return Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim**-0.5)


OPT = DecoderOnly(("activation_function", "relu"), _opt_heads, _opt_layer, False)
LLAMA = DecoderOnly(("hidden_act", "silu"), _llama_heads, _llama_layer, True)
