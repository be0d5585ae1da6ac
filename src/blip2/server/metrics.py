"""What the server counts, for Prometheus: requests by route and outcome, seconds, tokens, and what waits."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


@dataclass
class Counted:
    """One request on its way.

    Attributes:
        status: of the answer; None until it begins.
        has_left: whether the client left before the end.
        is_whole: whether the answer was sent to its end.
    """

    status: int | None = None
    has_left: bool = False
    is_whole: bool = False
    begin: float = field(default_factory=time.perf_counter)


class Metrics:
    """The figures under /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["route", "outcome"]
        self._requests = Counter("blip2_requests", "Requests by route and outcome", labels, registry=self.registry)
        self._seconds = Histogram(
            "blip2_request_seconds",
            "Seconds to the end of an answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._open = Gauge("blip2_requests_open", "Requests on their way", registry=self.registry)
        self.tokens = Counter("blip2_tokens", "Tokens read and written", ["kind"], registry=self.registry)
        self.first_piece = Histogram(
            "blip2_first_piece_seconds", "Seconds to the first piece of a text", buckets=SECONDS, registry=self.registry
        )

    def show(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A figure that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def begin(self) -> Counted:
        """A request came."""
        self._open.inc()
        return Counted()

    def end(self, counted: Counted, scope: Scope) -> None:
        """It is over. Its outcome is its status, or 499 where the client left first."""
        self._open.dec()
        route = getattr(scope.get("route"), "path", None) or "none"
        is_answered = counted.is_whole or (counted.status is not None and not counted.has_left)
        self._requests.labels(route, str(counted.status) if is_answered else "499").inc()
        self._seconds.labels(route).observe(time.perf_counter() - counted.begin)

    def as_text(self) -> bytes:
        """All figures in Prometheus's format."""
        return generate_latest(self.registry)
