"""The layers of a quantised decoder LLM as one graph, which ONNX Runtime computes on a CPU.

transformers' model stays around them: embeddings, masks, the last norm. In place of its layers stands one `Stack`.

    hidden states, mask, keys and values of before  ─▶  all layers  ─▶  hidden states, keys and values of the new tokens

One graph, since two programs' threads on the same cores get in each other's way: with a call for each product a word of
OPT-2.7B took 66 to 190 ms, of which the products were 43 (docs/decisions.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2.model.key_values import RoomyLayer
from blip2.model.onnx_graph import Graph, can_take
from blip2.model.quantized import Int4Linear, Int8Linear, refuse_gradient

AT_ONCE = 300 << 20  # bytes of weights
CLOSED = -1e30  # added to the score of what may not be seen; not infinite, for a row of padding may see nothing


@dataclass(frozen=True)
class _Heads:
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
class _Fed:
    """Names of what all layers are given: the mask, the sizes [before, new], and the turning of positions."""

    mask: str
    sizes: str
    turning: tuple[str, str] | None = None


class Stack(nn.Module):
    """Layers of a decoder that follow each other, in the place of one; see the module's docstring."""

    def __init__(self, session: Any, heads: _Heads, places: range, *, turns: bool) -> None:
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
        refuse_gradient(hidden_states)
        num_rows, length, _ = hidden_states.shape
        layers: dict[int, Any] = dict.fromkeys(self._places)
        if past_key_values is not None:
            layers = {i: past_key_values.layers[i] for i in self._places}
        before = {i: self._before(layer, num_rows, length) for i, layer in layers.items()}
        first = self._places[0]
        room = before[first][0].shape[2]
        num_known = layers[first].get_seq_length() if past_key_values is not None else 0
        mask = self._mask(attention_mask, length, num_known, room)
        fed = {"states": hidden_states.float(), "mask": mask, "sizes": torch.tensor([room, length])}
        if self._turns:
            assert position_embeddings is not None
            cosines, sines = (turned.float()[:, None] for turned in position_embeddings)
            fed |= {"cosines": cosines, "sines": sines}
        for i, (keys, values) in before.items():
            fed |= {f"keys_{i}": keys, f"values_{i}": values}
        arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in fed.items()}
        hidden, *new = map(torch.from_numpy, self._session.run(self._names, arrays))
        if past_key_values is not None:
            for i, keys, values in zip(self._places, new[::2], new[1::2], strict=True):
                past_key_values.update(keys, values, i)
        return hidden.to(hidden_states.dtype)

    def _before(self, layer: Any, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, room, Dh) that begin with those that are known, and room for the new ones."""
        if layer is None or not layer.is_initialized:
            nothing = torch.zeros(num_rows, self._heads.num_shared, 0 if layer is not None else 1, self._heads.width)
            if layer is None:
                return nothing, nothing
            layer.update(nothing, nothing)
        if isinstance(layer, RoomyLayer):
            return layer.reserve(layer.keys.shape[2] + length)
        return layer.keys, layer.values

    def _mask(self, seen: Tensor | None, length: int, num_known: int, room: int) -> Tensor:
        """What is added to the scores, (B or 1, 1, H / Hkv * T, room + T)."""
        if seen is None:
            seen = torch.ones(1, 1, length, num_known + length, dtype=torch.bool).tril(num_known)
        added = torch.zeros(seen.shape).masked_fill_(~seen, CLOSED) if seen.dtype == torch.bool else seen.float()
        mask = added.new_full((*added.shape[:3], room + length), CLOSED)
        mask[..., :num_known] = added[..., :num_known]
        mask[..., room:] = added[..., num_known : num_known + length]
        return mask.repeat(1, 1, self._heads.num // self._heads.num_shared, 1)


class OnnxLinear(nn.Module):
    """A quantised linear layer whose product is ONNX Runtime's.

    Args:
        layer: is used up.
    """

    def __init__(self, layer: Int4Linear | Int8Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        graph = Graph()
        (y,) = graph.product(graph.input("x", "M", layer.in_features), layer)
        graph.output("y", y)
        self._session = graph.session()

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in x's dtype."""
        refuse_gradient(x)
        rows = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
        y = torch.from_numpy(self._session.run(["y"], {"x": rows.numpy()})[0])
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def take_over(network: Any) -> bool:
    """Replaces the layers of a quantised LLM and its product with the vocabulary, in place.

    Args:
        network: a Hugging Face model, quantised and not used yet.

    Returns:
        Whether it was; false for a family without a graph, and for weights that the kernel cannot take.
    """
    family = FAMILIES.get(type(network).__name__)
    if family is None or not family.fits(network.config):
        return False
    kinds = nn.Linear | Int4Linear | Int8Linear
    if not all(can_take(layer) for layer in network.modules() if isinstance(layer, kinds)):
        return False
    decoder = network.get_decoder()
    decoder.layers = family.stacks(network.config, decoder.layers)
    network.set_output_embeddings(OnnxLinear(network.get_output_embeddings()))
    return True


@dataclass(frozen=True)
class _Family:
    """How one kind of LLM is written down.

    Attributes:
        fits: whether a configuration is one that `layer` can write down.
        heads: of a configuration.
        layer: (graph, layer, x, fed, heads, keys, values) -> x, new keys, new values.
        turns: positions by turning queries and keys.
    """

    fits: Callable[[Any], bool]
    heads: Callable[[Any], _Heads]
    layer: Callable[..., tuple[str, str, str]]
    turns: bool

    def stacks(self, config: Any, layers: nn.ModuleList) -> nn.ModuleList:
        """The graphs of all layers, several so that not all weights are held twice while they are laid out. The layers
        are used up one by one, which frees what they held."""
        stacks, begin = nn.ModuleList(), 0
        while begin < len(layers):
            stack, begin = self._stack(config, layers, begin)
            stacks.append(stack)
        return stacks

    def _stack(self, config: Any, layers: nn.ModuleList, begin: int) -> tuple[Stack, int]:
        """Layers from `begin` on, as many as are laid out at once, and where the next begins."""
        heads = self.heads(config)
        graph = Graph()
        x = graph.input("states", "B", "T", config.hidden_size)
        fed = _Fed(graph.input("mask", "B1", 1, "RT", "CT"), graph.input("sizes", 2, dtype=torch.int64))
        if self.turns:
            names = [graph.input(name, "B2", 1, "T", heads.width) for name in ("cosines", "sines")]
            fed = _Fed(fed.mask, fed.sizes, (names[0], names[1]))
        end = begin
        while end < len(layers) and graph.num_bytes < AT_ONCE:
            shape = ("B", heads.num_shared, "C", heads.width)
            keys, values = graph.input(f"keys_{end}", *shape), graph.input(f"values_{end}", *shape)
            x, new_keys, new_values = self.layer(graph, layers[end], x, fed, heads, keys, values)
            graph.output(f"new_keys_{end}", new_keys)
            graph.output(f"new_values_{end}", new_values)
            layers[end] = nn.Identity()
            end += 1
        graph.output("hidden", x)
        return Stack(graph.session(), heads, range(begin, end), turns=self.turns), end


# Families


def _opt_layer(
    graph: Graph, layer: Any, x: str, fed: _Fed, heads: _Heads, keys: str, values: str
) -> tuple[str, str, str]:
    attention, first = layer.self_attn, layer.do_layer_norm_before
    normed = _layer_norm(graph, layer.self_attn_layer_norm, x) if first else x
    states = graph.product(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    attended, new_keys, new_values = _attend(graph, states, fed, heads, keys, values)
    x = graph.node("Add", x, *graph.product(attended, attention.out_proj))
    x = x if first else _layer_norm(graph, layer.self_attn_layer_norm, x)
    normed = _layer_norm(graph, layer.final_layer_norm, x) if first else x
    wide = graph.node("Relu", *graph.product(normed, layer.fc1))
    x = graph.node("Add", x, *graph.product(wide, layer.fc2))
    return x if first else _layer_norm(graph, layer.final_layer_norm, x), new_keys, new_values


def _llama_layer(
    graph: Graph, layer: Any, x: str, fed: _Fed, heads: _Heads, keys: str, values: str
) -> tuple[str, str, str]:
    attention, mlp = layer.self_attn, layer.mlp
    normed = _rms_norm(graph, layer.input_layernorm, x)
    states = graph.product(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    attended, new_keys, new_values = _attend(graph, states, fed, heads, keys, values)
    x = graph.node("Add", x, *graph.product(attended, attention.o_proj))
    gate, up = graph.product(_rms_norm(graph, layer.post_attention_layernorm, x), mlp.gate_proj, mlp.up_proj)
    opened = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
    return graph.node("Add", x, *graph.product(opened, mlp.down_proj)), new_keys, new_values


def _attend(graph: Graph, states: list[str], fed: _Fed, heads: _Heads, keys: str, values: str) -> tuple[str, str, str]:
    """Attention over what is known and what is new, whose scores are put side by side: nothing that is known is copied.

    Args:
        states: queries, keys and values of the new tokens, (B, T, heads * Dh) each.
        keys, values: (B, Hkv, C, Dh), of which the mask closes what is not filled.

    Returns:
        (B, T, H * Dh); new keys and values (B, Hkv, T, Dh).
    """
    counts = (heads.num, heads.num_shared, heads.num_shared)
    query, new_keys, new_values = (
        graph.node("Transpose", graph.node("Reshape", x, graph.shape(0, 0, count, heads.width)), perm=[0, 2, 1, 3])
        for x, count in zip(states, counts, strict=True)
    )
    if fed.turning is not None:
        query, new_keys = (_turned(graph, x, heads.width, fed.turning) for x in (query, new_keys))
    query = graph.node("Reshape", query, graph.shape(0, heads.num_shared, -1, heads.width))  # (B, Hkv, H / Hkv * T, Dh)
    scores = [
        graph.node("FusedMatMul", query, known, domain="com.microsoft", transB=1, alpha=heads.scale)
        for known in (keys, new_keys)
    ]
    weights = graph.node("Softmax", graph.node("Add", graph.node("Concat", *scores, axis=3), fed.mask), axis=-1)
    on_known, on_new = graph.split(weights, fed.sizes, 2)
    attended = graph.node("Add", graph.node("MatMul", on_known, values), graph.node("MatMul", on_new, new_values))
    attended = graph.node("Reshape", attended, graph.shape(0, heads.num, -1, heads.width))  # (B, H, T, Dh)
    attended = graph.node("Transpose", attended, perm=[0, 2, 1, 3])
    return graph.node("Reshape", attended, graph.shape(0, 0, heads.num * heads.width)), new_keys, new_values


def _turned(graph: Graph, x: str, width: int, turning: tuple[str, str]) -> str:
    cosines, sines = turning
    left, right = graph.split(x, graph.shape(width // 2, width // 2), 2)
    crossed = graph.node("Concat", graph.node("Neg", right), left, axis=-1)
    return graph.node("Add", graph.node("Mul", x, cosines), graph.node("Mul", crossed, sines))


def _layer_norm(graph: Graph, norm: nn.LayerNorm, x: str) -> str:
    weight = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight.float()
    bias = torch.zeros(norm.normalized_shape) if norm.bias is None else norm.bias.float()
    return graph.node("LayerNormalization", x, graph.constant(weight), graph.constant(bias), epsilon=norm.eps, axis=-1)


def _rms_norm(graph: Graph, norm: Any, x: str) -> str:
    weight = graph.constant(norm.weight.float())
    return graph.node("SimplifiedLayerNormalization", x, weight, epsilon=norm.variance_epsilon, axis=-1)


def _opt_heads(config: Any) -> _Heads:
    width = config.hidden_size // config.num_attention_heads
    return _Heads(config.num_attention_heads, config.num_attention_heads, width, width**-0.5)


def _llama_heads(config: Any) -> _Heads:
    return _Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim**-0.5)


FAMILIES = {
    "OPTForCausalLM": _Family(lambda config: config.activation_function == "relu", _opt_heads, _opt_layer, False),
    "LlamaForCausalLM": _Family(lambda config: config.hidden_act == "silu", _llama_heads, _llama_layer, True),
}
