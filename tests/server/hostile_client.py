"""A server in a thread, and a client that says exactly what it is told to and looks at every answer for leaks."""

import base64
import contextlib
import json
import re
import socket
import threading
import time
from collections import Counter
from http.client import HTTPConnection

import uvicorn

from blip2.server.app import create_app

# an address in memory, a place in a file system, a stack
LEAK = re.compile(rb'0x[0-9a-f]{6,}|/usr/|/tmp/|/home/|\.py"|site-packages|File \\?"|Traceback', re.IGNORECASE)
SECONDS = 60  # generous: an answer that takes longer hangs


class Server:
    """A running server.

    Attributes:
        service: what its routes share.
        outcomes: how many answers of each status its `ask` has seen.
    """

    def __init__(self, service, port):
        self.service = service
        self.port = port
        self.outcomes = Counter()

    def ask(self, body=None, path="/v1/chat/completions", *, method=None, headers=None):
        """Status and answer, as JSON where it is; asserts that nothing leaks and that no fault is the server's own."""
        data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        given = {} if body is None else {"Content-Type": "application/json"}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method or ("GET" if body is None else "POST"), path, data, given | (headers or {}))
            answer = connection.getresponse()
            return self.seen(answer.status, answer.read(), answer.getheader("content-type", ""))

    def seen(self, status, text, kind="application/json"):
        """The same for an answer that was read by hand."""
        self.outcomes[status] += 1
        assert not LEAK.search(text), text[:300]
        assert status < 500, (status, text[:300])
        if not kind.startswith("application/json"):
            return status, text
        found = json.loads(text)
        if status >= 400:
            assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
            assert found["error"]["message"] and found["error"]["type"]
        return status, found

    def say(self, data, *, seconds=SECONDS, then_close=False):
        """Sends bytes as they are; everything that comes back until the server closes or falls silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as plain:
            plain.sendall(data)
            if then_close:
                with contextlib.suppress(OSError):  # it was closed at the other end before
                    plain.shutdown(socket.SHUT_WR)
            pieces = []
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while piece := plain.recv(65536):
                    pieces.append(piece)
        found = b"".join(pieces)
        assert not LEAK.search(found), found[:300]
        return found

    def see(self, data, kind="jpeg", **fields):
        """Asks for a word about a picture, with the label that an attacker would give it."""
        return self.ask(about(data, kind) | {"max_tokens": 1} | fields)

    def vector(self, data):
        """The vector of a picture."""
        messages = [{"role": "user", "content": [picture(data)]}]
        status, found = self.ask({"model": "mini", "messages": messages}, "/v1/embeddings")
        assert status == 200, found
        return found["data"][0]["embedding"]


def picture(data, kind="jpeg"):
    """A part of a message."""
    url = f"data:image/{kind};base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def about(data, kind="jpeg", text="what is this ?"):
    """A request about a picture."""
    content = [picture(data, kind), {"type": "text", "text": text}]
    return {"model": "mini", "messages": [{"role": "user", "content": content}]}


@contextlib.contextmanager
def serving(model, settings):
    """A server in a thread; at the end nobody may hold a place and nothing may be written."""
    app, service = create_app(model, settings)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=5)
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    until(lambda: runner.started)
    server = Server(service, runner.servers[0].sockets[0].getsockname()[1])
    try:
        yield server
        until(lambda: is_idle(service))
        assert service.engine.is_alive
    finally:
        runner.should_exit = True
        thread.join(SECONDS)


def is_idle(service):
    """Whether nobody is being answered and the model has nothing to do."""
    return not (service._num_admitted or service.engine.num_waiting or service.engine.num_writing)


def until(is_so, seconds=SECONDS):
    """Waits for something that comes about by itself."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)
