"""A product that the library computes is that of the rounded weights with rounded inputs, for any rows."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from blip2.errors import UserError
from blip2.model.graphs.attention import one_thread
from blip2.model.graphs.graph import ModelFile
from blip2.model.quantized import Int4Linear, Int8Linear, num_parts, to_int4, to_int8
from blip2.model.rotation import block_of
from model.rounded import RoundedRows, float_inputs, near, product


@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize(("length", "group_size"), [(256, 128), (192, 64), (96, 32)])
def test_a_layer_alone_computes_with_the_weights_it_stores(length, group_size, num_rows):
    torch.manual_seed(0)
    linear = nn.Linear(length, 48).requires_grad_(False)
    x = torch.randn(length, num_rows).t()  # its rows need not lie one after the other
    block = block_of(length)
    for layer in (
        Int4Linear(*to_int4(linear.weight, group_size, turned_block=block), linear.bias, turned_block=block),
        Int4Linear(*to_int4(linear.weight, group_size), linear.bias),
        Int8Linear(*to_int8(linear.weight, turned_block=block), linear.bias, turned_block=block),
        Int8Linear(*to_int8(linear.weight), None),
        Int8Linear(*to_int8(linear.weight), linear.bias, rounds_inputs=True),
    ):
        y = product(layer)(x)
        near(y, RoundedRows(layer)(x), 2e-3)
        near(y, float_inputs(layer)(x), 0.02)
        assert y.dtype == torch.float32


@pytest.mark.parametrize("length", [7, 16, 36, 100])
def test_rows_of_any_length_are_multiplied(length):
    torch.manual_seed(0)
    linear = nn.Linear(length, 40).requires_grad_(False)
    layer = Int8Linear(*to_int8(linear.weight), linear.bias)
    x = torch.randn(2, 3, length)
    near(product(layer)(x), float_inputs(layer)(x), 0.02)


@pytest.mark.parametrize("num_rows", [2, 9, 37, 600])
def test_a_row_does_not_depend_on_what_is_beside_it(num_rows):
    torch.manual_seed(0)
    linear = nn.Linear(256, 112).requires_grad_(False)
    x = torch.randn(num_rows, 256)
    for layer in (
        Int4Linear(*to_int4(linear.weight, 64, turned_block=64), linear.bias, turned_block=64),
        Int8Linear(*to_int8(linear.weight), linear.bias),
    ):
        alone = product(layer)
        y = alone(x)
        assert all(torch.equal(alone(x[i : i + 1])[0], y[i]) for i in (0, num_rows // 2, num_rows - 1))


def test_what_stands_out_does_not_make_its_row_coarse():
    """Rounded as it is, with an input of 500 among such of 1, all others would be rounded to a quarter of themselves or
    to nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 40, bias=False).requires_grad_(False)
    layer = Int8Linear(*to_int8(linear.weight), None)
    layer.weight[:, 7] = 0
    x = torch.randn(4, 1024)
    x[:, 7] = 500
    expected = float_inputs(layer)(x)
    turned_inputs = float((product(layer)(x) - expected).norm() / expected.norm())
    layer.rounds_inputs = True  # which are not turned
    as_they_are = float((product(layer)(x) - expected).norm() / expected.norm())
    assert turned_inputs < 0.2 < 0.5 < as_they_are


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_weights_of_any_size_keep_their_precision(factor):
    """LiteRT has scales of four-bit weights in float16."""
    torch.manual_seed(0)
    weight = torch.randn(48, 128) * factor
    weight[5] = 0
    layer = Int4Linear(*to_int4(weight, 64, turned_block=64), None, turned_block=64)
    x = torch.randn(3, 128)
    near(product(layer)(x), RoundedRows(layer)(x), 2e-3)


def test_weights_much_smaller_than_others_beside_them_keep_their_precision():
    torch.manual_seed(0)
    x, sizes = torch.randn(3, 128), (1.0, 1e-3, 1e-6)
    layers, rows = [], torch.randn(48, 128)
    for factors in (torch.full((48,), sizes[0]), torch.full((48,), sizes[1]), torch.tensor(sizes * 16)):
        stored = to_int4(rows * factors[:, None], 64, turned_block=64)
        layers.append(Int4Linear(*stored, None, turned_block=64))
    file = ModelFile()
    signature = file.signature("three")
    signature.output("y", signature.product(signature.input("x", 128), *layers))
    (y,) = file.runtime().run("three", x=x)
    for part, layer in zip(y.split(48, dim=1), layers, strict=True):
        for i in range(3):
            near(part[:, i::3], float_inputs(layer)(x)[:, i::3], 0.03)


def test_threads_of_pytorch_are_as_many_afterwards():
    layer = product(Int8Linear(*to_int8(torch.eye(64)), None))
    threads, found = torch.get_num_threads(), []

    def work():
        layer(torch.ones(1, 64))
        found.append(torch.get_num_threads())

    together = [threading.Thread(target=work) for _ in range(8)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    layer(torch.ones(1, 64))
    assert found == [threads] * 8 and torch.get_num_threads() == threads


@pytest.mark.parametrize("length", [576, 1536])
@pytest.mark.parametrize("is_int4", [False, True])
def test_a_small_models_rows_have_parts_with_scales_of_their_own(length, is_int4):
    """An input that stands out makes its own part coarse, of four-bit weights that were not turned too."""
    torch.manual_seed(0)
    linear = nn.Linear(length, 40).requires_grad_(False)
    count = num_parts(length)
    assert length // count == 192
    weight, scale = to_int8(linear.weight, turned_block=64, num_parts=count)
    layer = Int8Linear(weight, scale, linear.bias, turned_block=64)
    if is_int4:
        layer = Int4Linear(*to_int4(linear.weight), linear.bias)
    x = torch.randn(5, length)
    near(product(layer)(x), float_inputs(layer)(x), 0.02)
    x[:, 7], part = 1e5, slice(192, None)
    y, expected = product(layer)(x), float_inputs(layer)(x)
    x[:, part] = 0
    without, expected_without = product(layer)(x), float_inputs(layer)(x)
    near(y - without, expected - expected_without, 0.02)  # the other parts are as fine as before


def test_a_large_weight_is_computed_in_parts(monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(64, 100).requires_grad_(False)
    layer, x = Int8Linear(*to_int8(linear.weight), linear.bias), torch.randn(3, 64)
    together = product(layer)(x)
    monkeypatch.setattr("blip2.model.graphs.graph.LARGEST_WEIGHT", 64 * 7)
    assert torch.equal(product(layer)(x), together)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full")
@pytest.mark.parametrize("size", [3, 1 << 20])
def test_a_full_disk_says_what_is_needed(size):
    """A small constant is written when the file is closed."""
    file = ModelFile()
    file._file.close()
    file._file = open("/dev/full", "wb")  # noqa: SIM115
    signature = file.signature("one")
    with pytest.raises(UserError, match=r"\(No space left on device\).*TMPDIR"):
        signature.output("y", signature.add(signature.input("x", size), signature.constant(torch.zeros(size))))
        file.runtime()


def test_the_library_says_nothing_of_its_own(tmp_path):
    """It tells of accelerators that it looks for, whatever one sets, to the end of the process."""
    code = (
        "import torch, sys; from torch import nn\n"
        "from blip2.model.graphs.graph import ModelFile; from blip2.model.graphs.taking_over import Product\n"
        "from blip2.model.quantized import Int8Linear, to_int8\n"
        "file = ModelFile(); layer = Product(Int8Linear(*to_int8(torch.ones(4, 16)), None), file.signature('one'))\n"
        "layer.runtime = file.runtime(); print(float(layer(torch.ones(1, 16))[0, 0])); sys.stderr.write('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert abs(float(done.stdout) - 16) < 0.2 and done.stderr == "heard"


def test_a_single_thread_that_was_asked_for_stays():
    before = torch.get_num_threads()
    try:
        for asked in (2, 1, 3):
            torch.set_num_threads(asked)
            with one_thread(), one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == asked
    finally:
        torch.set_num_threads(before)
