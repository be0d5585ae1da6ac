"""Who may come in, and how large and slow a request may be; what leaves with every answer."""

import json
import socket
import threading
from urllib.parse import urlsplit

import pytest

import blip2
from blip2.server.settings import Limits, ServerSettings

from .serving import becomes, serving, user

KEYS = ("0123456789abcdef-one", "0123456789abcdef-two")


@pytest.fixture(scope="module")
def guarded(tiny_folder):
    """A server with keys, tight limits and one page elsewhere that may ask."""
    settings = ServerSettings(
        name="tiny",
        api_keys=KEYS,
        hosts=("blip2.example",),
        origins=("https://page.example",),
        limits=Limits(body_bytes=200_000, body_seconds=0.5),
    )
    with serving(blip2.load(tiny_folder), settings) as running:
        yield running


def bearer(key):
    """The header of a key."""
    return {"Authorization": f"Bearer {key}"}


def test_every_route_of_the_document_but_healthz_needs_a_key(guarded):
    document = guarded.send("/openapi.json", **bearer(KEYS[0])).json
    routes = [(path, method) for path, methods in document["paths"].items() for method in methods]
    assert len(routes) >= 9
    for path, method in routes:
        body = b"{}" if method == "post" else None
        answer = guarded.send(path.replace("{name}", "tiny"), body, method.upper())
        assert (answer.status == 401) == (path != "/healthz"), path
        if answer.status == 401:
            assert answer.headers["www-authenticate"] == "Bearer" and "key is needed" in answer.message


@pytest.mark.parametrize("key", ["", "wrong", KEYS[0][:-1], KEYS[0] + "x", "ключ", "\u00ff" * 20])
def test_a_wrong_key_is_no_key(guarded, key):
    given = f"Bearer {key}".encode().decode("latin-1")
    assert guarded.send("/v1/models", Authorization=given).status == 401
    assert guarded.send("/v1/models", Authorization=f"Basic {KEYS[0]}").status == 401


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded, images, key):
    assert guarded.send("/v1/models", **bearer(key)).status == 200
    assert guarded.send("/v1/models/tiny", **bearer(key)).status == 200
    assert guarded.send("/readyz", **bearer(key)).status == 200
    body = {"model": "tiny", "messages": [user(images[1], "what ?")], "max_tokens": 3}
    assert guarded.send("/v1/chat/completions", body, **bearer(key)).status == 200


def test_the_page_opens_without_a_key_and_asks_for_it(guarded):
    assert guarded.send("/page.json").json["needs_key"] is True
    page = guarded.send("/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("192.168.0.7:8000", 200),
        ("blip2.example", 200),
        ("BLIP2.example:8000", 200),
        ("attacker.example", 403),
        ("localhost.attacker.example", 403),
        ("blip2.example@attacker.example", 403),
        ("127.0.0.1.attacker.example", 403),
        ("", 403),
    ],
)
def test_only_known_hosts_are_answered(guarded, host, status):
    assert guarded.send("/v1/models", Host=host, **bearer(KEYS[0])).status == status
    assert guarded.send("/", Host=host).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://page.example", 200),
        ("http://{host}", 200),
        ("https://page.example.attacker.example", 403),
        ("http://page.example", 403),
        ("http://127.0.0.1:1", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_only_known_pages_may_ask(guarded, origin, status):
    origin = origin.replace("{host}", urlsplit(guarded.url).netloc)
    answer = guarded.send("/v1/models", Origin=origin, **bearer(KEYS[0]))
    assert answer.status == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://page.example" else None)


def test_a_page_elsewhere_is_told_what_it_may_send(guarded):
    asked = {"Access-Control-Request-Method": "POST", "Origin": "https://page.example"}
    answer = guarded.send("/v1/chat/completions", None, "OPTIONS", **asked)
    assert answer.status == 204 and "authorization" in answer.headers["access-control-allow-headers"]
    asked["Origin"] = "https://attacker.example"
    assert guarded.send("/v1/chat/completions", None, "OPTIONS", **asked).status == 403


def talk(serving, sent, *, then_wait=True):
    """What comes back to bytes sent as they are, until the server closes."""
    place = urlsplit(serving.url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        connection.sendall(sent)
        answer = b""
        while then_wait and (part := connection.recv(65536)):
            answer += part
            if b"\r\n\r\n" in answer and b"}" in answer:
                break
        return answer


def head(*lines):
    """A POST's first lines, with a key."""
    first = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEYS[0]}"]
    return "\r\n".join([*first, "Content-Type: application/json", *lines, "", ""]).encode()


def test_a_large_body_is_refused_before_it_is_sent(guarded):
    assert b"413" in talk(guarded, head("Content-Length: 200001")).split(b"\r\n")[0]


def test_a_body_without_a_length_is_refused_when_it_grows_too_large(guarded):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    answer = talk(guarded, head("Transfer-Encoding: chunked") + chunk * 4)
    assert b"413" in answer.split(b"\r\n")[0]


def test_a_body_that_does_not_come_is_not_waited_for(guarded):
    answer = talk(guarded, head("Content-Length: 100") + b'{"model"')
    assert b"408" in answer.split(b"\r\n")[0]
    assert becomes(lambda: guarded.service._num_admitted == 0)


def test_rates_are_counted_for_each_key(tiny_folder):
    settings = ServerSettings(name="tiny", api_keys=KEYS, requests_per_minute=3)
    with serving(blip2.load(tiny_folder), settings) as running:
        answers = [running.send("/v1/models", **bearer(KEYS[0])) for _ in range(5)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert running.send("/v1/models", **bearer(KEYS[1])).status == 200
        assert running.send("/healthz").status == 200


def test_a_full_server_says_when_to_come_again_and_answers_whom_it_took(tiny_folder, images, monkeypatch):
    model = blip2.load(tiny_folder)
    gate = threading.Event()
    features_of = model.features_of
    monkeypatch.setattr(model, "features_of", lambda pixels: gate.wait(60) and features_of(pixels))
    with serving(model, ServerSettings(name="tiny", limits=Limits(admitted=3))) as running:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(running.chat(user(images[0], "why ?"), max_tokens=4)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert becomes(lambda: running.service._num_admitted == 3)
        refused = [running.chat(user(images[0], "why ?")) for _ in range(4)]
        assert {answer.status for answer in refused} == {429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert running.send("/healthz").status == 200 and running.send("/readyz").status == 200
        gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status for answer in answers] == [200] * 3
        assert running.chat(user(images[0], "why ?"), max_tokens=4).status == 200
        counts = counted(running)
        assert counts["/v1/chat/completions", "200"] == 4 and counts["/v1/chat/completions", "429"] == 4


def counted(running):
    """(route, outcome) -> how many, from /metrics."""
    lines = [
        line for line in running.send("/metrics").body.decode().splitlines() if line.startswith("blip2_requests_t")
    ]
    found = {}
    for line in lines:
        labels, value = line.removeprefix("blip2_requests_total{").rsplit("} ", 1)
        named = dict(label.split("=") for label in labels.split(","))
        found[json.loads(named["route"]), json.loads(named["outcome"])] = float(value)
    return found


def test_every_request_is_counted_once(tiny_folder, images):
    with serving(blip2.load(tiny_folder), ServerSettings(name="tiny")) as running:
        for _ in range(3):
            running.chat(user(images[0], "why ?"), max_tokens=2)
            running.stream(user(images[0], "why ?"), max_tokens=2)
        running.chat(user("why ?"))
        running.send("/nowhere")
        running.send("/healthz", Host="attacker.example")
        assert counted(running) == {
            ("/v1/chat/completions", "200"): 6,
            ("/v1/chat/completions", "400"): 1,
            ("none", "404"): 1,
            ("none", "403"): 1,
        }


def test_unknown_addresses_and_methods_get_the_error_object(served):
    assert served.send("/v1/nothing").status == 404
    assert served.send("/v1/chat/completions").status == 405
    assert served.send("/v1/chat/completions/", b"{}").status == 404
    assert served.send("/static/../app.py").status == 404
    assert served.send("/static/%2e%2e/app.py").status == 404
    assert served.send("/v1/nothing").json["error"]["type"] == "not_found_error"


def test_bodies_that_would_not_fit_in_memory_together_come_again_later(tiny_folder, images):
    limits = Limits(body_bytes=200_000, bodies_bytes=100_000)
    with serving(blip2.load(tiny_folder), ServerSettings(name="tiny", limits=limits)) as running:
        assert running.chat(user(images[0], "why ?"), max_tokens=2).status == 200
        refused = running.chat(user(images[0], "why " * 30_000))
        assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
        assert running.service._num_bytes == 0
