"""The layers of a quantised image encoder, some in each signature: pictures are looked at one by one.

Inputs are rounded row by row without a turn, as `Int8Linear` does for image encoders; attention is in float32. Weights
are used once a picture, so their memory is let go of after each signature: ViT-g's take 50 MB and not 950.
"""

from typing import Any

import torch
from torch import Tensor, nn

from blip2.model.graphs.attention import Heads, refuse
from blip2.model.graphs.graph import ModelFile, Signature
from blip2.model.graphs.runtime import Runtime
from blip2.model.quantized import Int8Linear
from blip2.model.vision import encoder_layers

TAKEN = ("Blip2VisionModel", "InstructBlipVisionModel", "CLIPVisionModel", "SiglipVisionModel")
GELUS = {"gelu": False, "gelu_pytorch_tanh": True}  # whether by tanh
AT_ONCE = 50 << 20  # bytes of weights that a signature has, about
QUICK_GELU, QUICK = "quick_gelu", 1.702  # x times the logistic function of so much x


class TowerLayers(nn.Module):
    """All layers of a tower, in the place of one."""

    def __init__(self, runtime: Runtime, names: list[str]) -> None:
        super().__init__()
        self._runtime = runtime
        self._names = names

    def forward(self, hidden_states: Tensor, **unused: Any) -> Tensor:
        """(B, N, D) after the last layer."""
        refuse(hidden_states)
        if len(hidden_states) == 0:
            return hidden_states
        states = list(hidden_states.float())
        for name in self._names:
            states = [self._runtime.run(name, states=one)[0] for one in states]
            self._runtime.let_go()
        return torch.stack(states).to(hidden_states.dtype)


def take_over_tower(network: Any) -> bool:
    """Replaces the layers of a quantised image encoder, in place.

    Args:
        network: a Hugging Face tower.

    Returns:
        Whether it was; false for a tower that is not written down, and where not all linear layers are int8.
    """
    if type(network).__name__ not in TAKEN or network.config.hidden_act not in (*GELUS, QUICK_GELU):
        return False
    layers, config = encoder_layers(network), network.config
    linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear | Int8Linear)]
    if not linear or not all(isinstance(layer, Int8Linear) and layer.rounds_inputs for layer in linear):
        return False
    width = config.hidden_size // config.num_attention_heads
    heads = Heads(config.num_attention_heads, config.num_attention_heads, width, width**-0.5)
    del linear
    file, names, i = ModelFile(), [], 0
    while i < len(layers):
        names.append(f"from {i}")
        signature, begin = file.signature(names[-1]), file.num_bytes
        x = signature.input("states", config.hidden_size)
        while i < len(layers) and file.num_bytes < begin + AT_ONCE:
            x = _layer(signature, layers[i], x, heads, config.hidden_act)
            layers[i] = nn.Identity()
            i += 1
        signature.output("states", x)
    del layers[1:]
    layers[0] = TowerLayers(file.runtime(), names)
    return True


def _layer(signature: Signature, layer: Any, x: int, heads: Heads, activation: str) -> int:
    own, width = layer.self_attn, heads.num * heads.width
    if hasattr(own, "qkv"):
        layers, out = _split(own.qkv), own.projection
    else:
        layers, out = [own.q_proj, own.k_proj, own.v_proj], own.out_proj
    layers[0] = _times(layers[0], heads.scale)
    normed = signature.layer_norm(x, layer.layer_norm1)
    query, keys, values = (_in_heads(signature, signature.product(normed, one), heads) for one in layers)
    scores = signature.step("BATCH_MATMUL", [query, keys], (1, heads.num, -1, -1), adjY=True)
    weights = signature.step("SOFTMAX", [scores], (1, heads.num, -1, -1), beta=1.0)
    attended = signature.step("BATCH_MATMUL", [weights, values], (1, heads.num, -1, heads.width))
    together = signature.transpose(attended, (0, 2, 1, 3), (1, -1, heads.num, heads.width))
    x = signature.add(x, signature.product(signature.reshape(together, (-1, width)), out))
    wide = signature.product(signature.layer_norm(x, layer.layer_norm2), layer.mlp.fc1)
    if activation == QUICK_GELU:
        opened = signature.multiply(wide, signature.logistic(wide, QUICK))
    else:
        opened = signature.gelu(wide, by_tanh=GELUS[activation])
    return signature.add(x, signature.product(opened, layer.mlp.fc2))


def _in_heads(signature: Signature, x: int, heads: Heads) -> int:
    """(N, H * Dh) -> (1, H, N, Dh)."""
    apart = signature.reshape(x, (1, -1, heads.num, heads.width))
    return signature.transpose(apart, (0, 2, 1, 3), (1, heads.num, -1, heads.width))


def _split(layer: Int8Linear) -> list[Int8Linear]:
    """Queries', keys' and values' part of a layer that gives all three."""
    weights, scales = layer.weight.chunk(3), layer.scale.chunk(3)
    biases = (None, None, None) if layer.bias is None else layer.bias.chunk(3)
    return [Int8Linear(*one, rounds_inputs=True) for one in zip(weights, scales, biases, strict=True)]


def _times(layer: Int8Linear, factor: float) -> Int8Linear:
    """A layer that gives so much more."""
    bias = None if layer.bias is None else layer.bias * factor
    return Int8Linear(layer.weight, layer.scale * factor, bias, rounds_inputs=True)
