"""The layers of OPT and Llama as one graph, or a few.

transformers' model stays around them: embeddings, masks, the last norm. In place of its layers stand `Stack`s.

    states, mask, keys and values of before  ─▶  all layers  ─▶  states, keys and values of the new tokens
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2.model.graphs.feeds import Before, added, causal, refuse, run
from blip2.model.graphs.graph import AT_ONCE, Graph, sessions
from blip2.model.graphs.layers import Fed, Heads, attend, layer_norm, rms_norm


class Stack(nn.Module):
    """Layers of a decoder that follow each other, in the place of one; see the module's docstring."""

    def __init__(self, session: Any, heads: Heads, places: range, *, turns: bool) -> None:
        super().__init__()
        self._session = session
        self._heads = heads
        self._places = places
        self._turns = turns

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
        before = Before(past_key_values, self._places, num_rows, self._heads, length)
        seen = causal(length, before.num_known) if attention_mask is None else attention_mask
        mask = added(seen).repeat(1, 1, self._heads.num // self._heads.num_shared, 1)
        fed = {"states": hidden_states.float()} | before.fed(mask)
        if self._turns:
            assert position_embeddings is not None
            cosines, sines = (turned.float()[:, None] for turned in position_embeddings)
            fed |= {"cosines": cosines, "sines": sines}
        hidden, *new = run(self._session, ["hidden", *before.new_names], fed)
        before.take_in(new)
        return hidden.to(hidden_states.dtype)


@dataclass(frozen=True)
class DecoderOnly:
    """How one kind of LLM is written down.

    Attributes:
        activation: the setting of the MLP's activation, and the one that `layer` writes down.
        heads: of a configuration.
        layer: (graph, layer, x, fed, heads, place) -> x.
        turns: positions by turning queries and keys.
    """

    activation: tuple[str, str]
    heads: Callable[[Any], Heads]
    layer: Callable[..., str]
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
        end = 0
        while end < len(layers):
            begin, graph = end, Graph()
            x = graph.input("states", "B", "T", config.hidden_size)
            fed = Fed(graph.input("mask", "B1", 1, "RT", "CT"), graph.input("sizes", 2, dtype=torch.int64))
            if self.turns:
                names = [graph.input(name, "B2", 1, "T", heads.width) for name in ("cosines", "sines")]
                fed = Fed(fed.mask, fed.sizes, (names[0], names[1]))
            while end < len(layers) and graph.num_bytes < AT_ONCE:
                x = self.layer(graph, layers[end], x, fed, heads, end)
                layers[end] = nn.Identity()
                end += 1
            graph.output("hidden", x)
            places.append(range(begin, end))
            yield graph


# Families


def _opt_layer(graph: Graph, layer: Any, x: str, fed: Fed, heads: Heads, place: int) -> str:
    attention, first = layer.self_attn, layer.do_layer_norm_before
    normed = layer_norm(graph, layer.self_attn_layer_norm, x) if first else x
    states = graph.product(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    attended = attend(graph, states, fed, heads, place)
    x = graph.node("Add", x, *graph.product(attended, attention.out_proj))
    x = x if first else layer_norm(graph, layer.self_attn_layer_norm, x)
    normed = layer_norm(graph, layer.final_layer_norm, x) if first else x
    wide = graph.node("Relu", *graph.product(normed, layer.fc1))
    x = graph.node("Add", x, *graph.product(wide, layer.fc2))
    return x if first else layer_norm(graph, layer.final_layer_norm, x)


def _llama_layer(graph: Graph, layer: Any, x: str, fed: Fed, heads: Heads, place: int) -> str:
    attention, mlp = layer.self_attn, layer.mlp
    normed = rms_norm(graph, layer.input_layernorm, x)
    states = graph.product(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    attended = attend(graph, states, fed, heads, place)
    x = graph.node("Add", x, *graph.product(attended, attention.o_proj))
    gate, up = graph.product(rms_norm(graph, layer.post_attention_layernorm, x), mlp.gate_proj, mlp.up_proj)
    opened = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
    return graph.node("Add", x, *graph.product(opened, mlp.down_proj))


def _opt_heads(config: Any) -> Heads:
    width = config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_attention_heads, width, width**-0.5)


def _llama_heads(config: Any) -> Heads:
    return Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim**-0.5)


OPT = DecoderOnly(("activation_function", "relu"), _opt_heads, _opt_layer, False)
LLAMA = DecoderOnly(("hidden_act", "silu"), _llama_heads, _llama_layer, True)
