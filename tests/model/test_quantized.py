"""Layers of few bits give what their rounded weights give, near what the whole weights gave."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from blip2.errors import UserError
from blip2.model.quantized import (
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    num_parts,
    quantize,
    to_int4,
    to_int8,
    turn_back,
)
from blip2.model.rotation import block_of, turned

OPT = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 64}


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(128, 48).requires_grad_(False)


def four_bits(layer):
    """The weight that a four-bit layer stands for, of its stored numbers."""
    q = torch.stack([layer.packed & 15, layer.packed >> 4], dim=2).flatten(1).float()  # (N, K)
    scale, zero = layer.scale_and_zero.float().unbind(dim=2)  # (K / G, N)
    groups = q.unflatten(1, (-1, layer.group_size))
    return ((groups - 8) * scale.t()[..., None] + zero.t()[..., None]).flatten(1)


def test_int8_rounds_weights_to_a_127th_of_their_rows_largest(linear):
    weight, scale = to_int8(linear.weight)
    assert torch.equal(weight.abs().amax(dim=1), torch.full((48,), 127, dtype=torch.int8))
    assert ((weight * scale[:, None] - linear.weight).abs() <= scale[:, None] / 2 + 1e-7).all()


def test_an_int8_layer_computes_with_its_rounded_weights(linear):
    x = torch.randn(2, 5, 128)
    weight, scale = to_int8(linear.weight)
    expected = nn.functional.linear(x, weight * scale[:, None], linear.bias)
    layer = Int8Linear(weight, scale, linear.bias)
    assert (layer(x) - expected).abs().max() < 0.01 * expected.abs().max()
    assert (layer(x) - linear(x)).abs().max() < 0.02 * linear(x).abs().max()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_an_int4_layer_computes_with_the_weights_it_stores(linear, group_size):
    layer = Int4Linear(*to_int4(linear.weight, group_size), linear.bias)
    weight = four_bits(layer)
    x = torch.randn(2, 5, 128)
    expected = nn.functional.linear(x.bfloat16().float(), weight, linear.bias)
    assert (layer(x) - expected).abs().max() < 0.01 * expected.abs().max()  # its sums are bfloat16
    assert (weight - linear.weight).square().mean() < 0.0045 * linear.weight.square().mean()
    assert layer.packed.numel() == 0, "the stored weights are let go once they are laid out"


def test_turned_weights_compute_with_turned_inputs(linear):
    stored = to_int4(linear.weight, 64, turned_block=32)
    layer = Int4Linear(*stored, linear.bias, turned_block=32)
    assert not layer.scale_and_zero[..., 1].any(), "there is no zero to be added"
    weight = turned(layer.dequantized(0, 48), 32)
    assert torch.equal(four_bits(layer), layer.dequantized(0, 48))
    assert (weight - linear.weight).square().mean() < 0.012 * linear.weight.square().mean()
    x = torch.randn(2, 5, 128)
    expected = nn.functional.linear(x, weight, linear.bias)
    assert (layer(x) - expected).abs().max() < 0.02 * expected.abs().max()


def test_parts_of_a_row_have_scales_of_their_own():
    torch.manual_seed(0)
    linear = nn.Linear(384, 48).requires_grad_(False)
    weight, scale = to_int8(linear.weight, turned_block=64, num_parts=2)
    assert scale.shape == (48, 2)
    assert (weight.abs().unflatten(1, (2, 192)).amax(dim=2) == 127).all()
    layer, x = Int8Linear(weight, scale, linear.bias, turned_block=64), torch.randn(2, 5, 384)
    stored = turned(layer.dequantized(0, 48), 64)
    expected = nn.functional.linear(x, stored, linear.bias)
    assert (layer(x) - expected).abs().max() < 0.01 * expected.abs().max()
    words = Int8Embedding(weight, scale, torch.float32, turned_block=64)
    assert words.is_of(layer) and torch.allclose(words(torch.tensor([[3, 7]])), stored[None, [3, 7]], atol=1e-6)
    layer.turn_back()
    assert layer.scale.shape == (48,) and layer.turned_block == 0
    assert (layer(x) - expected).abs().max() < 0.02 * expected.abs().max()


def test_large_language_models_have_one_scale_a_row():
    assert [num_parts(width) for width in (64, 384, 576, 1536, 2048, 2560, 10240)] == [1, 2, 3, 8, 1, 1, 1]


def test_a_language_model_whose_weights_are_turned_back_says_nearly_the_same():
    """As on a GPU, whose kernels take inputs as they are."""
    torch.manual_seed(0)
    network = OPTForCausalLM(OPTConfig(vocab_size=80, **OPT)).eval().requires_grad_(False)
    ids = torch.arange(12)[None]
    before = network(ids).logits
    quantize(network, "int8")
    assert network.lm_head.turned_block == network.get_input_embeddings().turned_block == 64
    turn_back(network)
    assert network.lm_head.turned_block == network.get_input_embeddings().turned_block == 0
    assert network.get_input_embeddings().weight is network.lm_head.weight
    after = network(ids).logits
    assert (after - before).square().mean() < 0.001 * before.square().mean()


def test_turning_keeps_products_and_undoes_itself():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 96), torch.randn(5, 96)
    for block in (1, 2, 32):
        torch.testing.assert_close(turned(x, block) @ turned(weight, block).t(), x @ weight.t())
        torch.testing.assert_close(turned(turned(x, block), block), x)
    assert [block_of(width) for width in (96, 2560, 7, 36)] == [32, 64, 1, 4]
    one = torch.zeros(1, 64)
    one[0, 5] = 8
    assert torch.equal(turned(one, 64).abs(), torch.ones(1, 64)), "what stands out is spread evenly"


def test_more_rows_than_are_laid_out_at_once_give_the_same():
    torch.manual_seed(0)
    weight, x = torch.randn(1008, 64), torch.randn(3, 64)
    whole = Int4Linear(*to_int4(weight), None)
    stored = four_bits(whole)
    y = whole(x)
    assert (y - x.bfloat16().float() @ stored.t()).abs().max() < 0.01 * y.abs().max()
    parts = [Int4Linear(*to_int4(rows), None)(x) for rows in weight.split(240)]
    assert torch.equal(torch.cat(parts, dim=1), y)


def test_narrowed_ranges_lose_less_where_few_weights_stand_out():
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    low, high = weight.aminmax(dim=1)
    step = ((high - low) / 15)[:, None]
    whole_range = ((weight - low[:, None]) / step).round() * step + low[:, None]
    layer = Int4Linear(*to_int4(weight, 128), None)
    assert (four_bits(layer) - weight).square().mean() < 0.95 * (whole_range - weight).square().mean()


def test_a_gradient_is_refused_instead_of_lost(linear):
    x = torch.randn(1, 128, requires_grad=True)
    for layer in (Int8Linear(*to_int8(linear.weight), None), Int4Linear(*to_int4(linear.weight), None)):
        with pytest.raises(UserError, match="no gradient"):
            layer(x)
        with torch.no_grad():
            layer(x)


def test_a_language_model_keeps_eight_bits_where_it_meets_words():
    torch.manual_seed(0)
    network = OPTForCausalLM(OPTConfig(vocab_size=80, **OPT)).eval().requires_grad_(False)
    assert quantize(network, "int4", group_size=32) == 7  # four of attention, two of the MLP, the logits
    head, words = network.lm_head, network.get_input_embeddings()
    assert isinstance(head, Int8Linear) and isinstance(words, Int8Embedding)
    assert words.weight.data_ptr() == head.weight.data_ptr()
    assert isinstance(network.model.decoder.layers[0].fc1, Int4Linear)


def test_a_width_that_the_four_bit_kernel_cannot_take_gets_eight():
    network = OPTForCausalLM(OPTConfig(vocab_size=80, **OPT | {"ffn_dim": 90})).requires_grad_(False)
    quantize(network, "int4", group_size=64)
    layer = network.model.decoder.layers[0]
    assert isinstance(layer.fc1, Int8Linear) and isinstance(layer.fc2, Int8Linear)
    assert isinstance(layer.self_attn.q_proj, Int4Linear)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_gpt2s_transposed_layers_are_taken_the_right_way_round(bits):
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=64, n_layer=2, n_head=4)).eval().requires_grad_(False)
    input_ids = torch.arange(12)[None]
    before = network(input_ids).logits
    quantize(network, bits)
    after = network(input_ids).logits
    assert (after - before).square().mean() < 0.02 * before.square().mean()
