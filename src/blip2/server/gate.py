"""The gate before every route: who may come in, how large and how slow a request may be, what leaves with each answer.

    Host ─ Origin ─ key ─ rate ─ size ─▶ routes ─▶ security headers, counted

Written against ASGI itself, so that a refused body is never read and a slow one is dropped.
"""

import asyncio
import hmac
import ipaddress
import time
from collections import OrderedDict
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.server.faults import Fault
from blip2.server.metrics import Metrics
from blip2.server.settings import ServerSettings

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
WITHOUT_KEY = ("/", "/healthz", "/page.json")  # and what lies under /static/: the page must open to ask for the key
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ALWAYS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MOST_CALLERS = 10_000  # whose rates are remembered


class Gate:
    """ASGI middleware; see the module's docstring."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._rates = Rates(settings.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through or answers it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        counted = self.metrics.begin()
        watched = _Watched(scope, receive, send, self.settings, counted, self._allowed_origin(headers))
        try:
            if answer := self._preflight(scope, headers):
                await answer(scope, receive, watched.send)
                return
            self._check(scope, headers)
            await self.app(scope, watched.receive, watched.send)
        except Fault as fault:
            if not watched.has_begun:
                await fault.response()(scope, receive, watched.send)
        finally:
            self.metrics.end(counted, scope)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._knows_host(host):
            raise Fault(403, "The server does not go by this name. Start it with --allow-host NAME.")
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host) and self._allowed_origin(headers) is None:
            raise Fault(403, "Pages of this origin may not ask here. Start the server with --allow-origin ORIGIN.")
        path = scope["path"]
        is_open = path in WITHOUT_KEY or path.startswith("/static/")
        key = None if is_open else self._key(headers)
        if not is_open and path not in ("/metrics", "/readyz"):
            client = scope.get("client")
            self._rates.count(key or (client[0] if client else ""))
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.settings.limits.body_bytes:
            raise Fault(413, f"The request is larger than {self.settings.limits.body_bytes // 1_000_000} MB.")

    def _knows_host(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name.lower() in LOOPBACK or "*" in self.settings.hosts:
            return True
        if name.lower() in self.settings.hosts:
            return True
        try:  # a name that somebody else's DNS points here is no plain address
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:  # such as http://[
            return False
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()

    def _allowed_origin(self, headers: Headers) -> str | None:
        origin = headers.get("origin")
        return origin if origin is not None and origin in self.settings.origins else None

    def _preflight(self, scope: Scope, headers: Headers) -> Any:
        """The answer to a browser that asks whether a page elsewhere may ask."""
        if scope["method"] != "OPTIONS" or "access-control-request-method" not in headers:
            return None
        if self._allowed_origin(headers) is None or not self._knows_host(headers.get("host", "")):
            return Fault(403, "Pages of this origin may not ask here.").response()
        allowed = {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": "authorization, content-type",
            "Access-Control-Max-Age": "600",
        }
        return Response(status_code=204, headers=allowed)

    def _key(self, headers: Headers) -> str | None:
        if not self.settings.api_keys:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = None
        for key in self.settings.api_keys:  # all are compared, so that time tells nothing
            if hmac.compare_digest(key.encode(), given.strip().encode("latin-1", "replace")):
                found = key
        if found is None or scheme.lower() != "bearer":
            is_wrong = scheme.lower() == "bearer" and given.strip()
            raise Fault(
                401,
                "This key is not one that the server knows."
                if is_wrong
                else "A key is needed: send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


class Rates:
    """How many requests each caller may still make: a bucket that fills evenly and holds a minute's worth."""

    def __init__(self, requests_per_minute: int | None) -> None:
        self._most = requests_per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> (left, when)

    def count(self, caller: str) -> None:
        """Raises Fault 429 where `caller` has asked too often."""
        if self._most is None:
            return
        now = time.monotonic()
        left, when = self._buckets.pop(caller, (float(self._most), now))
        left = min(float(self._most), left + (now - when) * self._most / 60)
        is_refused = left < 1
        self._buckets[caller] = (left if is_refused else left - 1, now)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        if is_refused:
            seconds = max(1, round((1 - left) * 60 / self._most))
            raise Fault(
                429,
                f"More than {self._most} requests a minute. Try again in {seconds} s.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )


class _Watched:
    """The two ends of one request, with limits on size and slowness, and the headers that every answer has."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        settings: ServerSettings,
        counted: Any,
        origin: str | None,
    ) -> None:
        self.has_begun = False
        self._scope, self._receive, self._send = scope, receive, send
        self._limits = settings.limits
        self._counted = counted
        self._origin = origin
        self._num_bytes = 0
        self._begin: float | None = None  # of the body
        self._is_whole = False

    async def receive(self) -> Message:
        if self._is_whole:  # what comes now is that the client has left
            message = await self._receive()
            self._counted.has_left |= message["type"] == "http.disconnect"
            return message
        self._begin = time.monotonic() if self._begin is None else self._begin
        left = self._limits.whole_body_seconds - (time.monotonic() - self._begin)
        try:
            message = await asyncio.wait_for(self._receive(), min(self._limits.body_seconds, left))
        except TimeoutError:
            raise Fault(408, "The request came too slowly.", headers={"Connection": "close"}) from None
        if message["type"] == "http.disconnect":
            self._counted.has_left = True
            return message
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._limits.body_bytes:
            raise Fault(413, f"The request is larger than {self._limits.body_bytes // 1_000_000} MB.")
        self._is_whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self._counted.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in ALWAYS.items():
                headers.setdefault(name, value)
            if self._origin is not None:
                headers["Access-Control-Allow-Origin"] = self._origin
                headers.add_vary_header("Origin")
        try:
            await asyncio.wait_for(self._send(message), self._limits.send_seconds)
        except TimeoutError:
            self._counted.has_left = True
            raise ConnectionResetError("the client does not read its answer") from None
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._counted.is_whole = True
