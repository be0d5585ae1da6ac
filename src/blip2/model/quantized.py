"""Frozen linear layers with few bits a weight: eight, or four in groups.

    Int8Linear   weight (N, K) int8, one scale a row
    Int4Linear   weight (N, K) of 0..15 in groups of G along K, each with a scale and a zero

The matrix products are PyTorch's own kernels (`low_bit_products`), but where a graph takes the layers (`graphs`).
Frozen means frozen: no gradient passes through, and asking for one is an error. What is no linear layer (convolutions,
norms, position embeddings) keeps its precision.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blip2.errors import UserError
from blip2.model.low_bit_products import STEP, int4_product, int8_product
from blip2.model.rotation import block_of, turned

Bits = Literal["int8", "int4"]
GROUP_SIZE = 32  # weights that share a scale and a zero in Int4Linear
GROUP_SIZES = (32, 64, 128, 256)  # that there are; larger ones are faster and lose more (docs/quantization.md)
MIDDLE = 8  # the four bits that stand for the zero
CLIPS = 12  # how far each group's range is narrowed in search of the least squared error
NARROWEST = 0.7
ARRANGED_AT_ONCE = 256  # rows of a weight, a multiple of the four-bit kernels' blocks of 16, 32 or 64
LARGE, LEAST_PART = 2048, 192  # inputs from which a row has one scale; and of a part, where it has several
TRIED = 64  # rows of each layer that tell whether weights had four bits before
HAD_FOUR_BITS = 0.25  # of the squared error of turned weights: less tells so
ROWS_AT_ONCE = 2048  # of a weight while it is rounded: bounds the memory that takes


class Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights; see the module's docstring.

    Attributes:
        weight: (N, K) int8.
        scale: (N,) float32, or (N, P) where each row has P parts of equal length with a scale of their own, as their
            inputs have then; weight * scale is what was rounded.
        bias: (N,) or None.
        rounds_inputs: whether inputs are rounded as well, each row with a scale of its own: fast where there are many
            rows. An image encoder bears it; an LLM, with few inputs far larger than the rest, loses by it.
        turned_block: as of `Int4Linear`.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        rounds_inputs: bool = False,
        turned_block: int = 0,
    ) -> None:
        super().__init__()
        self.rounds_inputs = rounds_inputs
        self.turned_block = turned_block
        self._parts: list[Tensor] | None = None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in x's dtype."""
        refuse_gradient(x)
        rows = turned(x.reshape(-1, x.shape[-1]).float(), self.turned_block)  # (M, K)
        products = [
            int8_product(inputs, weight, scale, rounds_inputs=self.rounds_inputs)
            for inputs, weight, scale in zip(*self.parts(rows), strict=True)
        ]
        y = reduce(Tensor.add_, products)  # (M, N)
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def dequantized(self, begin: int, end: int) -> Tensor:
        """What was rounded, some of its rows, (n, K) float32; turned, if it was."""
        return _unrounded(self.weight[begin:end], self.scale[begin:end])

    def parts(self, rows: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Inputs (M, K), the weight and the scales (N,) of each part of a row."""
        if self.scale.dim() == 1:
            return [rows], [self.weight], [self.scale]
        count = self.scale.shape[1]
        # Laid out once: a kernel needs whole rows.
        if self._parts is None or self._parts[0].device != self.weight.device:
            self._parts = [part.contiguous() for part in self.weight.chunk(count, dim=1)]
        return rows.chunk(count, dim=1), self._parts, self.scale.t().contiguous().unbind()

    def turn_back(self) -> None:
        """Rounds the weights again as they were before they were turned; inputs are then taken as they are."""
        parts = [
            to_int8(turned(self.dequantized(begin, begin + ROWS_AT_ONCE), self.turned_block))
            for begin in range(0, self.out_features, ROWS_AT_ONCE)
        ]
        rounded, scales = zip(*parts, strict=True)
        self.weight, self.scale, self.turned_block = torch.cat(rounded), torch.cat(scales), 0

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class Int8Embedding(nn.Module):
    """A frozen embedding with int8 weights, as an `Int8Linear` that shares its matrix has them.

    Attributes:
        weight: (V, D) int8.
        scale: (V,) or (V, P) float32.
        dtype: of what it gives.
        turned_block: as of the `Int8Linear`.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype, *, turned_block: int = 0) -> None:
        super().__init__()
        self.turned_block = turned_block
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.dtype = dtype
        self.num_embeddings, self.embedding_dim = weight.shape

    def is_of(self, layer: Int8Linear) -> bool:
        """Whether a layer has the same matrix, be it in memory of its own."""
        shares = self.weight.data_ptr() == layer.weight.data_ptr()
        return shares or (self.weight.shape == layer.weight.shape and torch.equal(self.weight, layer.weight))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        words = _unrounded(self.weight[input_ids], self.scale[input_ids])
        return turned(words, self.turned_block).to(self.dtype)


class Int4Linear(nn.Module):
    """A frozen linear layer with four-bit weights; see the module's docstring.

    Attributes:
        packed: (N, K / 2) uint8, two weights a byte, the one at the even place in the low half: as it is stored. The
            kernel's own arrangement, which depends on the processor, takes its place on first use.
        scale_and_zero: (K / G, N, 2) bfloat16; (q - 8) * scale + zero is what was rounded.
        bias: (N,) or None.
        turned_block: how many inputs are turned together before the product (`rotation`), as the weight's columns were
            before they were rounded; 0: none. Where they are, every zero is 0.
    """

    packed: Tensor
    scale_and_zero: Tensor
    bias: Tensor | None
    weight = None  # what asks a layer for its dtype (T5) finds none

    def __init__(self, packed: Tensor, scale_and_zero: Tensor, bias: Tensor | None, *, turned_block: int = 0) -> None:
        super().__init__()
        self.turned_block = turned_block
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", scale_and_zero)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = packed.shape[0], packed.shape[1] * 2
        self.group_size = self.in_features // scale_and_zero.shape[0]
        self._arranged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in x's dtype."""
        refuse_gradient(x)
        if self._arranged is None or self._arranged.device != x.device:
            self.arrange(x.device)
        assert self._arranged is not None
        rows = x.reshape(-1, x.shape[-1])
        if self.turned_block:
            rows = turned(rows.float(), self.turned_block)
        y = int4_product(rows, self._arranged, self.scale_and_zero).to(x.dtype)  # (M, N)
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])

    def dequantized(self, begin: int, end: int) -> Tensor:
        """What was rounded, some of its rows, (n, K) float32; turned, if it was."""
        some = self.packed[begin:end]
        q = torch.stack([some & 15, some >> 4], dim=2).flatten(1).unflatten(1, (-1, self.group_size))
        scale, zero = (part[:, begin:end].t().float() for part in self.scale_and_zero.unbind(dim=2))  # (n, K / G)
        return ((q.float() - MIDDLE) * scale[..., None] + zero[..., None]).flatten(1)

    def arrange(self, device: torch.device) -> None:
        """Lays the weights out as the kernel of this processor reads them, and lets the stored ones go."""
        if self._arranged is not None:
            raise UserError("Four-bit weights stay where they were first used. Load the model for the other device.")
        packed = self.packed.to(device)
        if device.type == "cuda":  # one byte holds two weights, the even place in the high half
            swapped = (packed << 4) | (packed >> 4)
            self._arranged = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
        else:
            # Some rows at a time, each a whole number of the kernel's blocks, all through one buffer: an int32 copy of
            # every matrix would leave twice the model's size in holes behind.
            self._arranged = torch.empty_like(packed)
            apart = torch.empty(ARRANGED_AT_ONCE, self.in_features, dtype=torch.int32)
            for rows, place in zip(packed.split(ARRANGED_AT_ONCE), self._arranged.split(ARRANGED_AT_ONCE), strict=True):
                unpacked = apart[: len(rows)]
                unpacked[:, ::2] = rows & 15
                unpacked[:, 1::2] = rows >> 4
                place.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked, 1))
        self.packed = self.packed.new_empty(0)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}"


def _unrounded(weight: Tensor, scale: Tensor) -> Tensor:
    """(..., K) int8 times scales (...) or (..., P), float32."""
    if scale.dim() < weight.dim():
        return weight * scale[..., None]
    return (weight.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def refuse_gradient(x: Tensor) -> None:
    """Raises UserError where a gradient would have to pass through rounded numbers, and silently would not."""
    if x.requires_grad and torch.is_grad_enabled():
        raise UserError(
            "Quantised parts pass no gradient on, so nothing can be trained through them. Train with the model as it "
            "was before `blip2 quantize`, and quantise what comes out."
        )


# Rounding


def to_int8(weight: Tensor, *, turned_block: int = 0, num_parts: int = 1) -> tuple[Tensor, Tensor]:
    """(N, K) -> int8 (N, K) and scales (N,) or (N, P) float32: the largest weight of a row, or part, becomes 127."""
    pieces = []
    for some in weight.split(ROWS_AT_ONCE):
        rows = turned(some.float(), turned_block).unflatten(1, (num_parts, -1))  # (n, P, K / P)
        scale = rows.abs().amax(dim=2).clamp(min=1e-10) / 127
        pieces.append(((rows / scale[..., None]).round().to(torch.int8).flatten(1), scale))
    rounded, scales = zip(*pieces, strict=True)
    scale = torch.cat(scales)
    return torch.cat(rounded), scale if num_parts > 1 else scale[:, 0]


def num_parts(width: int) -> int:
    """How many parts a row of an LLM's eight-bit weights has: of small LLMs, which lose more by rounding, as many as
    have 192 inputs or more; all others one."""
    block = block_of(width)
    counts = [
        count for count in range(1, width // LEAST_PART + 1) if width % count == 0 and width // count % block == 0
    ]
    return max(counts) if counts and width < LARGE else 1


def to_int4(weight: Tensor, group_size: int = GROUP_SIZE, *, turned_block: int = 0) -> tuple[Tensor, Tensor]:
    """(N, K) -> packed weights and scale_and_zero, as `Int4Linear` has them.

    The range of every group is narrowed a little at a time, and the one with the least squared error is kept.
    """
    parts = [
        _rows_to_int4(turned(rows.float(), turned_block), group_size, has_zeros=not turned_block)
        for rows in weight.split(ROWS_AT_ONCE)
    ]
    packed, scale_and_zero, _ = zip(*parts, strict=True)
    return torch.cat(packed), torch.cat(scale_and_zero, dim=1)


def _rows_to_int4(weight: Tensor, group_size: int, *, has_zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `to_int4`, and the sum of squared errors."""
    groups = weight.unflatten(1, (-1, group_size))  # (N, K / G, G)
    low, high = groups.aminmax(dim=2)  # (N, K / G)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)
    for share in torch.linspace(1, NARROWEST, CLIPS).tolist():
        # As the kernels have them: bfloat16, and weights whole steps away from the zero, which stands for 8.
        span = high - low if has_zeros else 2 * torch.maximum(high, -low)
        scale = (span * share / 15).clamp(min=1e-10).bfloat16().float()
        zero = ((low + high + scale) / 2).bfloat16().float() if has_zeros else torch.zeros_like(low)
        error = (_fourbit(groups, scale, zero).sub_(8).mul_(scale[..., None]).add_(zero[..., None]) - groups).square_()
        error = error.sum(dim=2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    q = _fourbit(groups, best_scale, best_zero).flatten(1).to(torch.uint8)  # (N, K)
    packed = q[:, ::2] | (q[:, 1::2] << 4)
    return packed, torch.stack([best_scale.t(), best_zero.t()], dim=2).bfloat16(), best_error.sum()


def _fourbit(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((groups - zero[..., None]) / scale[..., None] + 8).round_().clamp_(0, 15)


# Networks


def quantize(network: Any, bits: Bits, *, group_size: int = GROUP_SIZE, rounds_inputs: bool = False) -> int:
    """Replaces the linear layers of a frozen network, and the word embeddings that one of them shares, in place.

    The matrix that gives the vocabulary's logits has eight bits in any case, and so has a layer whose width the
    four-bit kernel cannot take.

    Args:
        network: a Hugging Face model or tower.
        bits: of the weights.
        group_size: weights that share a scale in int4; 32, 64, 128 or 256.
        rounds_inputs: of layers of eight bits; see `Int8Linear`.

    Returns:
        How many layers were replaced.

    Raises:
        UserError: there are quantised layers already; rounding twice loses more than once.
    """
    if has_few_bits(network):
        raise UserError("This model is quantised already. Quantise the one that it was made of.")
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    words = network.get_input_embeddings() if head is not None else None
    shares = head is not None and type(words) is nn.Embedding and words.weight is head.weight
    names = [name for name, layer in network.named_modules() if name and _is_linear(layer)]
    layers = [network.get_submodule(name) for name in names]
    had_four_bits = bits == "int4" and _had_four_bits([layer for layer in layers if layer is not head], group_size)
    del layers
    for name in names:  # one by one: what is replaced frees its memory
        layer: Any = network.get_submodule(name)
        weight = _weight(layer)
        bias = None if layer.bias is None else layer.bias.detach().float()
        if bits == "int4" and layer is not head and _fits_int4(weight, group_size):
            block = 0 if had_four_bits else block_of(weight.shape[1])
            rounded, scales = to_int4(weight, group_size, turned_block=block)
            network.set_submodule(name, Int4Linear(rounded, scales, bias, turned_block=block))
            continue
        block = 0 if rounds_inputs else block_of(weight.shape[1])
        rounded, scale = to_int8(
            weight, turned_block=block, num_parts=1 if rounds_inputs else num_parts(weight.shape[1])
        )
        layer_of_int8 = Int8Linear(rounded, scale, bias, rounds_inputs=rounds_inputs, turned_block=block)
        network.set_submodule(name, layer_of_int8)
        if layer is head and words is not None and shares:
            for place in [place for place, module in network.named_modules() if module is words]:
                network.set_submodule(place, Int8Embedding(rounded, scale, words.weight.dtype, turned_block=block))
    return len(names)


def arrange(network: nn.Module, device: torch.device) -> None:
    """Lays the four-bit weights out for `device` now, instead of on first use, and puts those of eight bits where the
    kernel for few rows reads them: a file aligns to eight bytes alone. A GPU's kernels take no turned ones of eight."""
    if device.type == "cuda":
        turn_back(network)
    for layer in network.modules():
        if isinstance(layer, Int4Linear):
            layer.arrange(device)
        elif isinstance(layer, Int8Linear) and device.type == "cpu" and layer.weight.data_ptr() % STEP:
            layer.weight = layer.weight.clone()


def turn_back(network: nn.Module) -> None:
    """Has layers of eight bits take their inputs as they are (`Int8Linear.turn_back`), and what shares a matrix too."""
    for layer in network.modules():
        if isinstance(layer, Int8Linear) and layer.turned_block:
            words = [one for one in network.modules() if isinstance(one, Int8Embedding) and one.is_of(layer)]
            layer.turn_back()
            for one in words:
                one.weight, one.scale, one.turned_block = layer.weight, layer.scale, 0


def has_few_bits(network: nn.Module) -> bool:
    """Whether some of a network's layers are quantised."""
    return any(isinstance(layer, Int4Linear | Int8Linear) for layer in network.modules())


def _had_four_bits(layers: list[Any], group_size: int) -> bool:
    """Whether weights came from four bits, as those of a GGUF file may: groups find their sixteen values again, where
    turned ones would lose them."""
    error = torch.zeros(2)
    for layer in layers:
        weight = _weight(layer)[:TRIED].float()
        if weight.shape[1] % group_size == 0:
            block = block_of(weight.shape[1])
            for i, some in enumerate((weight, turned(weight, block))):
                error[i] += _rows_to_int4(some, group_size, has_zeros=i == 0)[2]
    return bool(error[0] < HAD_FOUR_BITS * error[1])


def _weight(layer: Any) -> Tensor:
    """(N, K)."""
    return layer.weight.detach() if type(layer) is nn.Linear else layer.weight.detach().t().contiguous()


def _is_linear(layer: nn.Module) -> bool:
    """Also GPT-2's, which keeps its matrix the other way round."""
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"


def _fits_int4(weight: Tensor, group_size: int) -> bool:
    return weight.shape[0] % 16 == 0 and weight.shape[1] % group_size == 0
