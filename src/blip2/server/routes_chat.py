"""POST /v1/chat/completions: OpenAI's chat, with pictures; whole or streamed."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from blip2.errors import UserError
from blip2.inference.decoding import DecodingOptions, make_candidates, make_decoding
from blip2.model.writing import Decoding
from blip2.server.dialogue import Prepared, Question, prepare, read_question
from blip2.server.documents import documented
from blip2.server.faults import Fault, fault_of
from blip2.server.schemas import ChatRequest
from blip2.server.service import Service, unless_gone
from blip2.server.texts import WrittenText

DEFAULT_TOKENS = 64  # of an answer, where the request names no number
LEAST_TEMPERATURE = 1e-3  # below that the likeliest words are taken, as at 0


def chat_routes(service: Service) -> APIRouter:
    """The route of chats."""
    router = APIRouter()

    @router.post("/v1/chat/completions", **documented(ChatRequest, "A chat about pictures"))
    async def chat_completions(request: Request) -> Response:
        with ExitStack() as place:
            place.enter_context(service.admitted(request))
            body = await service.read(request, ChatRequest)
            service.check_model(body.model)
            chat = Chat(service, body)
            place.callback(chat.cancel)  # whatever happens: texts that nobody gets are not written to their end
            await unless_gone(request, chat.start())
            if body.stream:
                return _Stream(chat, place.pop_all())
            return JSONResponse(await unless_gone(request, chat.whole()))

    return router


class Chat:
    """One request on its way: read, submitted, answered."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service = service
        self.body = body
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.settings.name,
        }
        self._stops = [body.stop] if isinstance(body.stop, str) else [stop for stop in body.stop or []]
        self._begin = time.perf_counter()
        self._texts = [WrittenText() for _ in range(body.n or 1)]
        self._num_read = 0
        self._notes: list[str] = []

    async def start(self) -> None:
        """Reads the conversation and gives it to the engine."""
        question = read_question(self.body.messages, self.service.settings)
        decoding = self._decoding(question)
        model = self.service.model

        def submit() -> Prepared:  # in one go: nobody waits between the two with a decoded picture in his hands
            settings = self.service.settings
            prepared = prepare(
                question,
                model.generator,
                model.settings.prompts,
                settings,
                max_new_tokens=decoding.max_new_tokens,
            )
            engine, asked = self.service.engine, (prepared.image, prepared.prompt, prepared.instruction)
            for text in self._texts:
                text.start(lambda deliver: engine.submit(*asked, decoding=decoding, deliver=deliver))
            return prepared

        prepared = await self.service.in_reader(submit)
        self._stops += [prepared.stop] if prepared.stop else []
        self._num_read, self._notes = prepared.num_tokens, prepared.warnings
        self.body.messages.clear()  # the pictures are not needed while the answer is written

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        for text in self._texts:
            text.cancel()

    def _decoding(self, question: Question) -> Decoding:
        body, limits = self.body, self.service.settings.limits
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            raise Fault(400, "max_tokens and max_completion_tokens differ. Give one of them.", param="max_tokens")
        if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
            raise Fault(400, "stream_options has no effect without stream. Leave it out.", param="stream_options")
        if "" in self._stops:
            raise Fault(400, "A stop text is empty.", param="stop")
        wanted = body.max_completion_tokens or body.max_tokens
        if wanted is not None and wanted > limits.max_tokens:
            raise Fault(400, f"At most {limits.max_tokens} tokens are written at once.", param="max_tokens")
        if (body.n or 1) > limits.choices:
            raise Fault(400, f"n is {body.n}; at most {limits.choices} answers are given.", param="n")
        most = wanted or min(DEFAULT_TOKENS, limits.max_tokens)
        options = DecodingOptions(max_new_tokens=most)
        if body.min_tokens is not None:
            if body.min_tokens > most:
                message = f"min_tokens is {body.min_tokens}, and at most {most} are written. Raise max_tokens."
                raise Fault(400, message, param="min_tokens")
            options["min_new_tokens"] = body.min_tokens
        if body.repetition_penalty is not None:
            options["repetition_penalty"] = body.repetition_penalty
        if self._is_by_chance:
            options |= {"sample": True, "temperature": body.temperature or 1.0, "top_p": body.top_p or 1.0}
        count = self._num_candidates(question)
        return make_candidates(options, count) if count > 1 else make_decoding(options)

    def _num_candidates(self, question: Question) -> int:
        """How many captions are made to choose from, where nobody says: 1 for what is no caption, for streams, which
        cannot wait, for words drawn by chance, and beside stop texts, for all would be written past them."""
        asked, limit = self.body.best_of, self.service.settings.limits.candidates
        if asked is None:
            if question.text or self.body.stream or self._is_by_chance or self._stops:
                return 1
            return min(self.service.model.settings.caption_best_of, limit) if self.service.model.can_match else 1
        if asked > 1 and (question.text or self.body.stream):
            raise UserError("best_of chooses among captions: leave it out of a stream and beside a question.")
        if asked > limit:
            raise Fault(400, f"best_of is {asked}; at most {limit} captions are made.", param="best_of")
        return asked

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        judge = self.service.settings.filter
        said = await asyncio.gather(*(text.whole(self._stops, judge) for text in self._texts))
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": text.finish_reason,
            }
            for i, (text, content) in enumerate(zip(self._texts, said, strict=True))
        ]
        return self._head | {"choices": choices, "usage": self._usage()} | self._warnings()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as OpenAI's chunks."""
        merged: asyncio.Queue[tuple[int, str | BaseException | None]] = asyncio.Queue()

        async def pass_on(number: int, text: WrittenText) -> None:
            try:
                async for piece in text.pieces(self._stops, self.service.settings.filter):
                    merged.put_nowait((number, piece))
                merged.put_nowait((number, None))
            except Exception as error:
                merged.put_nowait((number, error))

        tasks = [asyncio.create_task(pass_on(i, text)) for i, text in enumerate(self._texts)]
        try:
            for i in range(len(tasks)):
                yield self._chunk(i, {"role": "assistant", "content": ""})
            num_open, is_first = len(tasks), True
            while num_open:
                number, piece = await merged.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    num_open -= 1
                    chunk = self._chunk(number, {}, self._texts[number].finish_reason)
                    yield chunk if num_open else chunk | self._warnings()
                    continue
                if is_first:
                    self.service.metrics.first_piece.observe(time.perf_counter() - self._begin)
                    is_first = False
                yield self._chunk(number, {"content": piece})
            options = self.body.stream_options
            usage = self._usage()
            if options is not None and options.include_usage:
                yield self._head | {"choices": [], "usage": usage}
        finally:
            for task in tasks:
                task.cancel()

    def _chunk(self, number: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"choices": [choice]}

    def _usage(self) -> dict[str, int]:
        read, written = self._num_read, sum(text.num_tokens for text in self._texts)
        self.service.metrics.tokens.labels("read").inc(read)
        self.service.metrics.tokens.labels("written").inc(written)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _warnings(self) -> dict[str, list[str]]:
        warnings = list(self._notes)
        if self.body.seed is not None and self._is_by_chance:
            warnings.append("seed has no effect: requests share the model's steps, and so its chance.")
        return {"warnings": warnings} if warnings else {}

    @property
    def _is_by_chance(self) -> bool:
        temperature, top_p = self.body.temperature, self.body.top_p
        return top_p not in (None, 1.0) if temperature is None else temperature >= LEAST_TEMPERATURE


class _Stream(StreamingResponse):
    """Server-sent events; `place`, what is to be done when the connection ends, is closed then."""

    def __init__(self, chat: Chat, place: ExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_framed(chat), media_type="text/event-stream", headers=headers)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def _framed(chat: Chat) -> AsyncIterator[bytes]:
    try:
        async for event in chat.events():
            yield format_sse_event(data_str=json.dumps(event, ensure_ascii=False))
    except Exception as error:
        yield format_sse_event(data_str=json.dumps(fault_of(error).body()))
        return
    yield format_sse_event(data_str="[DONE]")
