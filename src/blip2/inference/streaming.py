"""Text while it is made: tokens in, pieces of text out.

A character may take several tokens; half of one decodes to U+FFFD, so what ends in it is held back. Spaces at the ends
are held back as well: the pieces joined are exactly the text that is given when nothing is streamed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class TextPieces:
    """Turns growing token ids into pieces of text.

    Args:
        decode: token ids (1, T) -> the text of each row.
    """

    def __init__(self, decode: Callable[[Tensor], list[str]]) -> None:
        self._decode = decode
        self._num_shown = 0

    def after(self, token_ids: Sequence[int], *, is_end: bool) -> str:
        """What is new in the text of all tokens so far; empty where a character is not whole yet."""
        text = self._decode(torch.tensor([token_ids], dtype=torch.long))[0] if token_ids else ""
        if text.endswith("\ufffd") and not is_end:
            return ""
        piece = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return piece
