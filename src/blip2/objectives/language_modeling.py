"""Language-modelling losses of stage 2: over the text after the visual prompt, or after a random prefix of it."""

from torch import Tensor


def mean_over_tokens(token_losses: Tensor, target_mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean of (B, T) token losses over the real target tokens of the whole batch; `count` divides instead if given."""
    return token_losses.sum() / (target_mask.sum() if count is None else count)


def split_caption(caption: str, draw: float) -> tuple[str, str]:
    """Prefix and suffix for prefix language modelling: split after word 1 to the middle word (the authors' rule).

    Args:
        caption: of any number of words; one of fewer than two is all suffix.
        draw: uniform in [0, 1), chooses among the places.

    Returns:
        Prefix and suffix, which joined by a space give the caption's words.
    """
    words = caption.split()
    places = len(words) // 2
    split = 1 + int(draw * places) if places else 0
    return " ".join(words[:split]), " ".join(words[split:])
