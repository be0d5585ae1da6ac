"""Who leaves leaves nothing behind: no place, no text that is written for nobody, no thread, no picture in memory."""

import contextlib
import gc
import json
import socket
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
from inference.tiny_model import make_tiny_model
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import blip2
from blip2.errors import Busy
from blip2.server import dialogue, gate
from blip2.server.service import NUM_READERS
from blip2.server.settings import ServerSettings

from .hostile_client import about, is_idle, serving, until
from .hostile_pictures import noise, saved

PNG = saved(noise(), "PNG")
LONG = about(PNG) | {"max_tokens": 400, "min_tokens": 400}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = blip2.load(make_tiny_model(tmp_path_factory.mktemp("tiny")).model)
    with serving(model, ServerSettings()) as running:
        yield running


def post(server, body, *, num_bytes=None):
    """A connection on which a request, or the beginning of one, was sent."""
    data = json.dumps(body).encode()
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    plain.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[:num_bytes])
    return plain


def outcomes(server):
    """Outcome -> how many chats ended so."""
    found = {}
    for family in text_string_to_metric_families(server.service.metrics.as_text().decode()):
        for sample in family.samples:
            if sample.name == "blip2_requests_total":
                found[sample.labels["outcome"]] = found.get(sample.labels["outcome"], 0) + int(sample.value)
    return found


def held_up(monkeypatch, target, name):
    """Makes a function wait for an event, and counts those that wait."""
    gate, waiting, original = threading.Event(), [], getattr(target, name)

    def wait(*arguments, **options):
        waiting.append(threading.get_ident())
        try:
            assert gate.wait(60)
        finally:
            waiting.remove(threading.get_ident())
        return original(*arguments, **options)

    monkeypatch.setattr(target, name, wait)
    return gate, waiting


def test_who_leaves_while_a_picture_is_read_gets_no_text_written(server, monkeypatch):
    gate, waiting = held_up(monkeypatch, dialogue, "read_picture")
    submitted, submit = [], server.service.engine.submit
    monkeypatch.setattr(server.service.engine, "submit", lambda *a, **o: submitted.append(submit(*a, **o)))
    plain = post(server, LONG | {"n": 4})
    until(lambda: waiting)
    plain.close()
    until(lambda: not server.service._num_admitted)
    gate.set()
    until(lambda: is_idle(server.service))
    assert submitted == []


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_texts_are_submitted_or_written_stops_them(server, monkeypatch, stream):
    submitted, submit = [], server.service.engine.submit

    def slowly(*arguments, **options):
        reply = submit(*arguments, **options)
        submitted.append(reply)
        time.sleep(0.02)
        return reply

    monkeypatch.setattr(server.service.engine, "submit", slowly)
    for num_submitted in (1, 3, 6):
        submitted.clear()
        plain = post(server, LONG | {"n": 6, "stream": stream})
        until(lambda least=num_submitted: len(submitted) >= least)
        plain.close()
        until(lambda: is_idle(server.service))
        time.sleep(0.1)  # the one that is being submitted
        until(lambda: all(reply.reason for reply in submitted))
        assert {reply.reason for reply in submitted} == {"cancelled"}


def test_pictures_of_those_who_left_are_read_by_no_more_threads_than_others(server, monkeypatch):
    gate, waiting = held_up(monkeypatch, dialogue, "read_picture")
    most = 0
    for _ in range(4 * NUM_READERS):
        plain = post(server, LONG)
        until(lambda: server.service._num_admitted)
        time.sleep(0.05)
        most = max(most, len(waiting))
        plain.close()
        until(lambda: not server.service._num_admitted)
    gate.set()
    assert most == NUM_READERS
    until(lambda: not waiting)


def test_a_text_that_cannot_be_submitted_stops_its_siblings(server, monkeypatch):
    submitted, submit = [], server.service.engine.submit

    def refuse_the_third(*arguments, **options):
        if len(submitted) == 2:
            raise Busy("too many wait")
        submitted.append(submit(*arguments, **options))
        return submitted[-1]

    monkeypatch.setattr(server.service.engine, "submit", refuse_the_third)
    assert server.ask(LONG | {"n": 4})[0] == 429
    until(lambda: all(reply.reason for reply in submitted))
    assert [reply.reason for reply in submitted] == ["cancelled"] * 2


def test_who_leaves_before_the_body_is_whole_is_no_fault_of_the_server(server):
    before = outcomes(server)
    post(server, LONG, num_bytes=100).close()
    until(lambda: outcomes(server).get("499", 0) == before.get("499", 0) + 1)
    assert outcomes(server).get("500", 0) == before.get("500", 0)


def test_a_body_that_comes_byte_by_byte_has_an_end(server, monkeypatch):
    limits = replace(server.service.settings.limits, body_seconds=10, whole_body_seconds=0.3)
    monkeypatch.setattr(gate, "_Watched", partial(limited, limits, gate._Watched))
    plain = post(server, LONG, num_bytes=10)
    plain.settimeout(0.05)
    found = b""
    for _ in range(100):
        with contextlib.suppress(TimeoutError):
            plain.sendall(b" ")
            if found := plain.recv(1000):
                break
    assert found.startswith(b"HTTP/1.1 408 ")
    until(lambda: is_idle(server.service))


def limited(limits, make, scope, receive, send, settings, *more):
    return make(scope, receive, send, replace(settings, limits=limits), *more)


def test_no_picture_is_kept_while_its_answer_is_written(server):
    large = saved(Image.new("RGB", (1234, 1321)), "PNG")
    plain = post(server, about(large) | {"max_tokens": 400, "min_tokens": 400, "stream": True})
    until(lambda: server.service.engine.num_writing)
    gc.collect()
    kept = [one for one in gc.get_objects() if type(one) is Image.Image and one.size == (1234, 1321)]
    assert server.service.engine.num_writing and not kept
    plain.close()
