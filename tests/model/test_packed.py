"""Layers in oneDNN's layout are what they were, to whoever looks at their weights."""

import copy

import pytest
import torch
from torch import nn

from blip2.model.low_bit_products import has_onednn
from blip2.model.packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(not has_onednn(), reason="oneDNN has no kernel for this processor")


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False)).requires_grad_(False)


@pytest.fixture
def packed():
    made = network(0)
    assert pack(made) == 2
    return made


def test_results_are_those_of_the_layers(packed):
    for rows in (1, 7, 40):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(packed(x), network(0)(x), rtol=1e-5, atol=1e-5)


def test_weights_are_saved_and_loaded_as_those_of_plain_layers(packed):
    for name, weight in network(0).state_dict().items():
        torch.testing.assert_close(packed.state_dict()[name], weight, rtol=0, atol=0)
    other, x = network(1), torch.randn(3, 24)
    packed.load_state_dict(other.state_dict())
    torch.testing.assert_close(packed(x), other(x), rtol=1e-5, atol=1e-5)
    other.load_state_dict(packed.state_dict())


def test_weights_that_are_missing_or_misshapen_are_told_of(packed):
    state = network(1).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.weight"):
        packed.load_state_dict({name: weight for name, weight in state.items() if name != "2.weight"})
    with pytest.raises(RuntimeError, match=r"2\.weight has shape \(4, 4\)"):
        packed.load_state_dict(state | {"2.weight": torch.zeros(4, 4)})


def test_a_copy_stands_by_itself(packed):
    again, x = copy.deepcopy(packed), torch.randn(3, 24)
    assert isinstance(again[0], PackedLinear)
    packed.load_state_dict(network(1).state_dict())
    torch.testing.assert_close(again(x), network(0)(x), rtol=1e-5, atol=1e-5)
