"""What the routes share: the model and its engine, the count of who is being answered, and threads for slow reading."""

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from blip2.errors import Busy
from blip2.inference.blip2 import Blip2
from blip2.inference.engine import Engine
from blip2.server.faults import Fault, fault_of
from blip2.server.metrics import Metrics
from blip2.server.schemas import ModelRequest
from blip2.server.settings import ServerSettings

MOST_COMMAS = 20_000  # in a body: of pydantic's errors one may come of each, a kilobyte long and 10 us of all threads
NUM_READERS = 2  # threads that decode pictures and tokenise, beside the model's own
Schema = TypeVar("Schema", bound=ModelRequest)
Result = TypeVar("Result")


class Service:
    """One model that is served.

    Attributes:
        model: what answers.
        engine: what runs it; created with `max_rows` of the settings.
        settings: see ServerSettings.
        metrics: what is counted.
        created: when it was loaded, seconds since 1970.
        is_ready: whether new requests are taken; false from the moment the server is told to stop.
    """

    def __init__(self, model: Blip2, settings: ServerSettings) -> None:
        most = settings.limits.admitted * settings.limits.choices
        self.model = model
        self.settings = settings
        self.engine = Engine(model, max_rows=settings.max_rows, max_waiting=most)
        self.metrics = Metrics()
        self.created = int(time.time())
        self.is_ready = True
        self._num_admitted = 0
        self._num_bytes = 0  # of their bodies
        self._ended: deque[float] = deque(maxlen=64)  # when the last answers were whole
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="blip2 reader")
        self.metrics.show("blip2_waiting", "Texts the model has not begun with", lambda: self.engine.num_waiting)
        self.metrics.show("blip2_writing", "Texts that are being written", lambda: self.engine.num_writing)
        self.metrics.show("blip2_admitted", "Requests that are answered or wait", lambda: self._num_admitted)

    @contextlib.contextmanager
    def admitted(self, request: Request) -> Iterator[None]:
        """A place among those that are answered, and room for the body; raises Fault 429 or 503 where there is none."""
        if not self.is_ready:
            raise Fault(503, "The server is being shut down and takes no more requests.", headers={"Retry-After": "5"})
        limits = self.settings.limits
        length = request.headers.get("content-length", "")
        num_bytes = int(length) if length.isdecimal() else limits.body_bytes  # of one that comes in pieces the most
        if self._num_admitted >= limits.admitted or self._num_bytes + num_bytes > limits.bodies_bytes:
            busy = Busy(f"{self._num_admitted} requests are being answered already. Try again in a few seconds.")
            raise fault_of(busy, retry_after=self._seconds_to_wait())
        self._num_admitted += 1
        self._num_bytes += num_bytes
        try:
            yield
        finally:
            self._num_admitted -= 1
            self._num_bytes -= num_bytes
            self._ended.append(time.monotonic())

    def _seconds_to_wait(self) -> int:
        """About how long it takes until half of those that wait are answered, from the last answers' rate."""
        if len(self._ended) < 2:
            return 1
        rate = len(self._ended) / max(0.1, time.monotonic() - self._ended[0])
        return min(60, max(1, round(self._num_admitted / 2 / rate)))

    async def read(self, request: Request, schema: type[Schema]) -> Schema:
        """The request's body, parsed in another thread."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Fault(415, "The body must be JSON, with the header Content-Type: application/json.")
        try:
            body = b"".join([piece async for piece in request.stream()])  # request.body() would keep it
        except ClientDisconnect:
            raise Fault(499, "The client left.") from None
        return await unless_gone(request, self.in_reader(lambda: _parse(body, schema)))

    async def answer(
        self, request: Request, schema: type[Schema], work: Callable[[Schema], Awaitable[dict[str, Any]]]
    ) -> JSONResponse:
        """What `work` makes of the request's body, unless the client leaves before."""
        with self.admitted(request):
            body = await self.read(request, schema)
            self.check_model(body.model)
            return JSONResponse(await unless_gone(request, work(body)))

    async def in_reader(self, work: Callable[[], Result]) -> Result:
        """Does what reads (JSON, pictures, tokens) off the event loop, a few at a time.

        Who leaves meanwhile makes no room for another: what has begun keeps its thread to its end.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def close(self) -> None:
        """Ends the threads; what is being written is cancelled."""
        self.is_ready = False
        self.engine.close(finish=False)
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def with_model(self, work: Callable[[], Result]) -> Result:
        """Does what takes the model in the engine's thread, between two words of others."""
        return await asyncio.wrap_future(self.engine.call(work))

    def check_model(self, name: str) -> None:
        """Raises Fault 404 where the request names another model."""
        if name != self.settings.name:
            message = f"There is no model of this name here; it is {self.settings.name!r}."
            raise Fault(404, message, param="model", code="model_not_found")


def _parse(body: bytes, schema: type[Schema]) -> Schema:
    if body.count(b",") > MOST_COMMAS:
        raise Fault(400, "The body holds too many fields, items or commas.")
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        # of a union's branches the one that fits best: that goes deepest, and of these one of the right kind
        first = max(found, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
        place = _place(body, first["loc"], is_there=first["type"] not in ("missing", "union_tag_not_found"))
        what = "is not a field of this request" if first["type"] == "extra_forbidden" else first["msg"]
        message = f"{place}: {what}" if place else f"The body is no JSON that can be read: {_short(what)}"
        raise Fault(400, f"{message[:300]}.", param=place[:100] or None) from None


def _place(body: bytes, steps: Sequence[str | int], *, is_there: bool) -> str:
    """`messages[0].content[1].text` of pydantic's steps, of which some name branches of unions, which nobody wrote.

    Of all ways through the body that leave steps out it is the one that ends with the last step (a new name in what is
    there, if the fault is that it is missing) and else leaves out the fewest.
    """
    ways: list[tuple[bool, int, str]] = []  # whether the last step is left out, how many are, the place

    def go_on(here: Any, at: int, left_out: int, place: str) -> None:
        if at == len(steps):
            ways.append((True, left_out, place))
            return
        step, is_last = steps[at], at == len(steps) - 1
        with contextlib.suppress(KeyError, IndexError, TypeError):
            inner, longer = here[step], f"{place}[{step}]" if isinstance(step, int) else f"{place}.{step}"
            if is_last:
                ways.append((False, left_out, longer))
            else:
                go_on(inner, at + 1, left_out, longer)
        if is_last and not is_there and isinstance(here, dict) and step not in here:
            ways.append((False, left_out, f"{place}.{step}"))
        go_on(here, at + 1, left_out + 1, place)

    if steps:
        with contextlib.suppress(ValueError, RecursionError):  # it was read once, by a parser with other bounds
            go_on(json.loads(body), 0, 0, "")
    return min(ways)[2].removeprefix(".") if ways else ""


def _short(text: str) -> str:
    return text.removeprefix("Invalid JSON: ")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` gives; cancelled where the client leaves before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Fault(499, "The client left.")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
