"""Texts from the engine's thread to the event loop: pieces as they come, cut at stop strings, checked by the filter."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

from blip2.inference.engine import Delivery, Reply
from blip2.inference.safety import Filter

FinishReason = Literal["stop", "length", "content_filter"]


class WrittenText:
    """One text while it is written.

    Attributes:
        finish_reason: why it ended, as OpenAI names it; "stop" until then.
        num_tokens: how many were written.
    """

    def __init__(self) -> None:
        """Made in the event loop; `start` is called in another thread."""
        self.finish_reason: FinishReason = "stop"
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._reply: Reply | None = None
        self._is_cancelled = False

    def start(self, submit: Callable[[Delivery], Reply]) -> None:
        """Submits a request to the engine, told where the pieces go; raises what it raises. Not after `cancel`."""
        if self._is_cancelled:
            return

        def deliver(piece: str | BaseException | None) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

        self._reply = submit(deliver)
        if self._is_cancelled:  # in the meantime
            self._reply.cancel()

    @property
    def num_tokens(self) -> int:
        """How many tokens were written."""
        return self._reply.num_tokens if self._reply is not None else 0

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._is_cancelled = True
        if self._reply is not None:
            self._reply.cancel()

    async def pieces(self, stops: Sequence[str], judge: Filter | None) -> AsyncIterator[str]:
        """The text piece by piece, up to the first of `stops` and as far as `judge` lets it.

        What may be the beginning of a stop string waits, and with a judge the last word until it is whole.
        """
        text, num_given = "", 0
        try:
            while True:
                piece = await self._queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                is_end = piece is None
                text += piece or ""
                places = [place for stop in stops if (place := text.find(stop)) >= 0]
                is_stopped = bool(places)
                if is_stopped:
                    text = text[: min(places)]
                ready = len(text) if is_end or is_stopped else len(text) - _num_waiting(text, stops)
                if judge is not None:
                    ready = ready if is_end or is_stopped else _whole_words(text[:ready])
                    if await asyncio.to_thread(judge.refuses_reply, text[:ready]):
                        self.finish_reason = "content_filter"
                        return
                if ready > num_given:
                    yield text[num_given:ready]
                    num_given = ready
                if is_stopped:
                    return
                if is_end:
                    assert self._reply is not None
                    self.finish_reason = "length" if self._reply.reason == "length" else "stop"
                    return
        finally:
            self.cancel()

    async def whole(self, stops: Sequence[str], judge: Filter | None) -> str:
        """The same as one string."""
        return "".join([piece async for piece in self.pieces(stops, judge)])


def _num_waiting(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


def _whole_words(text: str) -> int:
    """How much of `text` is whole words: up to the last space."""
    return next((i for i in range(len(text) - 1, -1, -1) if text[i].isspace()), 0)
