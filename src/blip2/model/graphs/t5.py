"""The layers of a quantised T5 as products of rows with attention between them.

encoder first      states ─▶ queries, keys and values of layer 0
encoder i          what attention i gave, states ─▶ states, queries, keys and values of layer i + 1
encoded i          what the encoder gave ─▶ keys and values of decoder layer i, once a text
decoder first      as of the encoder
crossing i         what attention i to itself gave, states ─▶ states, queries to what the encoder gave
decoder i          what attention i to that gave, states ─▶ states, queries, keys and values of layer i + 1
word               all of the decoder and the vocabulary for a token of a single row (`words`)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2.model.graphs.attention import Heads, added, attend, causal, extended, in_heads, one_thread, refuse
from blip2.model.graphs.graph import ModelFile, Signature
from blip2.model.graphs.runtime import Runtime
from blip2.model.graphs.words import Words, attend_on, attend_to, split
from blip2.model.key_values import RoomyLayer
from blip2.model.reading import Reading


class T5:
    """How FlanT5 is written down; a `Family`."""

    def fits(self, config: Any) -> bool:
        """Whether the MLP is gated, with the usual GELU."""
        return config.is_gated_act and config.dense_act_fn == "gelu_new"

    def write(self, network: Any, file: ModelFile, vocabulary: Signature) -> list[Any]:
        """As `DecoderOnly.write`."""
        config = network.config
        heads = Heads(config.num_heads, config.num_heads, config.d_kv, 1.0)
        stacks = network.encoder, network.decoder
        biases = [stack.block[0].layer[0].SelfAttention for stack in stacks]
        _write_encoder(file, network.encoder.block, heads, config.d_model)
        signatures = _write_decoder(file, network.decoder.block, heads, config.d_model)
        _write_word(file, signatures, heads, biases[1], partial(_end, network), vocabulary)
        counts = [len(stack.block) for stack in stacks]
        encoder, decoder = _EncoderLayers(heads, biases[0], counts[0]), _DecoderLayers(heads, biases[1], counts[1])
        decoder.words = _Words(network.decoder, biases[1], counts[1])
        for stack, layers, own in zip(stacks, (encoder, decoder), biases, strict=True):
            stack.block = nn.ModuleList([layers])
            for name in ("q", "k", "v", "o"):  # only the biases of positions are still asked of it
                delattr(own, name)
        return [encoder, decoder, decoder.words]


class _Layers(nn.Module):
    """Layers that follow each other, in the place of one."""

    def __init__(self, heads: Heads, biases: Any, num_layers: int) -> None:
        super().__init__()
        self.runtime: Runtime  # once the file is complete
        self.heads = heads
        self.biases = biases
        self.num_layers = num_layers

    def position_bias(self, length: int, num_known: int) -> Tensor:
        """(1, H, T, L + T)."""
        return self.biases.compute_bias(length, num_known + length, past_seen_tokens=num_known)

    def in_heads(self, projected: Tensor, num_rows: int) -> list[Tensor]:
        """Queries, keys and values, or some of them, side by side in rows -> (B, H, T, Dh) each."""
        parts = projected.split(self.heads.widths[0], dim=1)
        return [in_heads(part, num_rows, self.heads.width) for part in parts]


class _EncoderLayers(_Layers):
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
        num_rows, length, _ = hidden_states.shape
        bias = self.position_bias(length, 0) if position_bias is None else position_bias
        mask = bias.float() if attention_mask is None else bias.float() + added(attention_mask)
        states = hidden_states.float().flatten(0, 1)
        with one_thread():
            (projected,) = self.runtime.run_rows("encoder first", states=states)
            for i in range(self.num_layers):
                query, keys, values = self.in_heads(projected, num_rows)
                attended = attend(query, keys, values, mask, self.heads)
                states, *more = self.runtime.run_rows(f"encoder {i}", attended=attended, states=states)
                projected = more[0] if more else projected
        return _as(states.view(num_rows, length, -1), hidden_states.dtype), bias, None


class _DecoderLayers(_Layers):
    words: Words

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
        num_known = 0 if own is None else own.get_seq_length()
        bias = self.position_bias(length, num_known) if position_bias is None else position_bias
        mask = bias.float() + added(causal(length, num_known) if attention_mask is None else attention_mask)
        seen = None if encoder_attention_mask is None else added(encoder_attention_mask)[:, :, :1]
        states = hidden_states.float().flatten(0, 1)
        with one_thread():
            encoded = self._encoded(encoder_hidden_states, past_key_values)
            (projected,) = self.runtime.run_rows("decoder first", states=states)
            for i in range(self.num_layers):
                query, keys, values = self.in_heads(projected, num_rows)
                attended = attend(query, *extended(own, keys, values, i), mask, self.heads)
                states, crossing = self.runtime.run_rows(f"crossing {i}", attended=attended, states=states)
                (query,) = self.in_heads(crossing, num_rows)
                attended = attend(query, *encoded[i], seen, self.heads)
                states, *more = self.runtime.run_rows(f"decoder {i}", attended=attended, states=states)
                projected = more[0] if more else projected
        return _as(states.view(num_rows, length, -1), hidden_states.dtype), bias, None

    def _encoded(self, states: Tensor, caches: Any) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, H, S, Dh) of what the encoder gave; computed once where there is a cache."""
        layers = [] if caches is None else caches.cross_attention_cache.layers
        if caches is not None and caches.is_updated.get(0):
            return [(layer.keys, layer.values) for layer in layers[: self.num_layers]]
        rows, encoded = states.float().flatten(0, 1), []
        for i in range(self.num_layers):
            (projected,) = self.runtime.run_rows(f"encoded {i}", states=rows)
            keys, values = (part.contiguous() for part in self.in_heads(projected, len(states)))
            encoded.append((keys, values))
            if caches is None:
                continue
            layer = layers[i]
            if isinstance(layer, RoomyLayer):
                layer.lazy_initialization(keys, values)
                layer.put(keys, values)  # no more will come, so no room is needed
            else:
                layer.update(keys, values)
            caches.is_updated[i] = True
        return encoded


class _Words(Words):
    """Of a decoder that attends to what an encoder gave as well."""

    def __init__(self, decoder: Any, biases: Any, num_layers: int) -> None:
        super().__init__(decoder, _start)
        self._biases = biases
        self._num_layers = num_layers  # a cache is as deep as the encoder, which may be deeper

    def own_layers(self, reading: Reading) -> list[Any]:
        return reading.cache.self_attention_cache.layers[: self._num_layers]

    def held(self, reading: Reading, length: int, room: int) -> dict[str, Tensor]:
        assert reading.encoded is not None
        held = super().held(reading, length, room)
        bias = self._biases.compute_bias(1, length + 1, past_seen_tokens=length)[0, :, 0, :length]
        held["seen"] = F.pad(bias.float(), (0, room - length)) + held["seen"]  # (H, S)
        held["encoded seen"] = added(reading.encoded.mask[0].bool())
        for i, layer in enumerate(reading.cache.cross_attention_cache.layers[: self._num_layers]):
            held[f"encoded keys {i}"], held[f"encoded values {i}"] = layer.keys.contiguous(), layer.values.contiguous()
        return held


def _as(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What float16 cannot hold becomes the largest that it can, as in transformers' layers."""
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        hidden = hidden.clamp(-most, most)
    return hidden.to(dtype)


def _projected(signature: Signature, attention: Any, x: int) -> int:
    """Queries, keys and values of a self-attention, side by side."""
    own = attention.SelfAttention
    return signature.product(signature.rms_norm(x, attention.layer_norm), own.q, own.k, own.v)


def _feed_forward(signature: Signature, layer: Any, x: int) -> int:
    mlp, normed = layer.DenseReluDense, signature.rms_norm(x, layer.layer_norm)
    gate = signature.gelu(signature.product(normed, mlp.wi_0), by_tanh=True)
    opened = signature.multiply(gate, signature.product(normed, mlp.wi_1))
    return signature.add(x, signature.product(opened, mlp.wo))


def _write_encoder(file: ModelFile, layers: Any, heads: Heads, width: int) -> None:
    first = file.signature("encoder first")
    first.output("projected", _projected(first, layers[0].layer[0], first.input("states", width)))
    for i, layer in enumerate(layers):
        signature = file.signature(f"encoder {i}")
        attended, x = signature.input("attended", heads.widths[0]), signature.input("states", width)
        x = signature.add(x, signature.product(attended, layer.layer[0].SelfAttention.o))
        x = _feed_forward(signature, layer.layer[1], x)
        signature.output("states", x)
        if i + 1 < len(layers):
            signature.output("projected", _projected(signature, layers[i + 1].layer[0], x))
        layers[i] = nn.Identity()


def _write_decoder(file: ModelFile, layers: Any, heads: Heads, width: int) -> list[Signature]:
    """Gives what computes a token's states, in their order."""
    first = file.signature("decoder first")
    first.output("projected", _projected(first, layers[0].layer[0], first.input("states", width)))
    signatures = [first]
    for i, layer in enumerate(layers):
        own, cross, mlp = layer.layer
        attention, once = cross.EncDecAttention, file.signature(f"encoded {i}")
        once.output("projected", once.product(once.input("states", width), attention.k, attention.v))
        crossing = file.signature(f"crossing {i}")
        attended, x = crossing.input("attended", heads.widths[0]), crossing.input("states", width)
        x = crossing.add(x, crossing.product(attended, own.SelfAttention.o))
        crossing.output("states", x)
        crossing.output("query", crossing.product(crossing.rms_norm(x, cross.layer_norm), attention.q))
        rest = file.signature(f"decoder {i}")
        attended, x = rest.input("attended", heads.widths[0]), rest.input("states", width)
        x = rest.add(x, rest.product(attended, attention.o))
        x = _feed_forward(rest, mlp, x)
        rest.output("states", x)
        if i + 1 < len(layers):
            rest.output("projected", _projected(rest, layers[i + 1].layer[0], x))
        layers[i] = nn.Identity()
        signatures += [crossing, rest]
    return signatures


def _write_word(
    file: ModelFile,
    signatures: list[Signature],
    heads: Heads,
    biases: Any,
    end: Callable[[Signature, int], int],
    vocabulary: Signature,
) -> None:
    """As `words.write_word`, with attention to what the encoder gave."""
    word, width = file.signature("word"), heads.width
    x = word.input("states", signatures[0].shapes()[0]["states"])
    seen, encoded_seen = word.input("seen", 1, (heads.num, 1, -1)), word.input("encoded seen", 1, (-1,))
    of_itself = word.constant(biases.compute_bias(1, 1)[0].float())  # (H, 1, 1)
    found = word.include(signatures[0], states=x)
    for i, (crossing, rest) in enumerate(zip(signatures[1::2], signatures[2::2], strict=True)):
        query, key, value = split(word, found["projected"], heads)
        attended = attend_on(word, i, (query, key, value), seen, heads, of_itself)
        found = word.include(crossing, attended=attended, states=found["states"] if i else x)
        query = word.reshape(found["query"], (heads.num, 1, 1, width))
        keys, values = (
            word.input(f"encoded {name} {i}", width, (heads.num, 1, -1, width)) for name in ("keys", "values")
        )
        attended, _ = attend_to(word, query, keys, values, encoded_seen)
        attended = word.reshape(attended, (-1, heads.widths[0]))
        found = word.include(rest, attended=attended, states=found["states"])
    word.output("logits", word.include(vocabulary, x=end(word, found["states"]))["y"])


def _start(stack: Any, embeds: Tensor, position: int) -> dict[str, Tensor]:
    return {"states": embeds}


def _end(network: Any, signature: Signature, x: int) -> int:
    x = signature.rms_norm(x, network.decoder.final_layer_norm)
    if network.config.scale_decoder_outputs:
        x = signature.multiply(x, signature.constant(torch.tensor([network.model_dim**-0.5])))
    return x
