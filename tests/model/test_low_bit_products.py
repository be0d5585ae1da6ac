"""Every way to multiply by int8 and int4 weights gives the product of the weights that are stored."""

import pytest
import torch

from blip2.model import low_bit_products
from blip2.model.low_bit_products import FEW_ROWS, FEW_ROWS_INT4, ROWS_AT_ONCE, int4_product, int8_product, is_avx2

MANY = FEW_ROWS + 5
NUM_COLUMNS, LENGTH = ROWS_AT_ONCE + 64, 128


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randint(-127, 128, (NUM_COLUMNS, LENGTH), dtype=torch.int8), torch.rand(NUM_COLUMNS) / 100


def a_processor(monkeypatch, *, vnni, onednn):
    monkeypatch.setattr(low_bit_products, "has_vnni", lambda: vnni)
    monkeypatch.setattr(low_bit_products, "has_onednn", lambda: onednn)


def error_of(y, expected):
    return float((y - expected).norm() / expected.norm())


PROCESSORS = [
    pytest.param({"vnni": True, "onednn": True}, id="vnni"),
    pytest.param({"vnni": False, "onednn": low_bit_products.has_onednn()}, id="x86"),
    pytest.param({"vnni": False, "onednn": False}, id="any"),
]


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("num_rows", [1, 2, MANY])
@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_int8_weights_are_multiplied_as_they_are(monkeypatch, weight, processor, num_rows, rounds_inputs):
    a_processor(monkeypatch, **processor)
    rounded, scale = weight
    rows = torch.randn(num_rows, LENGTH)
    expected = rows @ (rounded * scale[:, None]).t()
    y = int8_product(rows, rounded, scale, rounds_inputs=rounds_inputs)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert error_of(y, expected) < (0.02 if rounds_inputs else 0.004)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("num_rows", [1, MANY])
def test_inputs_that_stand_out_take_nothing_from_the_rest(monkeypatch, weight, processor, num_rows):
    """LLMs have a few inputs a hundred times as large as the others, where rounding to eight bits leaves nothing."""
    a_processor(monkeypatch, **processor)
    rounded, scale = weight
    rounded[:, 7] = 0
    rows = torch.randn(num_rows, LENGTH)
    expected = rows @ (rounded * scale[:, None]).t()
    rows[:, 7] = 300
    assert error_of(int8_product(rows, rounded, scale, rounds_inputs=False), expected) < 0.01


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("length", [7, 36, 100, 130])
@pytest.mark.parametrize("num_rows", [1, 3, MANY])
def test_rows_of_any_length_are_multiplied(monkeypatch, processor, length, num_rows):
    """PyTorch's int8 kernel for few rows reads past the end of rows that are no multiple of its step."""
    a_processor(monkeypatch, **processor)
    torch.manual_seed(0)
    weight, scale = torch.randint(-127, 128, (40, length), dtype=torch.int8), torch.rand(40) / 100
    rows = torch.randn(length, num_rows).t()  # nor do they lie one after the other
    expected = rows @ (weight * scale[:, None]).t()
    assert error_of(int8_product(rows, weight, scale, rounds_inputs=False), expected) < 0.004


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("begin", [1, 8])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_weights_may_lie_anywhere_in_memory(monkeypatch, processor, begin, num_rows):
    """PyTorch's int8 kernel for few rows ends the process where weights do not lie at a multiple of its step."""
    a_processor(monkeypatch, **processor)
    torch.manual_seed(0)
    numbers, scale = torch.randint(-127, 128, (290 * LENGTH + begin,), dtype=torch.int8), torch.rand(290) / 100
    weight = numbers[begin:].view(290, LENGTH)
    rows = torch.randn(num_rows, LENGTH)
    expected = rows @ (weight * scale[:, None]).t()
    assert error_of(int8_product(rows, weight, scale, rounds_inputs=False), expected) < 0.004


@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_inputs_rounding_does_not_depend_on_the_rows_beside_it(monkeypatch, weight, processor):
    a_processor(monkeypatch, **processor)
    rows = torch.randn(7, LENGTH) * torch.logspace(-2, 2, 7)[:, None]
    together = int8_product(rows, *weight, rounds_inputs=True)
    alone = torch.cat([int8_product(row[None], *weight, rounds_inputs=True) for row in rows])
    assert error_of(together[0], alone[0]) < 1e-6 and error_of(together, alone) < 1e-6


def test_the_largest_products_do_not_overflow(monkeypatch):
    """Without VNNI two products are added in sixteen bits."""
    a_processor(monkeypatch, vnni=False, onednn=low_bit_products.has_onednn())
    weight, scale = torch.full((32, 64), -127, dtype=torch.int8), torch.ones(32)
    rows = torch.ones(20, 64)
    y = int8_product(rows, weight, scale, rounds_inputs=True)
    torch.testing.assert_close(y, torch.full((20, 32), -127.0 * 64))


@pytest.mark.parametrize("num_rows", [1, FEW_ROWS_INT4, FEW_ROWS_INT4 + 1])
@pytest.mark.parametrize("num_columns", [48, 512 + 96])
@pytest.mark.parametrize("group_size", [32, 128])
def test_int4_weights_are_multiplied_as_they_are(monkeypatch, num_rows, num_columns, group_size):
    monkeypatch.setattr(low_bit_products, "WEIGHTS_AT_ONCE", 5 * 32 * LENGTH)
    torch.manual_seed(0)
    q = torch.randint(0, 16, (num_columns, LENGTH), dtype=torch.int32)
    scale_and_zero = (torch.rand(LENGTH // group_size, num_columns, 2) / 100).bfloat16()
    arranged = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    scale, zero = scale_and_zero.float().repeat_interleave(group_size, dim=0).unbind(dim=2)  # (K, N)
    rows = torch.randn(num_rows, LENGTH)
    expected = rows @ ((q.t() - 8) * scale + zero)
    y = int4_product(rows, arranged, scale_and_zero)
    assert y.shape == expected.shape
    exact = is_avx2() and num_rows > FEW_ROWS_INT4 and num_columns % 32 == 0
    assert error_of(y.float(), expected) < (1e-5 if exact else 0.01)
