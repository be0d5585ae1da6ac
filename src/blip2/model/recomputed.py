"""Two steps of a transformer that keep less for the backward pass and compute the rest again there; and dropout.

    widened GELU and the map after it   keep the GELU's input, not its result (four times the width of a layer)
    attention with dropout              keep queries, keys, values and a byte a weight, not the weights (3 times 4)

On a CPU training is bound by memory, and what is computed again costs little beside the matrix products. A GPU's fused
attention does the same by itself. The results are those of the plain formulas.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """Dropout that keeps one byte an element also on a CPU, where PyTorch's own keeps four."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return torch.native_dropout(input, self.p, True)[0] if self.training and self.p else input


def saves_memory(device: torch.device) -> bool:
    """Whether steps are to be computed again: while a CPU trains, and no compiler looks on."""
    return device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gelu_linear(wide: Tensor, linear: nn.Linear) -> Tensor:
    """linear(GELU(wide)), (..., F) -> (..., D)."""
    if saves_memory(wide.device):
        return _GeluLinear.apply(wide, linear.weight, linear.bias)
    return linear(F.gelu(wide))


class _GeluLinear(torch.autograd.Function):
    """Keeps `wide` alone."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, wide: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(wide, weight)
        return F.linear(F.gelu(wide), weight, bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = gradients
        wide, weight = ctx.saved_tensors
        wants_wide, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (M, D)
        grad_wide = torch.ops.aten.gelu_backward(grad @ weight, wide) if wants_wide else None
        grad_weight = rows.T @ F.gelu(wide).flatten(0, -2) if wants_weight else None
        return grad_wide, grad_weight, rows.sum(dim=0) if wants_bias else None


def attend_again(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor | None, mask: Tensor | None, dropout: float
) -> Tensor:
    """softmax(q k / sqrt(d)) v with dropout of the weights; float32, (B, H, S, D/H). All three have gradients.

    Args:
        query: (B, H, S, D/H).
        key, value: (B, H, K, D/H), or (A, H, K, D/H) of which `chosen` (B,) names a row for each of the queries'.
        mask: bool, broadcasting to (B, H, S, K), true = may attend.
        dropout: probability.
    """
    return _Attention.apply(query, key, value, chosen, mask, dropout)


class _Attention(torch.autograd.Function):
    """Keeps its inputs, and which weights were dropped."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor | None, mask: Tensor | None, dropout: float
    ) -> Tensor:
        weights = _weights(query, _rows(key, chosen), mask)
        kept_weights, is_kept = torch.native_dropout(weights, dropout, True)
        ctx.save_for_backward(query, key, value, chosen, mask, is_kept)
        ctx.scale = 1 / (1 - dropout)
        return kept_weights @ _rows(value, chosen)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (grad,) = gradients
        query, key, value, chosen, mask, is_kept = ctx.saved_tensors
        keys = _rows(key, chosen)
        weights = _weights(query, keys, mask)  # (B, H, S, K)
        grad_weights = (grad @ _rows(value, chosen).transpose(-2, -1)).mul_(is_kept).mul_(ctx.scale)
        grad_value = (weights * is_kept).mul_(ctx.scale).transpose(-2, -1) @ grad
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores *= query.shape[-1] ** -0.5
        grad_query, grad_key = grad_scores @ keys, grad_scores.transpose(-2, -1) @ query
        return grad_query, _added(grad_key, key, chosen), _added(grad_value, value, chosen), None, None, None


def _rows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    return tensor if chosen is None else tensor.index_select(0, chosen)


def _added(grad: Tensor, tensor: Tensor, chosen: Tensor | None) -> Tensor:
    """The gradient of `tensor` from that of its chosen rows."""
    return grad if chosen is None else torch.zeros_like(tensor).index_add_(0, chosen, grad)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, H, S, K)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(dim=-1)
