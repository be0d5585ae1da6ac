"""Who may attend to whom in the Q-Former's self-attention (paper, figure 2, right).

          ITC: apart           ITM: together        ITG: text after queries
          q q t t t            q q t t t            q q t t t
     q    x x . . .       q    x x x x x       q    x x . . .
     q    x x . . .       q    x x x x x       q    x x . . .
     t    . . x x x       t    x x x x x       t    x x x . .
     t    . . x x x       t    x x x x x       t    x x x x .
     t    . . x x x       t    x x x x x       t    x x x x x

True = may attend. Keys that are padding are closed to everyone. The model itself never builds the first and third mask:
they fall apart into smaller passes (see qformer.py); these functions state what those passes must equal.
"""

import torch
from torch import Tensor


def apart_mask(num_queries: int, text_is_real: Tensor) -> Tensor:
    """ITC: queries see queries, text sees text.

    Args:
        text_is_real: (B, T), true where a token is no padding.

    Returns:
        (B, 1, Q+T, Q+T) bool.
    """
    is_text = _is_text(num_queries, text_is_real)
    same_side = is_text[:, None] == is_text[None, :]
    return same_side & together_mask(num_queries, text_is_real)


def together_mask(num_queries: int, text_is_real: Tensor) -> Tensor:
    """ITM: all see all. Shapes as in `apart_mask`, but (B, 1, 1, Q+T): every row is the same."""
    queries_are_real = text_is_real.new_ones(text_is_real.shape[0], num_queries, dtype=torch.bool)
    return torch.cat([queries_are_real, text_is_real.bool()], dim=1)[:, None, None]  # (B, 1, 1, Q+T)


def text_after_queries_mask(num_queries: int, text_is_real: Tensor) -> Tensor:
    """ITG: queries see queries, a text token sees all queries and the text up to itself. Shapes as in `apart_mask`."""
    is_text = _is_text(num_queries, text_is_real)
    length = is_text.shape[0]
    earlier = torch.ones(length, length, dtype=torch.bool, device=text_is_real.device).tril()
    key_is_query = ~is_text[None, :]
    return (key_is_query | (is_text[:, None] & earlier)) & together_mask(num_queries, text_is_real)


def continuation_mask(num_past: int, length: int, device: torch.device) -> Tensor:
    """The ITG mask's text rows, for a pass that feeds text only and finds the queries' keys and values in the past.

    Right padding needs no closing: no real token comes after it.

    Returns:
        (T, past+T) bool.
    """
    earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    past = torch.ones(length, num_past, dtype=torch.bool, device=device)
    return torch.cat([past, earlier], dim=1)


def _is_text(num_queries: int, text_is_real: Tensor) -> Tensor:
    return torch.arange(num_queries + text_is_real.shape[1], device=text_is_real.device) >= num_queries  # (Q+T,)
