"""Two steps of a transformer that keep less for the backward pass and compute the rest again there; and dropout.

    widened GELU and the map after it   keep the GELU's input, not its result (four times the width of a layer)
    attention with dropout              keep queries, keys, values and a byte a weight, not the weights (3 times 4)

What is computed again costs little beside the matrix products, and a machine without a GPU has little memory for large
batches. A GPU's fused attention does the same by itself. The results are those of the plain formulas.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """Dropout that keeps one byte an element also on a CPU, where PyTorch's own keeps four and draws more slowly."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        if not (self.training and self.p):
            return input
        if saves_memory(input.device):
            return _Dropout.apply(input, self.p)
        return torch.native_dropout(input, self.p, True)[0]


def draw_kept(shape: torch.Size, probability: float) -> tuple[Tensor, float]:
    """What dropout keeps, and by what it is multiplied, on a CPU.

    Sixteen random bits an element out of PyTorch's generator, which `bernoulli_` takes five times as long for.

    Args:
        shape: of the mask.
        probability: of being dropped, met to 1/131072.

    Returns:
        The mask, bool; and one over the share that is kept.
    """
    values = 2**16
    dropped = min(round(probability * values), values - 1)
    count = shape.numel()
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # None: to the very last one
    is_kept = drawn.view(torch.int16)[:count] >= dropped - values // 2
    return is_kept.view(shape), values / (values - dropped)


class _Dropout(torch.autograd.Function):
    """Keeps the mask alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, probability: float) -> Tensor:
        is_kept, ctx.scale = draw_kept(hidden.shape, probability)
        ctx.save_for_backward(is_kept)
        return (hidden * is_kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (is_kept,) = ctx.saved_tensors
        return (gradients[0] * is_kept).mul_(ctx.scale), None


def saves_memory(device: torch.device) -> bool:
    """Whether steps are to be computed again: while a CPU trains, and no compiler looks on."""
    return device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gelu_linear(wide: Tensor, linear: nn.Linear) -> Tensor:
    """linear(GELU(wide)), (..., F) -> (..., D)."""
    if saves_memory(wide.device) and (wide.requires_grad or linear.weight.requires_grad):
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
        mask: bool, broadcasting to (B, H, S, K), true = may attend; each query must see a key.
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
        shape = torch.Size([*query.shape[:-1], key.shape[2]])  # (B, H, S, K)
        is_kept, ctx.scale = draw_kept(shape, dropout)
        ctx.save_for_backward(query, key, value, mask, is_kept)
        ctx.runs = _runs(chosen)
        context = []
        for here, there in ctx.runs:
            weights = _weights(query[here], _rows(key, there), _masked(mask, here))
            context.append((weights.mul_(is_kept[here]) @ _rows(value, there)).mul_(ctx.scale))
        return context[0] if len(context) == 1 else torch.cat(context)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, mask, is_kept = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad = gradients[0] * ctx.scale
        grad_query = torch.empty_like(query)
        of_keys, of_values = [], []
        for here, there in ctx.runs:
            keys, queries = _rows(key, there), query[here] * scale
            weights = _weights(query[here], keys, _masked(mask, here))  # (b, H, S, K)
            grad_weights = (grad[here] @ _rows(value, there).transpose(-2, -1)).mul_(is_kept[here])
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_query[here] = (grad_scores @ keys).mul_(scale)
            of_keys.append(grad_scores.transpose(-2, -1) @ queries)
            of_values.append(weights.mul_(is_kept[here]).transpose(-2, -1) @ grad[here])
        read = [there for _, there in ctx.runs]
        return grad_query, _added(of_keys, read, key), _added(of_values, read, value), None, None, None


Rows = slice | Tensor  # of a batch: a slice costs no copy
WHOLE = slice(None)
SHORT = 4  # rows: shorter runs are not worth a product of their own


def _runs(chosen: Tensor | None) -> list[tuple[slice, Rows]]:
    """`chosen` in pieces: places in it, and the rows that they name, as a slice where these follow each other."""
    if chosen is None:
        return [(WHOLE, WHOLE)]
    ends = [*((chosen.diff() != 1).nonzero().flatten() + 1).tolist(), len(chosen)]
    runs: list[tuple[slice, Rows]] = []
    begin = scattered = 0  # of this run; of the rows before it that belong to no long one
    for end in ends:
        if end - begin >= SHORT:
            if scattered < begin:
                runs.append((slice(scattered, begin), chosen[scattered:begin]))
            first = int(chosen[begin])
            runs.append((slice(begin, end), slice(first, first + end - begin)))
            scattered = end
        begin = end
    if scattered < len(chosen):
        runs.append((slice(scattered, len(chosen)), chosen[scattered:]))
    return runs


def _rows(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _added(gradients: list[Tensor], read: list[Rows], tensor: Tensor) -> Tensor:
    """The gradient of `tensor` from those of its rows that were read."""
    if read[0] is WHOLE:
        return gradients[0]
    total = torch.zeros_like(tensor)
    for rows, gradient in zip(read, gradients, strict=True):
        if isinstance(rows, slice):
            total[rows] += gradient
        else:
            total.index_add_(0, rows, gradient)
    return total


def _masked(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of some of the queries' rows."""
    return mask if mask is None or mask.shape[0] == 1 or mask.ndim < 4 else mask[rows]


def _weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, H, S, K)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(dim=-1)
