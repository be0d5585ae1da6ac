"""What is computed again in the backward pass gives the values and gradients of the plain formulas, and keeps less."""

import pytest
import torch
from torch.nn import functional as F

from blip2.model.recomputed import Dropout, attend_again, gelu_linear

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


def plain_attention(query, key, value, mask, is_kept):
    """By the formula, with the weights that dropout kept given."""
    scores = query @ key.transpose(-2, -1) / WIDTH**0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights * is_kept / (1 - PROBABILITY)) @ value


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


@pytest.mark.parametrize("chosen", [None, torch.tensor([1, 0, 1, 1])])
def test_attention_is_the_plain_one_with_the_same_weights_dropped(chosen):
    rows, asking, keys = 4, 6, 8
    query = torch.randn(rows, HEADS, asking, WIDTH, requires_grad=True)
    held = rows if chosen is None else 2
    key, value = (torch.randn(held, HEADS, keys, WIDTH, requires_grad=True) for _ in range(2))
    mask = torch.rand(rows, 1, asking, keys) < 0.7
    mask[..., 0] = True
    torch.manual_seed(3)
    ours = attend_again(query, key, value, chosen, mask, PROBABILITY)
    torch.manual_seed(3)
    is_kept = torch.native_dropout(torch.ones(rows, HEADS, asking, keys), PROBABILITY, True)[1]
    assert 0.3 < is_kept.float().mean() < 0.9
    picked = (key, value) if chosen is None else (key[chosen], value[chosen])
    plain = plain_attention(query, *picked, mask, is_kept)
    torch.testing.assert_close(ours, plain)
    inputs = (query, key, value)
    for one, other in zip(gradients(ours, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_dropout_keeps_its_share_scaled_and_a_byte_an_element():
    dropout, hidden = Dropout(PROBABILITY), torch.ones(100, 100, requires_grad=True)
    out = dropout(hidden)
    assert out.detach().unique().tolist() == pytest.approx([0, 1 / (1 - PROBABILITY)])
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert kept_bytes(lambda: dropout(hidden)) == hidden.numel()
    assert dropout.eval()(hidden) is hidden
