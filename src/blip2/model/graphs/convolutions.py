"""EfficientNet-Lite's stages as one graph, for pictures of one size: it was published for LiteRT, whose padding it has.

PyTorch lays the weights of a convolution out again in each call. With AVX2 alone a picture takes two thirds of its
time here, and each of several a half (docs/decisions.md).
"""

from typing import Any

import torch
from torch import Tensor, nn

from blip2.model.efficientnet import GLOBAL_STAGE, LOCAL_STAGE, EfficientNetLite, SameConv2d
from blip2.model.graphs.attention import one_thread
from blip2.model.graphs.graph import ModelFile, Signature, schema

AT_ONCE = 4  # pictures: more take as long each, and their memory is kept
STAGES = LOCAL_STAGE, GLOBAL_STAGE


class Stages:
    """What the image features are made of, for pictures of one size.

    Args:
        network: in float32 on a CPU, with its batch norms folded; it stays as it is.
        size: side of the pictures.

    Raises:
        UserError: no room where temporary files go.
    """

    def __init__(self, network: EfficientNetLite, size: int) -> None:
        file = ModelFile()
        signature = file.signature("stages")
        x = _convolved(signature, signature.input("pixels", 3 * size**2, (-1, size, size, 3)), network.conv_stem)
        self._size = size
        self._shapes = []  # of each map, (h, w, C)
        blocks: list[Any] = list(network.blocks)
        for i, block in enumerate(blocks):
            inner = _convolved(signature, x, block.expand_conv) if block.expands else x
            inner = _convolved(signature, inner, block.depthwise_conv)
            out = _convolved(signature, inner, block.project_conv, bounded=False)
            x = signature.add(out, x) if block.is_residual else out
            if i in [network.stage_ends[stage] for stage in STAGES]:
                _, rows, columns, channels = signature.shape(x)
                self._shapes.append((rows, columns, channels))
                signature.output(f"map {i}", signature.reshape(x, (-1, rows * columns * channels)))
        self._runtime = file.runtime()

    @staticmethod
    def can_take(network: EfficientNetLite) -> bool:
        """Whether a network is one that can be written down."""
        weight = network.conv_stem.weight
        is_folded = not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
        return is_folded and weight.dtype == torch.float32 and weight.device.type == "cpu"

    def takes(self, pixel_values: Tensor) -> bool:
        """Whether pictures (B, 3, H, W) are of its size, in float32 on a CPU."""
        is_like = pixel_values.dtype == torch.float32 and pixel_values.device.type == "cpu"
        return is_like and len(pixel_values) > 0 and pixel_values.shape[-2:] == (self._size, self._size)

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps (B, C, h, w) of stages 5 and 7."""
        found = []
        with one_thread():
            for some in pixel_values.detach().permute(0, 2, 3, 1).flatten(1).split(AT_ONCE):
                found.append(self._runtime.run("stages", pixels=some))
        whole = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return [one.unflatten(1, shape).permute(0, 3, 1, 2) for one, shape in zip(whole, self._shapes, strict=True)]


def _convolved(signature: Signature, x: int, layer: SameConv2d, *, bounded: bool = True) -> int:
    """(B, h, w, C) through a convolution, whose result is bounded to 0..6 or not."""
    _, rows, columns, _ = signature.shape(x)
    stride, is_by_channel = layer.stride[0], layer.groups > 1
    weight = layer.weight.detach().permute((1, 2, 3, 0) if is_by_channel else (0, 2, 3, 1))
    shape = -1, -(-rows // stride), -(-columns // stride), layer.out_channels
    kinds = schema.ActivationFunctionType
    told = {"strideH": stride, "strideW": stride, "dilationHFactor": 1, "dilationWFactor": 1}
    told |= {"padding": schema.Padding.SAME, "fusedActivationFunction": kinds.RELU6 if bounded else kinds.NONE}
    if is_by_channel:
        told["depthMultiplier"] = 1
    assert layer.bias is not None, "a batch norm was folded into it"
    inputs = [x, signature.constant(weight), signature.constant(layer.bias)]
    return signature.step("DEPTHWISE_CONV_2D" if is_by_channel else "CONV_2D", inputs, shape, **told)
