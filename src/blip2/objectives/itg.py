"""Image-grounded text generation: next-token cross-entropy of the caption after the queries (paper, section 3.1)."""

from torch import Tensor
from torch.nn import functional as F


def caption_inputs(input_ids: Tensor, bos_id: int) -> Tensor:
    """The caption as the decoder reads it: its first token ([CLS]) replaced by [DEC]. (B, T) -> (B, T)."""
    replaced = input_ids.clone()
    replaced[:, 0] = bos_id
    return replaced


def itg_loss(logits: Tensor, targets: Tensor, count: Tensor | None = None, *, label_smoothing: float = 0.1) -> Tensor:
    """Mean cross-entropy over real tokens.

    Args:
        logits: (M, V), the predictions of M tokens.
        targets: (M,), the tokens.
        count: divides the sum; None: M.
        label_smoothing: LAVIS uses 0.1.
    """
    if count is None:
        return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing, reduction="sum") / count
