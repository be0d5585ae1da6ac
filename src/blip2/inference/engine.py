"""Many users, one model: their requests share batches, and nobody waits for another's text to end.

    submit (any thread) ─ waiting ─┬─ features, visual prompts and prompts of those taken together
                                   └─ join what is being written ─ a token each, a step ─ pieces to each reply

One thread has the model to itself. Between two steps new requests join, cancelled ones leave, and what else is to be
done with the model (`call`: vectors, matches, maps) is done.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from blip2.errors import Busy, Closing
from blip2.inference.blip2 import Blip2
from blip2.inference.pixels import resized
from blip2.inference.streaming import TextPieces
from blip2.model.reading import Reading
from blip2.model.writing import Decoding, Row, Writer, write
from blip2.preprocessing.images import ImageSource

MOST_ROWS = 32
Reason = Literal["stop", "length", "cancelled"]
Delivery = Callable[[str | BaseException | None], None]
Result = TypeVar("Result")


@dataclass
class _Request:
    """What is asked, read as far as that needs no model."""

    pixels: Tensor  # (S, S, 3), uint8
    prompt: str
    instruction: str
    decoding: Decoding
    reply: "Reply"


class Reply:
    """The text that a request gets, to be read once: in pieces as they are made (`for piece in reply`), or whole.

    Attributes:
        num_tokens: how many were written so far.
        reason: why it ended: the model came to an end ("stop"), the greatest length was reached ("length"), or nobody
            waited any more ("cancelled"); None until then.
    """

    def __init__(self, pieces: TextPieces, deliver: Delivery | None = None) -> None:
        self.num_tokens = 0
        self.reason: Reason | None = None
        self._pieces = pieces
        self._queue: SimpleQueue[str | BaseException | None] = SimpleQueue()  # None = the end
        self._deliver = deliver or self._queue.put
        self._is_cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        """Pieces of the text; raises what went wrong. Who leaves the loop early cancels the rest."""
        try:
            while (piece := self._queue.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.cancel()

    def text(self) -> str:
        """The whole text, once it is there; raises what went wrong."""
        return "".join(self)

    def cancel(self) -> None:
        """Nobody waits any more: the model stops before its next step. No effect on a text that has ended."""
        self._is_cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self._is_cancelled.is_set()

    def _add(self, token_ids: Sequence[int], reason: Reason | None) -> None:
        self.num_tokens = len(token_ids)
        if piece := self._pieces.after(token_ids, is_end=reason is not None):
            self._tell(piece)
        if reason is not None:
            self._end(reason)

    def _end(self, reason: Reason) -> None:
        self.reason = reason
        self._tell(None)

    def _fail(self, error: BaseException) -> None:
        self._tell(error)

    def _tell(self, what: str | BaseException | None) -> None:
        try:
            self._deliver(what)
        except Exception:  # whoever was to be told is gone, with his event loop
            self.cancel()


class Engine:
    """Runs the requests of many threads on one model; see the module's docstring.

    Args:
        model: with a generating part. Nobody else may use it meanwhile.
        max_rows: how many texts are written side by side; None: 32, or fewer where the LLM's keys and values are large.
        max_waiting: how many requests may wait besides; more are refused.

    Raises:
        MissingPart: the model cannot speak.
    """

    def __init__(self, model: Blip2, *, max_rows: int | None = None, max_waiting: int = 256) -> None:
        self.model = model
        self.generator = model.generator
        self.max_rows = min(MOST_ROWS, self.generator.rows_at_once) if max_rows is None else max_rows
        self.max_waiting = max_waiting
        self.num_steps = 0
        self._calls: deque[Callable[[], None]] = deque()
        self._waiting: deque[_Request] = deque()
        self._held: deque[tuple[_Request, Reading, Tensor]] = deque()  # read, but cannot join what is being written
        self._writing: dict[int, tuple[Row, Reply]] = {}
        self._writer = Writer(self.generator.language_model)
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_aborting = False
        self._thread = threading.Thread(target=self._run, name="blip2 engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """How many requests the model has not begun with."""
        return len(self._waiting) + len(self._calls)

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    @property
    def num_writing(self) -> int:
        """How many texts are being written."""
        return len(self._writing)

    def submit(
        self,
        image: ImageSource,
        prompt: str,
        instruction: str | None = None,
        *,
        decoding: Decoding | None = None,
        deliver: Delivery | None = None,
    ) -> Reply:
        """Asks for the text after a picture and a prompt; the picture is read in the caller's thread.

        Args:
            image: the picture.
            prompt: what the text continues.
            instruction: what an instruction-aware Q-Former reads; None: the prompt.
            decoding: see `inference.decoding`; None: greedy. With beams the reply comes in one piece, and of several
                sequences the one that the retrieval part finds most similar to the picture.
            deliver: called in the model's thread with every piece, then with None or with what went wrong, in place of
                the reply's own `text` and iteration. It must return at once.

        Raises:
            Busy: too many wait.
            Closing: the engine is closing.
            MissingPart: several sequences without the retrieval part.
            BadImage, MissingFile: the picture cannot be read.
        """
        self.refuse_if_full()
        decoding = decoding or Decoding()
        if decoding.num_return_sequences > 1:
            _ = self.model.retriever
        pixels = resized(image, self.model.transform)
        reply = Reply(TextPieces(self.generator.tokenizer.decode), deliver)
        told = prompt if instruction is None else instruction
        request = _Request(pixels, prompt, told, decoding, reply)
        with self._changed:
            self.refuse_if_full()
            self._waiting.append(request)
            self._changed.notify()
        return reply

    def call(self, work: Callable[[], Result]) -> Future[Result]:
        """Does `work` in the model's thread, between two steps; it may use the model.

        Raises:
            Busy: too many wait.
            Closing: the engine is closing.
        """
        future: Future[Result] = Future()

        def run() -> None:
            if self._is_aborting or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            try:
                with torch.inference_mode():
                    result = work()
            except BaseException as error:  # whatever it is, it belongs to whoever asked
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._changed:
            self.refuse_if_full()
            self._calls.append(run)
            self._changed.notify()
        return future

    def refuse_if_full(self) -> None:
        """Raises Busy where too many wait, Closing where the engine is closing."""
        if self._is_closing:
            raise Closing("The model is being shut down and takes no more requests.")
        if self.num_waiting >= self.max_waiting:
            raise Busy(f"{self.num_waiting} requests are waiting already. Try again in a few seconds.")

    def close(self, *, finish: bool = True) -> None:
        """Takes no more requests; returns when those taken are answered or, without `finish`, cancelled."""
        with self._changed:
            self._is_closing = True
            self._is_aborting = not finish
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        self.close(finish=error_type is None)

    # -- the thread that has the model ------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._has_work or self._is_closing):
                    self._changed.wait()
                if not self._has_work:
                    return
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
                room = self._room()
                taken = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            for run in calls:
                run()
            self._take(taken)
            self._join_held()
            self._step()

    def _room(self) -> int:
        """How many requests are read now. Rows read one by one cost twice to three times what they cost together, so a
        full engine waits until a quarter of its rows is free."""
        free = self.max_rows - len(self._writing) - len(self._held)
        is_worth_it = free >= self.max_rows / 4 or not (self._writing or self._held)
        return free if is_worth_it else 0

    @property
    def _has_work(self) -> bool:
        return bool(self._calls or self._waiting or self._held or self._writing)

    @torch.inference_mode()
    def _take(self, taken: list[_Request]) -> None:
        """Reads requests for the model, together; where that fails one by one, so that only what is at fault fails."""
        unanswered = [request for request in taken if request.reply.reason is None]
        wanted = [request for request in unanswered if not self._is_given_up(request.reply)]
        if not wanted:
            return
        try:
            self._read(wanted)
        except Exception as error:  # whatever it is, it belongs to whoever asked
            if len(wanted) == 1:
                wanted[0].reply._fail(error)
            else:
                for request in wanted:
                    self._take([request])

    def _is_given_up(self, reply: Reply) -> bool:
        given_up = reply.is_cancelled or self._is_aborting
        if given_up:
            reply._end("cancelled")
        return given_up

    def _read(self, requests: list[_Request]) -> None:
        generator = self.generator
        features = torch.stack(self.model.features_of(torch.stack([request.pixels for request in requests])))
        visual_prompts = generator.visual_prompt(features, [request.instruction for request in requests])
        plain = [i for i, request in enumerate(requests) if _is_one_row(request.decoding)]
        for i in (i for i in range(len(requests)) if i not in plain):
            self._search(requests[i], features[i : i + 1], visual_prompts[i : i + 1])
        if not plain:
            return
        prompts = generator.tokenizer.encode_prompts([requests[i].prompt for i in plain]).to(visual_prompts.device)
        reading, logits = generator.read(visual_prompts[plain], prompts)
        if self._writer.takes(reading):
            rows = self._writer.add(reading, logits, [requests[i].decoding for i in plain])
            replies = [requests[i].reply for i in plain]
            self._writing |= {id(row): (row, reply) for row, reply in zip(rows, replies, strict=True)}
        else:
            held: list[tuple[_Request, Reading, Tensor]] = []  # alone, each when nothing else is written
            for i in plain:
                prompt = generator.tokenizer.encode_prompts([requests[i].prompt]).to(visual_prompts.device)
                held.append((requests[i], *generator.read(visual_prompts[i : i + 1], prompt)))
            self._held += held  # all or none: where one fails, each is read again

    def _search(self, request: _Request, features: Tensor, visual_prompt: Tensor) -> None:
        prompt = self.generator.tokenizer.encode_prompts([request.prompt]).to(visual_prompt.device)
        started = self.generator.read(visual_prompt, prompt)
        found = write(self.generator.language_model, *started, request.decoding)  # (R, T)
        chosen = 0
        if len(found) > 1:
            texts = self.generator.tokenizer.decode(found)
            (best,) = self.model.retriever.best_fitting(features, [texts])
            chosen = texts.index(best)
        token_ids = self._until_stop(found[chosen].tolist())
        request.reply._add(token_ids, self._reason(token_ids, request.decoding))

    def _join_held(self) -> None:
        while self._held and self._writer.takes(self._held[0][1]):
            request, reading, logits = self._held.popleft()
            if not self._is_given_up(request.reply):
                (row,) = self._writer.add(reading, logits, [request.decoding])
                self._writing[id(row)] = (row, request.reply)

    @torch.inference_mode()
    def _step(self) -> None:
        for key, (row, reply) in list(self._writing.items()):
            if self._is_given_up(reply):
                row.is_cancelled = True
                del self._writing[key]
        try:
            written, ended = self._writer.step()
        except Exception as error:  # the model is at fault: everybody is told, and it starts afresh
            for _, reply in self._writing.values():
                reply._fail(error)
            self._writing.clear()
            self._writer = Writer(self.generator.language_model)
            return
        self.num_steps += bool(written)
        for row in written:
            _, reply = self._writing[id(row)]
            is_end = any(row is one for one in ended)
            try:
                reply._add(row.token_ids, self._reason(row.token_ids, row.decoding) if is_end else None)
            except Exception as error:  # tokens that cannot be read as text: theirs alone
                reply._fail(error)
                row.is_cancelled = is_end = True
            if is_end:
                del self._writing[id(row)]

    def _until_stop(self, token_ids: list[int]) -> list[int]:
        """Without the padding that a shorter text among several ends in."""
        ends = [i for i, token in enumerate(token_ids) if token in self.generator.language_model.stop_ids]
        return token_ids[: ends[0] + 1] if ends else token_ids

    def _reason(self, token_ids: Sequence[int], decoding: Decoding) -> Reason:
        stops = set(self.generator.language_model.stop_ids)
        return "stop" if stops & set(token_ids) or len(token_ids) < decoding.max_new_tokens else "length"


def _is_one_row(decoding: Decoding) -> bool:
    return decoding.num_beams == 1 and decoding.num_return_sequences == 1
