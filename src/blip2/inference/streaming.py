"""Text while it is made: the language model runs in a thread, its tokens come out as whole characters.

A character may take several tokens; half of one decodes to U+FFFD, so what ends in it is held back. Spaces at the ends
are held back as well: the pieces joined are exactly the text that is given when nothing is streamed.
"""

import queue
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_END = object()


class TokenStream:
    """Receives tokens from `generate` (its `streamer` and `stop` arguments) and gives pieces of text.

    Args:
        decode: token ids (1, T) -> the text of each row.
    """

    def __init__(self, decode: Callable[[Tensor], list[str]]) -> None:
        self._decode = decode
        self._pieces: queue.Queue = queue.Queue()
        self._tokens: list[int] = []
        self._is_prompt = True  # generate puts the prompt first
        self._num_shown = 0
        self._is_abandoned = threading.Event()

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with every new token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens.extend(value.flatten().tolist())
        text = self._text()
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Called by `generate` after the last token."""
        self._show(self._text())

    def stop(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """A stopping criterion: true for all rows once nobody reads any more."""
        return torch.full((input_ids.shape[0],), self._is_abandoned.is_set(), device=input_ids.device)

    def read(self, generate: Callable[[], object]) -> Iterator[str]:
        """Runs `generate` in a thread and yields its text; raises here what it raises there."""
        thread = threading.Thread(target=self._run, args=(generate,), daemon=True)
        thread.start()
        try:
            while (piece := self._pieces.get()) is not _END:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self._is_abandoned.set()
            thread.join()

    def _run(self, generate: Callable[[], object]) -> None:
        try:
            generate()
        except BaseException as error:  # handed over to the reader, who raises it
            self._pieces.put(error)
        self._pieces.put(_END)

    def _text(self) -> str:
        return self._decode(torch.tensor([self._tokens], dtype=torch.long))[0] if self._tokens else ""

    def _show(self, text: str) -> None:
        if len(text) > self._num_shown:
            self._pieces.put(text[self._num_shown :])
            self._num_shown = len(text)
