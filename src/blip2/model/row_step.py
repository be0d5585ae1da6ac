"""One token of one row through an OPT or a Llama on a GPU, written out in five kernels a layer (row_kernels.py).

    norm and queries, keys, values ─ attention ─ product, + what came in ─ norm and widening ─ narrowing, + what came in

It takes the weights of transformers' model as they are, in floats or in eight bits; those that are read together are
put side by side in memory, and the model's own layers see their parts of them.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, OPTForCausalLM

from blip2.model.quantized import Int8Linear

Linear = nn.Linear | Int8Linear


class RowStep:
    """Reads one token of one row.

    Args:
        model: a Hugging Face model that `can_take` says yes to; the weights of some of its layers move.
    """

    def __init__(self, model: Any) -> None:
        from blip2.model import row_kernels  # here, for Triton is where a GPU is

        self._kernels = row_kernels
        self._embed = model.get_input_embeddings()
        self._is_opt = isinstance(model, OPTForCausalLM)
        decoder = model.get_decoder()
        self._decoder = decoder
        self._layers = [_opt_layer(layer) if self._is_opt else _llama_layer(layer) for layer in decoder.layers]
        self._norm = decoder.final_layer_norm if self._is_opt else decoder.norm
        self._head = _Weights.of([model.get_output_embeddings()])
        attention = decoder.layers[0].self_attn
        self._scale: float = attention.scaling

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """Whether the kernels can be expected to run: on NVIDIA's GPUs since Ampere, with Triton."""
        return (
            device.type == "cuda"
            and importlib.util.find_spec("triton") is not None
            and torch.cuda.get_device_capability(device) >= (8, 0)
        )

    @staticmethod
    def can_take(model: Any) -> bool:
        """Whether a model is an OPT or a Llama of the usual kind whose products the kernels know."""
        config, decoder = model.config, model.get_decoder()
        if type(model) is OPTForCausalLM:
            is_usual = (
                config.do_layer_norm_before
                and config.activation_function == "relu"
                and decoder.project_in is None
                and decoder.final_layer_norm is not None
                and config.layer_norm_elementwise_affine
            )
            layers = [_opt_products(layer) for layer in decoder.layers]
        elif type(model) is LlamaForCausalLM:
            is_usual = config.hidden_act == "silu"
            layers = [_llama_products(layer) for layer in decoder.layers]
        else:
            return False
        groups = [*(group for layer in layers for group in layer), [model.get_output_embeddings()]]
        return is_usual and all(map(_are_alike, groups))

    def __call__(
        self, token_id: Tensor, position: Tensor, slot: Tensor, mask: Tensor, states: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Logits (1, V) float32 after a token.

        Args:
            token_id, position: (1, 1).
            slot: (1,) where its keys and values are put.
            mask: (L,) added to the scores of the positions before it.
            states: keys and values (1, H, L, Dh) of every layer.
        """
        hidden = self._embed(token_id)[0]  # (1, D)
        turns = None
        if self._is_opt:
            places = self._decoder.embed_positions
            hidden = hidden + places.weight[position[0] + places.offset]
        else:
            cosines, sines = self._decoder.rotary_emb(hidden, position)  # (1, 1, Dh) each
            turns = cosines[0, 0], sines[0, 0]
        hidden = hidden.flatten()
        with torch.cuda.device_of(hidden):  # Triton launches where it is told to
            for layer, (keys, values) in zip(self._layers, states, strict=True):
                hidden = self._through(layer, hidden, keys, values, slot, mask, turns)
            logits = torch.empty(self._head.num_rows, dtype=torch.float32, device=hidden.device)
            self._product(hidden, self._head, logits, norm=self._norm)
        return logits[None]

    def _through(
        self,
        layer: "_Layer",
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        slot: Tensor,
        mask: Tensor,
        turns: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        heads = self._product(hidden, layer.query_key_value, norm=layer.attention_norm)
        attended = hidden.new_empty(layer.attended.num_columns)
        self._kernels.row_attention(heads, keys, values, slot, mask, attended, scale=self._scale, turns=turns)
        hidden = self._product(attended, layer.attended, residual=hidden)
        wide = self._product(hidden, layer.widening, norm=layer.mlp_norm, is_rectified=self._is_opt)
        before = self._kernels.PLAIN if self._is_opt else self._kernels.GATE
        return self._product(wide, layer.narrowing, residual=hidden, before=before)

    def _product(
        self,
        x: Tensor,
        weights: "_Weights",
        y: Tensor | None = None,
        *,
        norm: Any = None,
        before: int = 0,
        is_rectified: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        given: dict[str, Any] = {}
        if norm is not None:
            before = self._kernels.LAYER_NORM if self._is_opt else self._kernels.RMS_NORM
            given = (
                {"gain": norm.weight, "shift": norm.bias, "eps": norm.eps} if self._is_opt else {"gain": norm.weight}
            )
            if not self._is_opt:
                given["eps"] = norm.variance_epsilon
        y = x.new_empty(weights.num_rows) if y is None else y
        self._kernels.row_product(
            x,
            weights.weight,
            y,
            before=before,
            scale=weights.scale,
            bias=weights.bias,
            is_rectified=is_rectified,
            residual=residual,
            **given,
        )
        return y


@dataclass(frozen=True)
class _Weights:
    """Of linear layers that read the same: side by side.

    Attributes:
        weight: (N, K), of floats or int8 with a scale (N,).
        bias: (N,) or None.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @property
    def num_rows(self) -> int:
        return self.weight.shape[0]

    @property
    def num_columns(self) -> int:
        return self.weight.shape[1]

    @classmethod
    def of(cls, layers: Sequence[Linear]) -> "_Weights":
        """Moves the weights of several layers together, one after the other; a single one's stay where they are."""
        scales = [layer.scale for layer in layers if isinstance(layer, Int8Linear)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        weight = layers[0].weight.detach()
        if len(layers) > 1:
            weight = torch.cat([layer.weight.detach() for layer in layers])
            parts = weight.split([layer.out_features for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                layer.weight = part if isinstance(layer, Int8Linear) else nn.Parameter(part, requires_grad=False)
        return cls(
            weight.contiguous(),
            torch.cat(scales) if scales else None,
            torch.cat([bias.detach() for bias in biases]) if biases else None,
        )


@dataclass(frozen=True)
class _Layer:
    attention_norm: Any
    query_key_value: _Weights
    attended: _Weights
    mlp_norm: Any
    widening: _Weights
    narrowing: _Weights


def _opt_products(layer: Any) -> list[list[Any]]:
    attention = layer.self_attn
    return [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.out_proj], [layer.fc1], [layer.fc2]]


def _llama_products(layer: Any) -> list[list[Any]]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _opt_layer(layer: Any) -> _Layer:
    first, second, third, fourth = map(_Weights.of, _opt_products(layer))
    return _Layer(layer.self_attn_layer_norm, first, second, layer.final_layer_norm, third, fourth)


def _llama_layer(layer: Any) -> _Layer:
    first, second, third, fourth = map(_Weights.of, _llama_products(layer))
    return _Layer(layer.input_layernorm, first, second, layer.post_attention_layernorm, third, fourth)


def _are_alike(layers: Sequence[Any]) -> bool:
    """Whether layers that are read together have weights of one kind, and all a bias or none."""
    kinds = {(type(layer), getattr(layer.weight, "dtype", None), layer.bias is None) for layer in layers}
    first = layers[0]
    is_known = type(first) is Int8Linear or (type(first) is nn.Linear and first.weight.is_floating_point())
    return len(kinds) == 1 and is_known
