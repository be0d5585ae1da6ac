"""Weights of a linear layer as LiteRT has them: floats, or signed integers of four or eight bits and their scales."""

import torch
from torch import Tensor, nn

from blip2.model.quantized import Int4Linear, Int8Linear, num_parts, to_int8
from blip2.model.rotation import block_of

SIGN = 0x88  # turns two numbers of 0..15 around 8 into signed ones of four bits
LIKE = 2.0**-11  # of a layer's largest scale: what float16 holds without loss beside it
ZEROS = 0x88  # two four-bit weights that are 0
ROWS_AT_ONCE = 2048  # of a weight while it is turned: bounds the memory that takes

QuantizedLinear = Int4Linear | Int8Linear
Linear = nn.Linear | QuantizedLinear


def kind_of(layer: Linear) -> tuple[int, int]:
    """Bits of a weight and inputs that are turned together, as the kernel has them."""
    if isinstance(layer, nn.Linear):
        return 32, 0
    if isinstance(layer, Int4Linear) and layer.turned_block and _has_like_scales(layer):
        return 4, layer.turned_block
    return 8, layer.turned_block if _is_stored_so(layer) else block_of(layer.in_features)


def _is_stored_so(layer: QuantizedLinear) -> bool:
    """Whether a layer's own eight bits are what the kernel has."""
    return isinstance(layer, Int8Linear) and bool(layer.rounds_inputs or layer.turned_block)


def _has_like_scales(layer: Int4Linear) -> bool:
    """Whether LiteRT can have a layer's scales, in float16: none is much smaller than the largest, but of groups of
    nothing but zeros."""
    scale = layer.scale_and_zero[..., 0].t()  # (N, K / G)
    is_small = scale < scale.max() * LIKE
    return bool((layer.packed.unflatten(1, (-1, layer.group_size // 2))[is_small] == ZEROS).all())


def stored(layer: Linear, bits: int) -> tuple[Tensor, Tensor]:
    """Weights with the bits that `kind_of` told, and their scales; floats have none."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach(), torch.empty(0)
    return _four_bits(layer) if isinstance(layer, Int4Linear) and bits == 4 else _eight_bits(layer)


def _four_bits(layer: Int4Linear) -> tuple[Tensor, Tensor]:
    """(N, K / 2) bytes of two signed weights, and scales (N, K / G) float32; the layer's zeros are 0."""
    return layer.packed ^ SIGN, layer.scale_and_zero[..., 0].float().t().contiguous()


def _eight_bits(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """(N, K) int8, turned but for an image encoder, and scales (N,) or (N, P) float32. Four-bit weights that were not
    turned have eight here: they came from sixteen values a group, and would lose them."""
    if isinstance(layer, Int8Linear) and _is_stored_so(layer):
        return layer.weight, layer.scale.float()
    block = 0 if layer.turned_block else block_of(layer.in_features)  # once
    count = num_parts(layer.in_features)
    parts = [
        to_int8(layer.dequantized(begin, begin + ROWS_AT_ONCE), turned_block=block, num_parts=count)
        for begin in range(0, layer.out_features, ROWS_AT_ONCE)
    ]
    weight, scale = zip(*parts, strict=True)
    return torch.cat(weight), torch.cat(scale)
