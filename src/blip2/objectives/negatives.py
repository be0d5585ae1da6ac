"""Hard negatives for image-text matching, drawn from the ITC similarities (paper, section 3.1)."""

from typing import Literal

import torch
from torch import Tensor

NegativeRule = Literal["paper", "lavis-2023-02", "hardest"]


def draw_negatives(
    similarity: Tensor, is_positive: Tensor, rule: NegativeRule = "paper", chance: Tensor | None = None
) -> Tensor:
    """For each row, one column that is no positive.

    Args:
        similarity: (B, W), temperature-scaled.
        is_positive: (B, W) bool, never drawn.
        rule: "paper" draws from the softmax over the others; "lavis-2023-02" adds 1e-4 to the softmax over all and
            then closes the positives, as the code did when the released weights were most likely trained; "hardest"
            takes the most similar, for comparisons that must not depend on chance.
        chance: (B,) uniform in [0, 1), which decides what is drawn: the same for the same chance and weights, however
            the rows are dealt to ranks; None: drawn now.

    Returns:
        (B,) column numbers; -1 where a row has no negative at all.
    """
    with torch.no_grad():
        similarity = similarity.float()
        has_negative = (~is_positive).any(dim=1)
        closed = similarity.masked_fill(is_positive, float("-inf"))
        closed = torch.where(has_negative[:, None], closed, torch.zeros_like(closed))
        if rule == "hardest":
            drawn = closed.argmax(dim=1)
        else:
            weights = closed.softmax(dim=1)
            if rule == "lavis-2023-02":
                weights = (similarity.softmax(dim=1) + 1e-4).masked_fill(is_positive & has_negative[:, None], 0.0)
            drawn = _at(weights, torch.rand_like(weights[:, 0]) if chance is None else chance)
        return torch.where(has_negative, drawn, torch.full_like(drawn, -1))


def _at(weights: Tensor, chance: Tensor) -> Tensor:
    """For each row the column where the running sum of its weights (B, W) passes `chance` (B,) of their total."""
    reached = weights.double().cumsum(dim=1)
    wanted = chance.double()[:, None] * reached[:, -1:]  # (B, 1)
    return torch.searchsorted(reached, wanted, right=True).squeeze(1).clamp(max=weights.shape[1] - 1)
