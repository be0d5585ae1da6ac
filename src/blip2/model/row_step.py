"""One token of one row through an OPT or a Llama on a GPU, written out in five kernels a layer (row_kernels.py).

    norm and queries, keys, values ─ attention ─ product, + what came in ─ norm and widening ─ narrowing, + what came in

It takes the weights of transformers' model as they are, in floats or in eight bits; those that are read together are
put side by side in memory, and the model's own layers see their parts of them.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, OPTForCausalLM

from blip2.model.quantized import Int8Linear

Linear = nn.Linear | Int8Linear


@dataclass(frozen=True)
class Family:
    """Where one kind of LLM has its parts, by their names, and what differs between kinds.

    Attributes:
        attention_norm, mlp_norm: of a layer; `last_norm` of the decoder.
        query_key_value, widening: products of a layer that read the same.
        attended, narrowing: products of a layer whose results are added to what came in.
        norms_centre: whether norms take the mean away and have a shift; `eps`: their attribute.
        turns: positions by turning queries and keys, else by an embedding.
        is_gated: whether the MLP is gated, with a SiLU; else it has a ReLU.
        is_usual: of (configuration, decoder): whether it is what this says.
    """

    attention_norm: str
    query_key_value: tuple[str, str, str]
    attended: str
    mlp_norm: str
    widening: tuple[str, ...]
    narrowing: str
    last_norm: str
    norms_centre: bool
    eps: str
    turns: bool
    is_gated: bool
    is_usual: Callable[[Any, Any], bool]

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Products of a layer, in the order in which they are computed; those of a group read the same."""
        return [self.query_key_value, (self.attended,), self.widening, (self.narrowing,)]


def _is_usual_opt(config: Any, decoder: Any) -> bool:
    return (
        config.do_layer_norm_before
        and config.activation_function == "relu"
        and decoder.project_in is None
        and decoder.final_layer_norm is not None
        and config.layer_norm_elementwise_affine
    )


FAMILIES: dict[type[Any], Family] = {
    OPTForCausalLM: Family(
        attention_norm="self_attn_layer_norm",
        query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attended="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        widening=("fc1",),
        narrowing="fc2",
        last_norm="final_layer_norm",
        norms_centre=True,
        eps="eps",
        turns=False,
        is_gated=False,
        is_usual=_is_usual_opt,
    ),
    LlamaForCausalLM: Family(
        attention_norm="input_layernorm",
        query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attended="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        widening=("mlp.gate_proj", "mlp.up_proj"),
        narrowing="mlp.down_proj",
        last_norm="norm",
        norms_centre=False,
        eps="variance_epsilon",
        turns=True,
        is_gated=True,
        is_usual=lambda config, _: config.hidden_act == "silu",
    ),
}


class RowStep:
    """Reads one token of one row.

    Args:
        model: a Hugging Face model that `can_take` says yes to; the weights of some of its layers move.
    """

    def __init__(self, model: Any) -> None:
        from blip2.model import row_kernels  # here, for Triton is where a GPU is

        self._kernels = row_kernels
        self._family = FAMILIES[type(model)]
        self._embed = model.get_input_embeddings()
        self._decoder = model.get_decoder()
        self._layers = [_Layer.of(layer, self._family) for layer in self._decoder.layers]
        self._norm = self._decoder.get_submodule(self._family.last_norm)
        self._head = _Weights.of([model.get_output_embeddings()])
        self._scale: float = self._decoder.layers[0].self_attn.scaling

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
        family, decoder = FAMILIES.get(type(model)), model.get_decoder()
        if family is None or not family.is_usual(model.config, decoder):
            return False
        groups = [_named(layer, names) for layer in decoder.layers for names in family.groups]
        return all(map(_are_alike, [*groups, [model.get_output_embeddings()]]))

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
        if self._family.turns:
            cosines, sines = self._decoder.rotary_emb(hidden, position)  # (1, 1, Dh) each
            turns = cosines[0, 0], sines[0, 0]
        else:
            places = self._decoder.embed_positions
            hidden = hidden + places.weight[position[0] + places.offset]
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
        is_gated = self._family.is_gated
        wide = self._product(hidden, layer.widening, norm=layer.mlp_norm, is_rectified=not is_gated)
        before = self._kernels.GATE if is_gated else self._kernels.PLAIN
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
            given = {"gain": norm.weight, "eps": getattr(norm, self._family.eps)}
            before = self._kernels.RMS_NORM
            if self._family.norms_centre:
                given["shift"] = norm.bias
                before = self._kernels.LAYER_NORM
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

    @classmethod
    def of(cls, layer: nn.Module, family: Family) -> "_Layer":
        first, second, third, fourth = (_Weights.of(_named(layer, names)) for names in family.groups)
        attention_norm, mlp_norm = _named(layer, (family.attention_norm, family.mlp_norm))
        return cls(attention_norm, first, second, mlp_norm, third, fourth)


def _named(layer: nn.Module, names: Sequence[str]) -> list[Any]:
    return [layer.get_submodule(name) for name in names]


def _are_alike(layers: Sequence[Any]) -> bool:
    """Whether layers that are read together have weights of one kind, and all a bias or none."""
    kinds = {(type(layer), getattr(layer.weight, "dtype", None), layer.bias is None) for layer in layers}
    first = layers[0]
    is_int8 = type(first) is Int8Linear and not any(layer.turned_block for layer in layers)
    return len(kinds) == 1 and (is_int8 or (type(first) is nn.Linear and first.weight.is_floating_point()))
