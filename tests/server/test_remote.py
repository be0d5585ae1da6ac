"""Pictures from elsewhere: without leave nothing is asked; with leave only the public address that was checked."""

import contextlib
import socket
import ssl
import threading

import pytest
from PIL import Image

from blip2.errors import BadImage
from blip2.server import remote
from blip2.server.faults import Fault
from blip2.server.pictures import read_picture
from blip2.server.settings import Limits, ServerSettings

from .hostile_pictures import noise, saved

HOST = "pictures.example"
PUBLIC = "93.184.215.14"
CANARY = b"canary-7f3a"
PNG = saved(noise(), "PNG")
CLOSED = ServerSettings()
ALLOWED = ServerSettings(remote_hosts=(HOST,), limits=Limits(body_bytes=100_000))

LOCAL = [
    *("127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.1", "0x7f.0x0.0x0.0x1"),
    *("017700000001", "0177.0.0.1", "0177.0.0.01", "00000177.1", "127.0.0.1.", "localhost", "localhost.", "LOCALHOST"),
    *("10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376"),
    *("169.254.169.254.", "100.100.100.200", "100.64.0.1", "192.0.0.192", "168.63.129.16", "metadata.google.internal"),
    *("[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"),
    *(
        "[fe80::1%25eth0]",
        "[fd00:ec2::254]",
        "[fec0::1]",
        "[2002:7f00:1::]",
        "[2001:0:1:1:1:1:80ff:fffe]",
        "[64:ff9b::7f00:1]",
    ),
    *("[64:ff9b:1::a9fe:a9fe]", "[::ffff:0:127.0.0.1]", "127。0。0。1", "127．0．0．1", "①②⑦.⓪.⓪.①", "ⓛocalhost"),
    *("１２７.0.0.1", "lоcalhost", "127.0.0.1.nip.io", "localtest.me", "spoofed.burpcollaborator.net", "evil.example"),
]
WAYS = [  # of writing an address that a checker and a fetcher may read differently
    f"https://{HOST}@127.0.0.1/",
    f"https://{HOST}:443@127.0.0.1/",
    f"https://127.0.0.1@{HOST}/",
    f"https://user:word@{HOST}/",
    f"https://{HOST}%40127.0.0.1/",
    f"https://{HOST}\\@127.0.0.1/",
    f"https://127.0.0.1\\@{HOST}/",
    f"https://127.0.0.1\\.{HOST}/",
    f"https:\\\\{HOST}/",
    f"https:/{HOST}/",
    f"https:///{HOST}/",
    f"https:{HOST}/",
    f"//{HOST}/",
    f"/{HOST}",
    f"https://{HOST}#@127.0.0.1/",
    f"https://{HOST}?@127.0.0.1/",
    f"https://127.0.0.1#{HOST}/",
    f"https://127.0.0.1?{HOST}/",
    f"https://127.0.0.1/{HOST}",
    f"https://{HOST}.127.0.0.1/",
    f"https://{HOST}.evil.example/",
    f"https://evil.example.{HOST}/",
    f"https://evil-{HOST}/",
    f"https://{HOST}./",
    f"https://.{HOST}/",
    f"https://{HOST.upper()}/",
    f"https://{HOST}:22/",
    f"https://{HOST}:443/",
    f"https://{HOST}:/",
    f"https://{HOST}:0x1bb/",
    f"http://{HOST}/",
    f"HTTPS://{HOST}/",
    f"hTTps://{HOST}/",
    f" https://{HOST}/",
    f"\thttps://{HOST}/",
    f"\0https://{HOST}/",
    f"https://{HOST}/ HTTP/1.1\r\nHost: 127.0.0.1",
    f"https://{HOST}/\r\n",
    f"https://{HOST}/\n",
    f"https://{HOST}\r\n/",
    f"https://{HOST}/\0",
    f"https://{HOST}/a b",
    f"https://{HOST}/\u00e9",
    f"https://{HOST}\u3002/",
    f"https://{HOST.replace('.', '%2e')}/",
    f"https://{HOST.replace('.', '。')}/",
    "https://pictures\u00ad.example/",
    f"https://[{HOST}]/",
    f"https://xn--{HOST}/",
    f"url:https://{HOST}/",
    f"view-source:https://{HOST}/",
    f"jar:https://{HOST}!/",
]
SCHEMES = [
    *("file:///etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd", "file:/etc/passwd", "/etc/passwd"),
    *("../../etc/passwd", "gopher://127.0.0.1:6379/_INFO", "dict://127.0.0.1:11211/stats", "ftp://127.0.0.1/a.png"),
    *("sftp://127.0.0.1/", "ldap://127.0.0.1/", "tftp://127.0.0.1/x", "unix:///run/docker.sock", "smb://127.0.0.1/x"),
    *("netdoc:///etc/passwd", "php://filter/resource=x", "blob:https://a/b", "about:blank", "javascript:alert(1)"),
    *("ws://127.0.0.1/", "", " ", ":", "://", "https://", "https:// /", "https://[", "https://]", "https://:443/"),
]
DATA = [
    *("data:", "data:,", "data:image/png,abc", "data:image/png;base64", "data:image/png;base64,*", "data:;base64,é"),
    *("data:text/html;base64,PGI+", "data:image/png;base64,https://127.0.0.1/", "DATA:image/png;BASE64,!!"),
    *("data:image/svg+xml;base64,PHN2Zy8+", "data:image/png;base64;base64,AA==", "data://127.0.0.1/;base64,AAAA"),
    *("data:image/png;base64,AAAA\n", "data:image/png;base64, AAAA", "data:image/png;base64,AA", "data:\0;base64,AA=="),
]
PAYLOADS = [f"https://{host}/a.png" for host in LOCAL] + [f"http://{host}/a.png" for host in LOCAL[:6]] + WAYS + SCHEMES


class Network:
    """What stands in for the network: names lead where `answers` says, and every try to connect is noted."""

    def __init__(self):
        self.answers = [[PUBLIC]]
        self.asked, self.connected = [], []

    def getaddrinfo(self, host, port, *_, **__):
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(addresses, Exception):
            raise addresses
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in one], socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]


@pytest.fixture
def network(monkeypatch):
    """No real network: a connection to the public address comes to a server of the test's, all others are refused."""
    found = Network()
    connect = socket.socket.connect

    def watched(plain, address):
        found.connected.append(address)
        if address != (PUBLIC, 443):
            raise ConnectionRefusedError
        connect(plain, found.server)

    class NoTls:
        def wrap_socket(self, plain, server_hostname):
            assert server_hostname == HOST
            return plain

    monkeypatch.setattr(socket, "getaddrinfo", found.getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.setattr(ssl, "create_default_context", NoTls)
    return found


@contextlib.contextmanager
def answering(network, *answers):
    """A server that gives each connection the next of `answers`: pieces of bytes, or an event to wait for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        network.server = listener.getsockname()
        heard = []

        def serve():
            for pieces in answers:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                with plain, contextlib.suppress(OSError):
                    heard.append(plain.recv(65536))
                    for piece in pieces:
                        plain.sendall(piece) if isinstance(piece, bytes) else piece.wait(0.05)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield heard
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def answer(body, status="200 OK", *headers):
    """An HTTP answer in one piece."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return ["\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body]


def fetched(url=f"https://{HOST}/cat.png", settings=ALLOWED):
    return read_picture(url, settings, number=1)


def refused(url=f"https://{HOST}/cat.png", settings=ALLOWED):
    """The words of a refusal, which tell nothing of what was found."""
    with pytest.raises((Fault, BadImage)) as caught:
        fetched(url, settings)
    fault = caught.value
    assert isinstance(fault, BadImage) or fault.status == 400
    words = fault.message if isinstance(fault, Fault) else str(fault)
    assert CANARY.decode() not in words and "/etc" not in words and "127" not in words
    return words


def test_there_are_more_than_sixty_payloads():
    assert len({*PAYLOADS, *DATA}) >= 60


@pytest.mark.parametrize("url", PAYLOADS + DATA + [f"https://{HOST}/cat.png"])
def test_without_leave_nothing_is_asked_of_the_network(network, url):
    refused(url, CLOSED)
    assert not network.asked and not network.connected


@pytest.mark.parametrize("url", PAYLOADS + DATA)
def test_with_leave_no_other_host_and_no_other_way_of_writing_is_asked(network, url):
    words = refused(url)
    assert url.lower().startswith("data:") or words == remote._REFUSED
    assert not network.asked and not network.connected


def suspect(place):
    """Whether an address can stand in a header, and is not one that would be good at first hand either."""
    is_relative = place.startswith("/") and not place.startswith("//")
    return place.isprintable() and place == place.strip() != "" and not is_relative


@pytest.mark.parametrize("url", list(filter(suspect, PAYLOADS)))
def test_a_redirect_is_as_suspect_as_the_first_address(network, url):
    with answering(network, answer(CANARY, "302 Found", f"Location: {url}")):
        assert refused() == remote._REFUSED
    assert network.connected == [(PUBLIC, 443)]


@pytest.mark.parametrize("status", ["301 Moved", "303 See Other", "307 Temporary", "308 Permanent"])
def test_every_kind_of_redirect_is_checked(network, status):
    with answering(network, answer(CANARY, status, "Location: https://127.0.0.1/")):
        assert refused() == remote._REFUSED
    assert network.connected == [(PUBLIC, 443)]


PRIVATE = [
    *("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.31.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.192"),
    *("192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "192.88.99.1"),
    *("::1", "::", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::ffff:0:127.0.0.1", "fe80::1"),
    *("fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "2002:7f00:1::", "3fff::1"),
    *("2001:0:1:1:1:1:80ff:fffe", "64:ff9b::7f00:1", "64:ff9b:1::a9fe:a9fe", "100::1", "5f00::1", "4000::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_inside_is_not_followed(network, address):
    for addresses in ([address], [PUBLIC, address], [address, PUBLIC]):
        network.answers = [addresses]
        assert refused() == remote._REFUSED
    assert not network.connected


@pytest.mark.parametrize("addresses", [[], socket.gaierror(), TimeoutError()])
def test_a_name_that_leads_nowhere_is_refused_in_the_same_words(network, addresses):
    network.answers = [addresses]
    assert refused() == remote._REFUSED


def test_a_name_that_changes_its_mind_is_asked_once_for_each_connection(network):
    network.answers = [[PUBLIC], ["127.0.0.1"]]
    with answering(network, answer(PNG)):
        assert fetched().size == noise().size
    assert network.asked == [HOST] and network.connected == [(PUBLIC, 443)]
    assert refused() == remote._REFUSED  # now it leads inside
    assert network.connected == [(PUBLIC, 443)]


def test_a_redirect_to_a_name_that_has_changed_its_mind_is_refused(network):
    network.answers = [[PUBLIC], ["127.0.0.1"]]
    with answering(network, answer(CANARY, "302 Found", f"Location: https://{HOST}/x"), answer(PNG)):
        assert refused() == remote._REFUSED
    assert network.connected == [(PUBLIC, 443)]


def test_a_picture_of_an_allowed_host_is_read_also_behind_redirects(network):
    moved = answer(b"", "302 Found", "Location: /there.png")
    with answering(network, moved, moved, moved, answer(PNG)) as heard:
        picture = fetched()
    assert isinstance(picture, Image.Image) and picture.size == noise().size
    assert heard[0].startswith(b"GET /cat.png HTTP/1.1\r\nHost: pictures.example\r\n")
    assert heard[3].startswith(b"GET /there.png HTTP/1.1\r\n")
    assert not any(word in one.lower() for one in heard for word in (b"cookie", b"authorization", b"referer"))


def test_redirects_have_an_end(network):
    with answering(network, *[answer(b"", "302 Found", f"Location: https://{HOST}/")] * 9) as heard:
        assert refused() == remote._REFUSED
    assert len(heard) == remote.MOST_REDIRECTS + 1


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ODD = {
    "an error": answer(CANARY, "404 Not Found"),
    "a part": answer(CANARY, "206 Partial Content"),
    "nothing at all": [],
    "no HTTP": [CANARY * 100],
    "a redirect to nowhere": answer(CANARY, "302 Found"),
    "two places": answer(CANARY, "302 Found", f"Location: https://{HOST}/", f"Location: https://{HOST}/x"),
    "an endless head": [b"HTTP/1.1 200 OK\r\n", *[b"X: " + b"a" * 60_000 + b"\r\n"] * 200],
    "an endless line": [b"HTTP/1.1 200 OK\r\nX: ", *[b"a" * 60_000] * 200],
    "hundreds of promises": [b"HTTP/1.1 100 Continue\r\n\r\n" * 500],
    "too large": answer(CANARY * 20_000),
    "too large, without a length": [b"HTTP/1.1 200 OK\r\n\r\n", *[CANARY * 5000] * 9],
    "too large, in chunks": [CHUNKED, *[b"8000\r\n" + bytes(0x8000) + b"\r\n"] * 9],
    "broken chunks": [CHUNKED + b"zz\r\n" + CANARY],
    "a length that is none": [b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + CANARY],
    "cut short": [b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + PNG[:200]],
    "no picture": answer(CANARY * 100),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_answers_are_refused_and_nothing_of_them_is_told(network, name):
    with answering(network, ODD[name], ODD[name], ODD[name], ODD[name]):
        refused()
    assert set(network.connected) == {(PUBLIC, 443)}


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n"])
def test_an_answer_that_drips_is_cut_off(network, monkeypatch, beginning):
    monkeypatch.setattr(remote, "SECONDS", 0.4)
    drip = [piece for _ in range(400) for piece in (b"H", threading.Event())]  # 20 s of bytes, 0.05 s between two
    with answering(network, [beginning, *drip]):
        done = threading.Thread(target=refused, daemon=True)
        done.start()
        done.join(10)
        assert not done.is_alive()


def test_a_connection_leaves_no_thread_and_no_descriptor(network):
    with answering(network, *[answer(PNG)] * 5):
        before = threading.active_count()
        for _ in range(5):
            fetched()
    assert threading.active_count() <= before
