"""Language-modelling losses of stage 2: over the text after the visual prompt, or after a random prefix of it."""

import torch
from torch import Tensor


def mean_over_tokens(token_losses: Tensor, target_mask: Tensor) -> Tensor:
    """Mean of (B, T) token losses over the real target tokens of the whole batch."""
    return token_losses.sum() / target_mask.sum()


def prefix_lengths(lengths: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Where to split captions for prefix language modelling: uniform from 1 to the middle (the authors' rule).

    Args:
        lengths: (B,) words or tokens of each caption, at least 2 for a split; shorter ones get prefix 0.

    Returns:
        (B,) prefix lengths in [1, lengths // 2], 0 where the caption cannot be split.
    """
    draws = torch.rand(lengths.shape, generator=generator, device=lengths.device)
    half = lengths // 2
    return torch.where(half >= 1, 1 + (draws * half).long().clamp(max=half - 1), torch.zeros_like(lengths))
