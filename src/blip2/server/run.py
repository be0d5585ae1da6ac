"""Runs the application until it is told to stop: what was accepted is finished, then the process ends with 0."""

import logging
import signal
import sys
from types import FrameType

import uvicorn

from blip2.inference.blip2 import Blip2
from blip2.server.app import create_app
from blip2.server.service import Service
from blip2.server.settings import ServerSettings

MOST_CONNECTIONS = 1024  # open at once; more get 503


class _Server(uvicorn.Server):
    """Says at once that it is not ready any more when it is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.is_ready = False
        super().handle_exit(sig, frame)


def run(
    model: Blip2, settings: ServerSettings, *, host: str, port: int, finish_seconds: int = 60, quiet: bool = False
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        model: what answers.
        settings: see ServerSettings.
        host, port: where to listen; port 0 takes a free one.
        finish_seconds: how long what was accepted may take after a signal.
        quiet: no line for each request.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    app, service = create_app(model, settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning" if quiet else "info",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody may write X-Forwarded-For, and rates are counted by address
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=finish_seconds,
        h11_max_incomplete_event_size=64_000,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again at its end; they were obeyed
        signal.signal(number, lambda *_: None)
    _Server(config, service).run()
