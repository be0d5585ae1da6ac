"""Products of activations with int8 and int4 weights: which of PyTorch's kernels, by processor and number of rows.

    int8, inputs rounded   _int_mm where the processor has VNNI, oneDNN's on other x86 processors
    int8, inputs kept      _weight_int8pack_mm for few rows; for many _int_mm over inputs split in two where there is
                           VNNI, else float32 over the weight's rows, some at a time
    int4, inputs kept      _weight_int4pack_mm; with AVX2 and many rows float32 over some of the weight at a time

Why so: on a processor without VNNI `_int_mm` runs at 4 billion operations a second (float32: 100 and more), and the
int4 kernel, for many rows, at half of float32's rate. Inputs are rounded row by row, so what is beside a row does not
touch its result; how many rows there are may, for they choose the kernel.
"""

from functools import cache

import torch
from torch import Tensor

FEW_ROWS = 16  # up to which the kernel that reads int8 weights as they are is faster than float32
FEW_ROWS_INT4 = 96  # and the one that reads int4
FEW_ROWS_VNNI = 4  # up to which the first of them is faster than `_split`, see docs/decisions.md
STEP = 16  # numbers of a row that it reads at once: from no address between, and past the end of any other length
ROWS_AT_ONCE = 512  # of a weight made float32: stays in the processor's cache
WEIGHTS_AT_ONCE = 1 << 20  # likewise, of a four-bit weight in blocks of 32 rows
INT8_RANGE = 127
SEVEN_BITS = 63  # without VNNI two products are summed in sixteen bits, which 127 * 255 * 2 overflows
SPLIT = 254  # how much finer the second part of a split input is: it reaches from -127 to 127 again


@cache
def has_vnni() -> bool:
    """Whether this processor multiplies int8 fast in `_int_mm`."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_vnni") or found.get("avx_vnni"))


@cache
def has_onednn() -> bool:
    """Whether oneDNN's int8 products are there and fast."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu.get_capabilities().get("avx2"))


@cache
def is_avx2() -> bool:
    """Whether PyTorch's own kernels are those for AVX2, whose arrangement of int4 `int4_product` can read."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def int8_product(rows: Tensor, weight: Tensor, scale: Tensor, *, rounds_inputs: bool) -> Tensor:
    """rows @ (weight * scale[:, None]).T.

    Args:
        rows: (M, K) float32.
        weight: (N, K) int8.
        scale: (N,) float32.
        rounds_inputs: whether the inputs may have eight bits as well (seven without VNNI), with a scale for each row.

    Returns:
        (M, N) float32.
    """
    has_int8 = rows.is_cuda or has_vnni()
    if rounds_inputs and has_int8:
        return _rounded(rows, weight).mul_(scale)
    if rounds_inputs and has_onednn():
        return _onednn(rows, weight, scale)
    few = not rows.is_cuda and len(rows) <= (FEW_ROWS_VNNI if has_int8 else FEW_ROWS)
    if few and rows.shape[1] % STEP == 0 and weight.data_ptr() % STEP == 0:
        return torch.ops.aten._weight_int8pack_mm(rows.bfloat16().contiguous(), weight, scale.bfloat16()).float()
    if has_int8:
        return _split(rows, weight).mul_(scale)
    return _int8_as_float(rows, weight).mul_(scale)


def _rounded(rows: Tensor, weight: Tensor) -> Tensor:
    row_scale = _row_scale(rows, INT8_RANGE)
    return _int_mm((rows / row_scale).round_().to(torch.int8), weight).mul_(row_scale)


def _split(rows: Tensor, weight: Tensor) -> Tensor:
    """Each input as a coarse part and a fine one, together fifteen bits: twice the work."""
    row_scale = _row_scale(rows, INT8_RANGE)
    scaled = rows / row_scale
    coarse = scaled.round()
    fine = scaled.sub_(coarse).mul_(SPLIT).round_()
    high, low = _int_mm(torch.cat([coarse, fine]).to(torch.int8), weight).chunk(2)  # (M, N) each
    return low.div_(SPLIT).add_(high).mul_(row_scale)


def _int_mm(rows: Tensor, weight: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 -> (M, N) float32, exact in between."""
    if not rows.is_cuda:
        return torch.ops.aten._int_mm(rows, weight.t()).float()
    short = max(0, 17 - len(rows))  # cuBLASLt takes more than 16 rows
    padded = torch.nn.functional.pad(rows, (0, 0, 0, short + -(len(rows) + short) % 8))
    return torch.ops.aten._int_mm(padded, weight.t())[: len(rows)].float()


def _onednn(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight is packed each time, a tenth of the product's time for the 257 rows of a ViT, and so takes no memory
    twice."""
    row_scale = _row_scale(rows, SEVEN_BITS)
    middle = SEVEN_BITS + 1
    rounded = (rows / row_scale).round_().add_(middle).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight, list(rows.shape))
    zero = torch.zeros(len(scale), dtype=torch.int64)
    plain = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias; float32 comes out, and nothing is done to it
    return torch.ops.onednn.qlinear_pointwise(rounded, 1.0, middle, packed, scale, zero, *plain).mul_(row_scale)


def _int8_as_float(rows: Tensor, weight: Tensor) -> Tensor:
    """(M, K) float32 times (N, K) int8 -> (M, N)."""
    y = rows.new_empty(len(weight), len(rows))  # (N, M)
    some = rows.new_empty(min(ROWS_AT_ONCE, len(weight)), weight.shape[1])
    for begin in range(0, len(weight), ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, len(weight))
        torch.mm(some[: end - begin].copy_(weight[begin:end]), rows.t(), out=y[begin:end])
    return y.t().contiguous()


def _row_scale(rows: Tensor, largest: int) -> Tensor:
    return rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-10).div_(largest)  # (M, 1)


def int4_product(rows: Tensor, arranged: Tensor, scale_and_zero: Tensor) -> Tensor:
    """rows @ ((q - 8) * scale + zero).T.

    Args:
        rows: (M, K).
        arranged: q as the kernel of this processor reads it (`Int4Linear.arrange`).
        scale_and_zero: (K / G, N, 2) bfloat16.

    Returns:
        (M, N); bfloat16 or float32, as the kernel gives it.
    """
    group_size = rows.shape[1] // len(scale_and_zero)
    if rows.is_cuda:
        return torch.ops.aten._weight_int4pack_mm(rows.bfloat16(), arranged, group_size, scale_and_zero)
    if len(rows) > FEW_ROWS_INT4 and is_avx2() and scale_and_zero.shape[1] % 32 == 0:
        return _int4_as_float(rows.float(), arranged, scale_and_zero)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), arranged, group_size, scale_and_zero)


def _int4_as_float(rows: Tensor, arranged: Tensor, scale_and_zero: Tensor) -> Tensor:
    """As AVX2's kernel has them, 32 rows of the weight are a block, a byte holding row r low and row r + 16 high."""
    num_groups, num_columns, _ = scale_and_zero.shape
    length = rows.shape[1]
    group_size, num_blocks = length // num_groups, num_columns // 32
    blocks = arranged.view(num_blocks, length, 16)
    scale, zero = scale_and_zero.float().unbind(dim=2)  # (K / G, N)
    of_blocks = scale.unflatten(1, (num_blocks, 32)).transpose(0, 1)  # (N / 32, K / G, 32)
    y = rows.new_empty(num_blocks, len(rows), 32)
    at_once = min(max(1, WEIGHTS_AT_ONCE // (32 * length)), num_blocks)
    some = rows.new_empty(at_once, length, 2, 16)
    for begin in range(0, num_blocks, at_once):
        end = min(begin + at_once, num_blocks)
        part, weight = blocks[begin:end], some[: end - begin]
        weight[:, :, 0].copy_(part & 15)
        weight[:, :, 1].copy_(part >> 4)
        weight.view(-1, num_groups, group_size, 32).mul_(of_blocks[begin:end, :, None])
        torch.matmul(rows, weight.flatten(2), out=y[begin:end])
    sums = rows.unflatten(1, (num_groups, group_size)).sum(dim=2)  # (M, K / G)
    return torch.addmm(y.transpose(0, 1).flatten(1), sums, zero.sub_(scale, alpha=8))
