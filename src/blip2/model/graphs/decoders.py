"""The layers of OPT and Llama as products of rows with attention between them.

transformers' model stays around them: embeddings, masks, the last norm. In place of its layers stands one `Layers`.

    first          states ─▶ queries, keys and values of layer 0
    layer i        what attention i gave, states ─▶ states, queries, keys and values of layer i + 1
    word           all of it for a token of a single row (`words`)
    prompt, end    all of it for a prompt of a single row (`prompts`), of an LLM in float32
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blip2.model.graphs.attention import (
    Heads,
    added,
    attend,
    causal,
    extended,
    in_heads,
    one_thread,
    refuse,
    rotated,
    turns,
)
from blip2.model.graphs.graph import ModelFile, Signature
from blip2.model.graphs.prompts import APART, Prompts, write_prompt
from blip2.model.graphs.runtime import Runtime
from blip2.model.graphs.weights import QuantizedLinear
from blip2.model.graphs.words import Start, Words, write_word


class Layers(nn.Module):
    """All layers of a decoder, in the place of one; see the module's docstring. It cannot be copied.

    Attributes:
        words: what reads a token of a single row in the place of transformers' model, if it can.
        prompts: what reads a prompt of one.
    """

    def __init__(self, heads: Heads, num_layers: int, words: Words | None, prompts: Prompts | None) -> None:
        super().__init__()
        self.runtime: Runtime  # once the file is complete
        self.words = words
        self.prompts = prompts
        self._heads = heads
        self._num_layers = num_layers
        self._apart: ContextVar[int] = ContextVar("num_apart", default=0)

    @contextmanager
    def apart(self, num_tokens: int) -> Iterator[None]:
        """Has the attention of the first so many tokens of single rows that nothing is known of computed by itself, as
        it is when they are read before the others, in this thread. Products of a row do not depend on what is beside
        it; attention sums in another order where there are more tokens."""
        token = self._apart.set(num_tokens)
        try:
            yield
        finally:
            self._apart.reset(token)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> Tensor:
        """As one of transformers' layers, but for all.

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
        states, heads, mask = hidden_states.float().flatten(0, 1), self._heads, attention_mask
        if mask is None and length > 1:
            mask = causal(length, 0 if past_key_values is None else past_key_values.get_seq_length())
        mask = None if mask is None else added(mask)
        turning = None if position_embeddings is None else turns(position_embeddings)
        num_turned = heads.num + heads.num_shared
        with one_thread():
            (projected,) = self.runtime.run_rows("first", states=states)
            for i in range(self._num_layers):
                together = in_heads(projected, num_rows, heads.width)
                query, keys = rotated(together[:, :num_turned], turning).tensor_split([heads.num], dim=1)
                values = together[:, num_turned:]
                keys, values = extended(past_key_values, keys, values, i)
                attended = self._attend(query, keys, values, mask)
                states, *more = self.runtime.run_rows(f"layer {i}", attended=attended, states=states)
                projected = more[0] if more else projected
        return states.view(num_rows, length, -1).to(hidden_states.dtype)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """As `attend`, the first tokens apart."""
        end, length = self._apart.get(), query.shape[2]
        if mask is None or len(query) > 1 or not 0 < end < length or keys.shape[2] > length:
            return attend(query, keys, values, mask, self._heads)
        first = attend(query[:, :, :end], keys[:, :, :end], values[:, :, :end], mask[..., :end, :end], self._heads)
        return torch.cat([first, attend(query[:, :, end:], keys, values, mask[..., end:, :], self._heads)])


@dataclass(frozen=True)
class DecoderOnly:
    """How one kind of LLM is written down.

    Attributes:
        activation: the setting of the MLP's activation, and the one that `rest` writes down.
        heads: of a configuration.
        projected: (signature, layer, x) -> what the layers of queries, keys and values are given, and these.
        rest: (signature, layer, attended, x) -> x; what follows attention.
        start: (decoder, embeddings (T, D), position of the first) -> the first states (T, D), as "states", and the
            turns of the positions, as `Words` takes it.
        last_norm: (signature, decoder, x) -> x; what follows the layers.
        turns: whether positions are told by turning queries and keys.
    """

    activation: tuple[str, str]
    heads: Callable[[Any], Heads]
    projected: Callable[[Signature, Any, int], tuple[int, list[Any]]]
    rest: Callable[[Signature, Any, int, int], int]
    start: Start
    last_norm: Callable[[Signature, Any, int], int]
    turns: bool

    def fits(self, config: Any) -> bool:
        """Whether a configuration is one that `rest` can write down."""
        setting, wanted = self.activation
        return getattr(config, setting) == wanted

    def write(self, network: Any, file: ModelFile, vocabulary: Signature) -> list[Any]:
        """Uses the layers up one by one, which frees what they held.

        Args:
            network: the LLM.
            file: where it is written down.
            vocabulary: the product that makes logits of the last states.

        Returns:
            What needs the runtime that the file makes.
        """
        decoder, heads, width = network.get_decoder(), self.heads(network.config), network.config.hidden_size
        layers: Any = decoder.layers
        has_floats = not any(isinstance(layer, QuantizedLinear) for layer in layers.modules())
        first = file.signature("first")
        self._project(first, layers[0], first.input("states", width), has_floats)
        signatures = [first]
        for i, layer in enumerate(layers):
            signature = file.signature(f"layer {i}")
            attended, x = signature.input("attended", heads.num * heads.width), signature.input("states", width)
            x = self.rest(signature, layer, attended, x)
            signature.output("states", x)
            if i + 1 < len(layers):
                self._project(signature, layers[i + 1], x, has_floats)
            layers[i] = nn.Identity()
            signatures.append(signature)
        end = partial(self._end, decoder)
        words = prompts = None
        if getattr(decoder, "project_out", None) is None:
            words = Words(decoder, self.start)
            write_word(file, signatures, heads, end, vocabulary, turns=self.turns)
            if has_floats:  # what was rounded is read to the same last bit with a known picture and a new one
                prompts = Prompts(decoder, heads, self.start)
                write_prompt(file, signatures, heads, end, vocabulary, turns=self.turns)
        together = Layers(heads, len(layers), words, prompts)
        decoder.layers = nn.ModuleList([together])
        return [one for one in (together, words, prompts) if one is not None]

    def _project(self, signature: Signature, layer: Any, x: int, is_apart: bool) -> None:
        """Queries, keys and values side by side; apart as well, for a prompt's attention, or in one product."""
        x, projections = self.projected(signature, layer, x)
        if not is_apart:
            signature.output("projected", signature.product(x, *projections))
            return
        parts = [signature.product(x, one) for one in projections]
        for name, part in zip(APART, parts, strict=True):
            signature.result(name, part)
        signature.output("projected", signature.side_by_side(parts))

    def _end(self, decoder: Any, signature: Signature, x: int) -> int:
        return self.last_norm(signature, decoder, x)


# Families


def _opt_projected(signature: Signature, layer: Any, x: int) -> tuple[int, list[Any]]:
    own = layer.self_attn
    normed = signature.layer_norm(x, layer.self_attn_layer_norm) if layer.do_layer_norm_before else x
    return normed, [own.q_proj, own.k_proj, own.v_proj]


def _opt_rest(signature: Signature, layer: Any, attended: int, x: int) -> int:
    first, norm = layer.do_layer_norm_before, layer.final_layer_norm
    x = signature.add(x, signature.product(attended, layer.self_attn.out_proj))
    x = x if first else signature.layer_norm(x, layer.self_attn_layer_norm)
    wide = signature.product(signature.layer_norm(x, norm) if first else x, layer.fc1, relu=True)
    x = signature.add(x, signature.product(wide, layer.fc2))
    return x if first else signature.layer_norm(x, norm)


def _opt_start(decoder: Any, embeds: Tensor, position: int) -> dict[str, Tensor]:
    states = embeds if decoder.project_in is None else decoder.project_in(embeds)
    first = position + decoder.embed_positions.offset
    return {"states": states + decoder.embed_positions.weight[first : first + len(states)].float()}


def _opt_last_norm(signature: Signature, decoder: Any, x: int) -> int:
    return x if decoder.final_layer_norm is None else signature.layer_norm(x, decoder.final_layer_norm)


def _llama_projected(signature: Signature, layer: Any, x: int) -> tuple[int, list[Any]]:
    own = layer.self_attn
    return signature.rms_norm(x, layer.input_layernorm), [own.q_proj, own.k_proj, own.v_proj]


def _llama_rest(signature: Signature, layer: Any, attended: int, x: int) -> int:
    x = signature.add(x, signature.product(attended, layer.self_attn.o_proj))
    normed = signature.rms_norm(x, layer.post_attention_layernorm)
    gate = signature.silu(signature.product(normed, layer.mlp.gate_proj))
    opened = signature.multiply(gate, signature.product(normed, layer.mlp.up_proj))
    return signature.add(x, signature.product(opened, layer.mlp.down_proj))


def _llama_start(decoder: Any, embeds: Tensor, position: int) -> dict[str, Tensor]:
    cosines, sines = decoder.rotary_emb(embeds, torch.arange(position, position + len(embeds))[None])
    return {"states": embeds, "cosines": cosines[0], "sines": sines[0]}


def _llama_last_norm(signature: Signature, decoder: Any, x: int) -> int:
    return signature.rms_norm(x, decoder.norm)


def _opt_heads(config: Any) -> Heads:
    width = config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_attention_heads, width, width**-0.5)


def _llama_heads(config: Any) -> Heads:
    return Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim**-0.5)


OPT = DecoderOnly(
    ("activation_function", "relu"), _opt_heads, _opt_projected, _opt_rest, _opt_start, _opt_last_norm, turns=False
)
LLAMA = DecoderOnly(
    ("hidden_act", "silu"),
    _llama_heads,
    _llama_projected,
    _llama_rest,
    _llama_start,
    _llama_last_norm,
    turns=True,
)
