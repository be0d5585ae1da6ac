"""Headers, addresses and lines that mean harm, at a server with keys: 401, 403 or 404, and nobody comes in."""

import pytest
from inference.tiny_model import make_tiny_model

import blip2
from blip2.server.settings import ServerSettings

from .hostile_client import serving

CHAT = "/v1/chat/completions"
KEY = "a key of some length"


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory):
    """A server that wants a key."""
    model = blip2.load(make_tiny_model(tmp_path_factory.mktemp("tiny")).model)
    with serving(model, ServerSettings(api_keys=(KEY, "another"))) as server:
        yield server


HEADERS = [
    "Authorization: ",
    "Authorization: Bearer",
    "Authorization: Bearer ",
    "Authorization: Bearer wrong",
    f"Authorization: Basic {KEY}",
    f"Authorization: {KEY}",
    f"Authorization: Bearer {KEY[:-1]}",
    f"Authorization: Bearer {KEY}x",
    f"X-Authorization: Bearer {KEY}",
    "Authorization: Bearer \xff\xfe\x80",
    "Authorization: \xc3\xa9 \xc3\xa9",
    "Authorization: Bearer " + "a" * 30_000,
]
PATHS = [
    *("/v1/models", "/v1/models/mini", "/metrics", "/readyz", "/openapi.json", CHAT, "/v1/score", "/score"),
    *("//v1/models", "/v1//models", "/v1/models/", "/v1/%6dodels", "/V1/MODELS", "/healthz/", "/healthz/..", "/."),
    *("/static", "/healthz/../v1/models", "/%2e%2e/v1/models", "/v1/models?key=x", "/nothing"),
    *("/healthz%2f..%2fv1%2fmodels", "/healthz;/v1/models", "/page.json%00", "/page.json/v1/models", "/%ff"),
]


@pytest.mark.parametrize("header", HEADERS)
def test_without_a_key_nobody_comes_in(locked_server, header):
    for path in ("/v1/models", CHAT):
        lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n"
        lines += "Content-Length: 2\r\n\r\n{}"
        assert locked_server.say(lines.encode("latin-1")).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "PUT", "TRACE", "get", "X"])
def test_no_way_of_writing_an_address_goes_round_the_key(locked_server, path, method):
    lines = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert locked_server.say(lines.encode()).startswith(b"HTTP/1.1 401 ")


BESIDE = ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "%00", "/etc/passwd", "%2fetc%2fpasswd", "%ff", ".", "examples"]


@pytest.mark.parametrize("place", [*BESIDE, "..\\app.py", "..%5capp.py", "../v1/models", "a" * 5000, "a/" * 2000, ""])
def test_nothing_beside_the_page_can_be_read(locked_server, place):
    found = locked_server.say(f"GET /static/{place} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert found.startswith(b"HTTP/1.1 404 ")


def test_a_key_opens(locked_server):
    for key in (KEY, "another"):
        assert locked_server.ask(path="/v1/models", headers={"Authorization": f"bearer {key}"})[0] == 200


FOREIGN = [
    "Host: evil.example",
    "Host: localhost.evil.example",
    "Host: evil.example:80",
    "Host: localhost@evil.example",
    "Host: ",
    "Host: [",
    "Host: []",
    "Host: [::1]evil",
    "Host: \xff\xfe",
    "Host: 127.0.0.1.evil.example",
    "Host: 0x7f.1",
    "Host: localhost\r\nOrigin: https://evil.example",
    "Host: localhost\r\nOrigin: null",
    "Host: localhost\r\nOrigin: ",
    "Host: localhost\r\nOrigin: http://[",
    "Host: localhost\r\nOrigin: http://[::1",
    "Host: localhost\r\nOrigin: http://]",
    "Host: localhost\r\nOrigin: \xff",
    "Host: localhost\r\nOrigin: http://localhost@evil.example",
    "Host: localhost\r\nOrigin: http://localhost.evil.example",
    "Host: localhost\r\nOrigin: http://localhost:81",
    "Host: localhost\r\nOrigin: file://localhost",
]


@pytest.mark.parametrize("lines", FOREIGN)
def test_other_names_and_other_pages_are_refused(locked_server, lines):
    for method in ("GET", "OPTIONS"):
        more = "Access-Control-Request-Method: POST\r\n" if method == "OPTIONS" else ""
        request = f"{method} /v1/models HTTP/1.1\r\n{lines}\r\n{more}Connection: close\r\n\r\n"
        assert locked_server.say(request.encode("latin-1")).startswith(b"HTTP/1.1 403 ")


LINES = [
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9{nines}\r\n\r\n",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2\r\n\r\n{{}}",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    "POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "GET {path} HTTP/1.1\r\n\r\n",
    "GET http://evil.example{path} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "GET {path} HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "GET {path}\r\n\r\n",
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
    "GET {path} HTTP/1.1\r\nHost: localhost\r\n X: folded\r\n\r\n",
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nX: " + "a" * 200_000 + "\r\n\r\n",
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("lines", LINES)
def test_requests_that_two_servers_would_read_differently_get_no_answer(locked_server, lines):
    written = lines.format(path=CHAT, nines="9" * 30).encode("latin-1")
    found = locked_server.say(written, seconds=0.3, then_close=True)
    statuses = [int(line[9:12]) for line in found.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert all(400 <= status < 500 for status in statuses), found
