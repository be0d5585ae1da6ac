"""What is computed again in the backward pass gives the values and gradients of the plain formulas, and keeps less."""

import pytest
import torch
from torch.nn import functional as F

from blip2.model.recomputed import Dropout, attend_again, draw_kept, gelu_linear

HEADS, WIDTH, PROBABILITY = 3, 5, 0.4


def gradients(result, *inputs):
    """Of a sum with fixed weights, so that no gradient is the same everywhere."""
    weights = torch.linspace(-1, 1, result.numel()).reshape(result.shape)
    return torch.autograd.grad((result * weights).sum(), inputs)


def kept_bytes(function):
    """What autograd saves of a function's forward pass, each tensor once."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.update({tensor.data_ptr(): tensor.numel() * tensor.element_size()}) or tensor,
        lambda tensor: tensor,
    ):
        result = function()
    assert result.requires_grad
    return sum(sizes.values())


def plain_attention(query, key, value, mask, is_kept, scale):
    """By the formula, with the weights that dropout kept given."""
    scores = query @ key.transpose(-2, -1) / WIDTH**0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights * is_kept * scale) @ value


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_gelu_and_its_map_are_the_plain_ones(shape):
    wide = torch.randn(shape, requires_grad=True)
    linear = torch.nn.Linear(6, 4)
    inputs = (wide, linear.weight, linear.bias)
    plain, ours = linear(F.gelu(wide)), gelu_linear(wide, linear)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(gradients(ours, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_gelu_and_its_map_keep_the_wide_input_alone():
    wide, linear = torch.randn(64, 6, requires_grad=True), torch.nn.Linear(6, 4)
    plain = kept_bytes(lambda: linear(F.gelu(wide)))
    assert plain - kept_bytes(lambda: gelu_linear(wide, linear)) == wide.numel() * 4


OWN, NEGATIVE = list(range(6)), [3, 3, 0, 5, 1, 0]
CHOSEN = {
    "the rows themselves": None,
    "as ITM chooses": OWN + NEGATIVE + OWN,
    "rows that follow each other": [1, 2, 3, 4, 5],
    "scattered": [5, 1, 3, 3],
    "all the rows, named": OWN,
    "begins and ends scattered": [4, 2, *OWN, 1, 1],
}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("masked", ["for each row", "for all", "not"])
def test_attention_is_the_plain_one_with_the_same_weights_dropped(name, masked):
    held, asking, keys = len(OWN), 3, 8
    chosen = None if CHOSEN[name] is None else torch.tensor(CHOSEN[name])
    rows = held if chosen is None else len(chosen)
    query = torch.randn(rows, HEADS, asking, WIDTH, requires_grad=True)
    key, value = (torch.randn(held, HEADS, keys, WIDTH, requires_grad=True) for _ in range(2))
    mask = torch.rand(*((1,) if masked == "for all" else (rows, 1)), asking, keys) < 0.7
    mask[..., 0] = True
    mask = torch.ones_like(mask) if masked == "not" else mask
    torch.manual_seed(3)
    ours = attend_again(query, key, value, chosen, None if masked == "not" else mask, PROBABILITY)
    torch.manual_seed(3)
    is_kept, scale = draw_kept(torch.Size([rows, HEADS, asking, keys]), PROBABILITY)
    picked = (key, value) if chosen is None else (key[chosen], value[chosen])
    plain = plain_attention(query, *picked, mask, is_kept, scale)
    torch.testing.assert_close(ours, plain)
    inputs = (query, key, value)
    for one, other in zip(gradients(ours, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("probability", [0.1, 0.5, 1 / 65_536, 0.999])
def test_what_is_dropped_is_drawn_by_the_probability_and_repeats_by_the_seed(probability):
    shape = torch.Size([1001, 999])
    torch.manual_seed(1)
    is_kept, scale = draw_kept(shape, probability)
    kept = 1 - probability
    assert is_kept.shape == shape and scale == pytest.approx(1 / kept, rel=1e-2)
    spread = (probability * kept / shape.numel()) ** 0.5
    assert is_kept.float().mean(dtype=torch.float64).item() == pytest.approx(kept, abs=5 * spread + 1e-5)
    assert not torch.equal(draw_kept(shape, probability)[0], is_kept)
    torch.manual_seed(1)
    assert torch.equal(draw_kept(shape, probability)[0], is_kept)


def test_neighbours_are_dropped_by_themselves():
    is_kept = draw_kept(torch.Size([400_000]), 0.5)[0].double() - 0.5
    for distance in range(1, 9):  # four elements share a number of 64 bits
        assert (is_kept[:-distance] * is_kept[distance:]).mean().abs() < 0.25 * 5 / 400_000**0.5


def test_dropout_keeps_its_share_scaled_and_a_byte_an_element():
    dropout, hidden = Dropout(PROBABILITY), torch.ones(100, 100, requires_grad=True)
    out = dropout(hidden)
    assert out.detach().unique().tolist() == pytest.approx([0, 1 / (1 - PROBABILITY)], rel=1e-4)
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert kept_bytes(lambda: dropout(hidden)) == hidden.numel()
    assert dropout.eval()(hidden) is hidden
