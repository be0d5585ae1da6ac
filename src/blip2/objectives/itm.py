"""Image-text matching: does this text belong to this image? Two-class cross-entropy (paper, section 3.1)."""

from torch import Tensor
from torch.nn import functional as F

NO_MATCH, MATCH, IGNORED = 0, 1, -100


def itm_loss(logits: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (B', 2) against labels (B',): 1 = match, 0 = no match, -100 = left out.

    `count` divides the sum; None: the number of pairs that are not left out.
    """
    if count is None:
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / count
