"""Linear layers of what is not trained any more as oneDNN wants their weights, for float32 on an x86 processor.

PyTorch's own product lays the weights out again each time it is called with more than one row, or reads them slowly:
laid out once, two to 128 rows take half of the time, and more rows gain a tenth.
"""

from typing import Any

import torch
from torch import Tensor, nn

from blip2.model.low_bit_products import has_onednn
from blip2.model.quantized import refuse_gradient

ROWS = 8  # oneDNN is told to expect; others are as right


class PackedLinear(nn.Module):
    """A frozen linear layer of float32 in oneDNN's layout.

    Attributes:
        weight: (N, K) without memory, for whoever asks a layer for its shape or dtype.
        bias: (N,) or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._pack(layer.weight)
        self.weight = torch.empty_like(layer.weight, device="meta", requires_grad=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        refuse_gradient(x)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def unpacked(self) -> Tensor:
        """The weight (N, K) as it was, a copy."""
        return self._packed.to_dense()

    def _pack(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight = nn.Parameter(self.unpacked(), requires_grad=False)
        again = PackedLinear(plain)
        again.bias = None if self.bias is None else self.bias.clone()
        return again

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        weight = state_dict.pop(name, None)
        told = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *told)
        if weight is None:
            missing_keys.append(name)
        elif weight.shape != self.weight.shape:
            error_msgs.append(f"{name} has shape {tuple(weight.shape)} and should have {tuple(self.weight.shape)}.")
        else:
            self._pack(weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.unpacked()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def pack(network: Any) -> int:
    """Replaces a frozen network's linear layers, in place, where that makes it faster; nothing can be trained then.

    A matrix that is shared with the word embeddings is there twice afterwards.

    Args:
        network: a module with its weights in memory.

    Returns:
        How many layers were replaced.
    """
    if not has_onednn():
        return 0
    names = [name for name, layer in network.named_modules() if name and _gains(layer)]
    for name in names:  # one by one: what is replaced frees its memory
        network.set_submodule(name, PackedLinear(network.get_submodule(name)))
    return len(names)


def _gains(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
