"""What a Llama most likely says next, guessed by a copy of itself with weights of four bits.

One row's step in float32 takes as long as its weights take from memory, and the next few words cost no more in the
same pass. So the copy, which reads an eighth, says them first; the LLM then reads them all at once and keeps what it
would have said itself (writing.py). Nothing here can change a text, only how soon it is there.

    the LLM's keys and values ─ read ─▶ copy: a guess, a guess, a guess ─▶ one pass of the LLM over all of them

The copy goes on from the LLM's own keys and values, so it has no prompt to read. Its step is written out here: at this
size the general one of transformers takes longer than the arithmetic. It is made when enough was written without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from blip2.model.graphs.attention import turns
from blip2.model.low_bit_products import int4_product
from blip2.model.packed import PackedLinear

if TYPE_CHECKING:
    from blip2.model.reading import Reading

LONGEST = 8  # guesses in a row: each is worth less than the one before it, for it needs all of them to be right
WORTH_MAKING = 64  # steps of a single row, after which the copy has most likely been worth the second it takes to make
MOST_BYTES = 2 << 30  # of an LLM whose copy is made unasked; the copy takes a sixth of that
GROUP_SIZE = 32  # weights that share a scale
BLOCK = 16  # rows of a weight that the kernel takes at once


class Drafter:
    """Guesses for one LLM, by a copy that is made once it is worth it.

    Args:
        model: a Hugging Face model that `can_take` says yes to.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._copy: _FourBitLlama | None = None
        self.num_asked = 0

    @staticmethod
    def can_take(model: Any) -> bool:
        """Whether there are guesses for a model: a Llama in float32 on a CPU, not too large for a copy beside it."""
        if type(model) is not LlamaForCausalLM:
            return False
        config: Any = model.config
        read = (config.hidden_size, config.intermediate_size, config.head_dim * config.num_attention_heads)
        heads = config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
        layers: list[Any] = [layer for layer in model.modules() if type(layer) in (nn.Linear, PackedLinear)]
        words = model.get_input_embeddings().weight
        return (
            words.dtype == torch.float32
            and words.device.type == "cpu"
            and len(layers) == 7 * config.num_hidden_layers + 1  # none is quantised
            and all(layer.bias is None for layer in layers)
            and config.hidden_act == "silu"
            and not any(width % GROUP_SIZE for width in read)
            and heads % BLOCK == 0
            and sum(layer.in_features * layer.out_features * 4 for layer in layers) <= MOST_BYTES
        )

    def draft(
        self, reading: "Reading", token_id: int, *, most: int, stop_ids: Sequence[int], num_without_stop: int
    ) -> list[int]:
        """What most likely follows `token_id`, which the LLM has not read yet.

        Args:
            reading: of one row of a decoder; its keys and values stay as they are.
            token_id: the newest token.
            most: how many guesses are wanted at most.
            stop_ids: tokens that end the text, and so the guesses.
            num_without_stop: before so many guesses none of these is wanted.

        Returns:
            The guesses, `LONGEST` at most; none where the copy is not worth making yet.
        """
        self.num_asked += 1
        if self.num_asked <= WORTH_MAKING:
            return []
        if self._copy is None:
            self._copy = _FourBitLlama(self._model)
        return self._copy.goes_on(reading, token_id, min(most, LONGEST), stop_ids, num_without_stop)


class _FourBitLinear:
    """A product with a four-bit weight, rounded in groups from its least to its largest: quick, not the best."""

    def __init__(self, weight: Tensor) -> None:
        """Of (N, K); where N is no multiple of the kernel's block, rows of zeros follow."""
        groups = F.pad(weight, (0, 0, 0, -len(weight) % BLOCK)).unflatten(1, (-1, GROUP_SIZE))  # (N, K / G, G)
        low, high = groups.aminmax(dim=2)  # (N, K / G)
        scale = ((high - low) / 15).clamp_(min=1e-10)
        rounded = groups.sub(low[..., None]).div_(scale[..., None]).round_().clamp_(0, 15).flatten(1)
        self._arranged = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.to(torch.int32), 1)
        middle = low.add_(scale, alpha=8)  # the kernel counts from 8
        self._scale_and_zero = torch.stack([scale.t(), middle.t()], dim=2).bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        """(M, K) -> (M, N) bfloat16."""
        return int4_product(x, self._arranged, self._scale_and_zero)


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    query_key_value: _FourBitLinear
    attended: _FourBitLinear
    mlp_norm: Tensor
    gate_and_up: _FourBitLinear
    down: _FourBitLinear


class _FourBitLlama:
    """The copy. The scale of the attention is in its matrix; a norm's weight is not, for the groups round worse then
    (of 55 captions of mini 78 passes were needed in place of 68)."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self._num_heads: int = config.num_attention_heads
        self._num_shared: int = config.num_key_value_heads  # heads of the keys and of the values
        self._words: Tensor = model.get_input_embeddings().weight
        self._rotations = model.model.rotary_emb
        self._layers = [self._copied(layer) for layer in model.model.layers]
        self._norm = _norm_of(model.model.norm)
        self._head = _FourBitLinear(_weight_of(model.lm_head))

    def _copied(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        scaled = _weight_of(attention.q_proj) * attention.scaling
        query_key_value = torch.cat([scaled, _weight_of(attention.k_proj), _weight_of(attention.v_proj)])
        gate_and_up = torch.cat([_weight_of(mlp.gate_proj), _weight_of(mlp.up_proj)])
        return _Layer(
            _norm_of(layer.input_layernorm),
            _FourBitLinear(query_key_value),
            _FourBitLinear(_weight_of(attention.o_proj)),
            _norm_of(layer.post_attention_layernorm),
            _FourBitLinear(gate_and_up),
            _FourBitLinear(_weight_of(mlp.down_proj)),
        )

    @torch.inference_mode()
    def goes_on(
        self, reading: "Reading", token_id: int, most: int, stop_ids: Sequence[int], num_without_stop: int
    ) -> list[int]:
        """As `Drafter.draft`."""
        known = reading.mask.shape[1]
        first = int(reading.mask[0].argmax())  # padding stands on the left
        kept = [layer.reserve(known + most) for layer in reading.cache.layers]
        places = torch.arange(known - first, known - first + most)[None]
        cosines, sines = (part[0, 0] for part in turns(self._rotations(self._words, places)))  # (most, Dh)
        guesses: list[int] = []
        for i in range(most):
            hidden = self._words[token_id][None]  # (1, D)
            for layer, room in zip(self._layers, kept, strict=True):
                hidden = self._through(
                    layer, hidden, room.keys, room.values, slice(first, known + i + 1), cosines[i], sines[i]
                )
            logits = self._head(_normed(hidden, self._norm))[0, : len(self._words)].float()  # (V,)
            if i < num_without_stop:
                logits[list(stop_ids)] = -torch.inf
            token_id = int(logits.argmax())
            guesses.append(token_id)
            if token_id in stop_ids:
                break
        return guesses

    def _through(
        self, layer: _Layer, hidden: Tensor, keys: Tensor, values: Tensor, seen: slice, cosine: Tensor, sine: Tensor
    ) -> Tensor:
        """One layer over one token (1, D); its keys and values are put at the last place of `seen`."""
        heads = layer.query_key_value(_normed(hidden, layer.attention_norm)).float().view(-1, cosine.shape[0])
        turning, value = heads.split([self._num_heads + self._num_shared, self._num_shared])
        turned = torch.addcmul(turning * cosine, turning.roll(cosine.shape[0] // 2, dims=1), sine)
        query, key = turned.split([self._num_heads, self._num_shared])
        keys[0, :, seen.stop - 1] = key
        values[0, :, seen.stop - 1] = value
        query = query.unflatten(0, (self._num_shared, -1))  # (Hkv, H / Hkv, Dh)
        weights = (query @ keys[0, :, seen].mT).softmax(dim=-1)  # (Hkv, H / Hkv, L)
        hidden = hidden + layer.attended((weights @ values[0, :, seen]).view(1, -1))
        gate, up = layer.gate_and_up(_normed(hidden, layer.mlp_norm)).chunk(2, dim=1)
        return hidden + layer.down(F.silu(gate).mul_(up))


def _normed(hidden: Tensor, weight: Tensor) -> Tensor:
    """The root-mean-square norm; without its epsilon two calls in place of seven."""
    return hidden.div(torch.linalg.vector_norm(hidden)).mul_(weight)


def _norm_of(norm: Any) -> Tensor:
    """The weight (D,) for `_normed`, which divides by the root of the sum."""
    return norm.weight * len(norm.weight) ** 0.5


def _weight_of(layer: nn.Linear | PackedLinear) -> Tensor:
    """(N, K) float32, also of a layer that oneDNN has in its own layout."""
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.unpacked()
