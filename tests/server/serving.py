"""A server in this process: the real application on a real socket, and a client that speaks JSON."""

import base64
import contextlib
import io
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import uvicorn

from blip2.server.app import create_app


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        """The body read as JSON."""
        return json.loads(self.body)

    @property
    def message(self):
        """The words of an error."""
        return self.json["error"]["message"]

    @property
    def content(self):
        """The text of a chat's answer."""
        return self.json["choices"][0]["message"]["content"]


@dataclass(frozen=True)
class Serving:
    """A server that runs: where, and what its routes share."""

    url: str
    service: object

    def send(self, path, body=None, method=None, **headers):
        """One request; a body that is no bytes goes as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): text for name, text in headers.items()
        }
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as refused:
            with refused:
                return Answer(refused.code, dict(refused.headers), refused.read())

    def chat(self, *messages, **options):
        """POST /v1/chat/completions."""
        return self.send("/v1/chat/completions", {"model": "tiny", "messages": list(messages)} | options)

    def stream(self, *messages, **options):
        """The events of a stream, [DONE] last."""
        answer = self.chat(*messages, stream=True, stream_options={"include_usage": True}, **options)
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.body.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


@contextlib.contextmanager
def serving(model, settings):
    """The model served under `settings` on a free port."""
    app, service = create_app(model, settings)
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Serving(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not service.engine.is_alive


def becomes(condition, seconds=10):
    """Whether `condition()` holds within some seconds."""
    event, end = threading.Event(), time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        event.wait(0.01)
    return True


def data_uri(image, form="PNG"):
    """A PIL image as a data URI."""
    kept = io.BytesIO()
    image.save(kept, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(kept.getvalue()).decode()}"


def picture(image):
    """A part of a message."""
    return {"type": "image_url", "image_url": {"url": image if isinstance(image, str) else data_uri(image)}}


def user(*parts, **more):
    """A user's message: texts, PIL images and data URIs mixed."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) and not part.startswith("data:") else picture(part)
        for part in parts
    ]
    return {"role": "user", "content": content} | more


def assistant(text):
    """What was answered."""
    return {"role": "assistant", "content": text}
