"""Kernels for a GPU that reads a decoder's weights for the sake of one token.

The step of a single row takes as long as its weights take from memory, plus a few microseconds a kernel: a thousand
small ones cost more than the weights. Here what stands before and after a product is part of it, so that five kernels
are a layer. Sums are float32. Written in Triton, which PyTorch brings where there is a GPU; `TRITON_INTERPRET=1` runs
them without one.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

PLAIN, LAYER_NORM, RMS_NORM, GATE = 0, 1, 2, 3  # what stands before a product
ROWS, COLUMNS, WARPS = 2, 1024, 4  # of a weight, that a program reads at once: the fastest on an H200
POSITIONS = 64  # whose keys and values a program reads at once


def row_product(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    before: int = PLAIN,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    is_rectified: bool = False,
    residual: Tensor | None = None,
) -> None:
    """y = act(before(x) weight.T + bias) + residual, of one row.

    Args:
        x: (K,); (2 K,) where `before` is GATE, which makes silu(first half) * second half of it.
        weight: (N, K), contiguous.
        y: (N,), written to.
        before: one of PLAIN, LAYER_NORM (by `gain` and `shift`), RMS_NORM (by `gain`) and GATE.
        gain, shift: (K,) of the norm; eps: its own.
        scale: (N,), of an int8 weight.
        bias: (N,).
        is_rectified: whether a ReLU stands after the bias.
        residual: (N,), added last.
    """
    num_rows, num_columns = weight.shape
    kernel: Any = _row_product
    kernel[(triton.cdiv(num_rows, ROWS),)](
        x,
        weight,
        y,
        gain if gain is not None else x,
        shift if shift is not None else x,
        scale if scale is not None else x,
        bias if bias is not None else x,
        residual if residual is not None else x,
        num_rows,
        num_columns,
        eps,
        BEFORE=before,
        HAS_SHIFT=shift is not None,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        IS_RECTIFIED=is_rectified,
        HAS_RESIDUAL=residual is not None,
        WHOLE=triton.next_power_of_2(num_columns),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )


@triton.jit
def _row_product(
    x,
    weight,
    y,
    gain,
    shift,
    scale,
    bias,
    residual,
    num_rows,
    num_columns,
    eps,
    BEFORE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_RECTIFIED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    starts = rows.to(tl.int64) * num_columns
    mean = 0.0
    inverse = 1.0
    if BEFORE == 1 or BEFORE == 2:  # every program finds the norm for itself: x is in its cache
        places = tl.arange(0, WHOLE)
        whole = tl.load(x + places, mask=places < num_columns, other=0.0).to(tl.float32)
        if BEFORE == 1:
            mean = tl.sum(whole, axis=0) / num_columns
            whole = tl.where(places < num_columns, whole - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(whole * whole, axis=0) / num_columns + eps)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, num_columns, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        is_column = columns < num_columns
        part = tl.load(weight + starts[:, None] + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0)
        value = tl.load(x + columns, mask=is_column, other=0.0).to(tl.float32)
        if BEFORE == 3:
            up = tl.load(x + num_columns + columns, mask=is_column, other=0.0).to(tl.float32)
            value = value / (1.0 + tl.exp(-value)) * up
        if BEFORE == 1 or BEFORE == 2:
            value = (value - mean) * inverse * tl.load(gain + columns, mask=is_column, other=0.0).to(tl.float32)
            if HAS_SHIFT:
                value += tl.load(shift + columns, mask=is_column, other=0.0).to(tl.float32)
        sums += part.to(tl.float32) * value[None, :]
    total = tl.sum(sums, axis=1)
    if HAS_SCALE:
        total *= tl.load(scale + rows, mask=is_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)
    if IS_RECTIFIED:
        total = tl.maximum(total, 0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=is_row)


def row_attention(
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    mask: Tensor,
    y: Tensor,
    *,
    scale: float,
    turns: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The attention of one new position, whose key and value are put in their place.

    Args:
        heads: ((H + 2 Hkv) Dh,): queries, keys and values of the position.
        keys, values: (1, Hkv, L, Dh), contiguous, filled before `slot`, written to at `slot`.
        slot: (1,) the new position's place.
        mask: (L,) added to the scores of what is before it.
        y: (H Dh,), written to.
        scale: of the scores.
        turns: cosines and sines (Dh,) of a rotary position; None: none.
    """
    _, num_shared, length, width = keys.shape
    num_heads = len(y) // width
    cosines, sines = turns if turns is not None else (heads, heads)
    kernel: Any = _row_attention
    kernel[(num_heads,)](
        heads,
        keys,
        values,
        slot,
        mask,
        y,
        cosines,
        sines,
        num_heads,
        num_shared,
        length,
        scale,
        GROUP=num_heads // num_shared,
        WIDTH=width,
        WHOLE=triton.next_power_of_2(width),
        POSITIONS=POSITIONS,
        IS_ROTARY=turns is not None,
        num_warps=WARPS,
    )


@triton.jit
def _turned(x, start, d, is_d, cosines, sines, WIDTH: tl.constexpr):
    """A head at `start`, its two halves turned against each other."""
    half: tl.constexpr = WIDTH // 2
    own = tl.load(x + start + d, mask=is_d, other=0.0).to(tl.float32)
    other = tl.load(x + start + (d + half) % WIDTH, mask=is_d, other=0.0).to(tl.float32)
    other = tl.where(d < half, -other, other)
    cosine = tl.load(cosines + d, mask=is_d, other=0.0).to(tl.float32)
    sine = tl.load(sines + d, mask=is_d, other=0.0).to(tl.float32)
    return own * cosine + other * sine


@triton.jit
def _row_attention(
    heads,
    keys,
    values,
    slot,
    mask,
    y,
    cosines,
    sines,
    num_heads,
    num_shared,
    length,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    POSITIONS: tl.constexpr,
    IS_ROTARY: tl.constexpr,
):
    head = tl.program_id(0)
    shared = head // GROUP
    d = tl.arange(0, WHOLE)
    is_d = d < WIDTH
    place = tl.load(slot)
    of_key = (num_heads + shared) * WIDTH
    if IS_ROTARY:
        query = _turned(heads, head * WIDTH, d, is_d, cosines, sines, WIDTH)
        key = _turned(heads, of_key, d, is_d, cosines, sines, WIDTH)
    else:
        query = tl.load(heads + head * WIDTH + d, mask=is_d, other=0.0).to(tl.float32)
        key = tl.load(heads + of_key + d, mask=is_d, other=0.0).to(tl.float32)
    value = tl.load(heads + of_key + num_shared * WIDTH + d, mask=is_d, other=0.0).to(tl.float32)
    start = shared * length * WIDTH
    if head % GROUP == 0:
        tl.store(keys + start + place * WIDTH + d, key.to(keys.dtype.element_ty), mask=is_d)
        tl.store(values + start + place * WIDTH + d, value.to(values.dtype.element_ty), mask=is_d)
    most = tl.sum(query * key, axis=0) * scale  # the new position sees itself
    total = 1.0
    context = value
    for begin in range(0, place, POSITIONS):
        before = begin + tl.arange(0, POSITIONS)
        is_before = before < place
        places = start + before[:, None] * WIDTH + d[None, :]
        is_there = is_before[:, None] & is_d[None, :]
        known = tl.load(keys + places, mask=is_there, other=0.0).to(tl.float32)
        seen = tl.load(values + places, mask=is_there, other=0.0).to(tl.float32)
        scores = tl.sum(known * query[None, :], axis=1) * scale
        scores += tl.load(mask + before, mask=is_before, other=0.0).to(tl.float32)
        scores = tl.where(is_before, scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, axis=0))
        weights = tl.exp(scores - larger)
        shrunk = tl.exp(most - larger)
        context = context * shrunk + tl.sum(weights[:, None] * seen, axis=0)
        total = total * shrunk + tl.sum(weights, axis=0)
        most = larger
    tl.store(y + head * WIDTH + d, (context / total).to(y.dtype.element_ty), mask=is_d)
