"""Packages come once, whole and as expected, whatever the network does. A server on the loopback plays the registry."""

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blip2 import paths, registry
from blip2.errors import BadData, DownloadFailed
from tests.data.tiny_packages import deb, tgz, wheel

CONTENTS = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Serves `files`; counts requests; can ignore ranges, and hang up after `cut` bytes of the first answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges: list[str | None] = []
        self.knows_ranges = True
        self.cuts: list[int] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = self._start() if self.server.knows_ranges else 0
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = start + self.server.cuts.pop(0) if self.server.cuts else len(data)
        self.wfile.write(data[start:end])

    def _start(self) -> int:
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def listed(server, monkeypatch):
    """Lists a package with these contents, or these expected ones, under the key "thing"."""

    def list_package(data: bytes = CONTENTS, expected: bytes | None = None, url: str = "") -> registry.Package:
        expected = data if expected is None else expected
        server.files["/thing.bin"] = data
        package = registry.Package(
            "thing.bin",
            hashlib.sha256(expected).hexdigest(),
            len(expected),
            "MIT",
            url or f"{server.address}/thing.bin",
        )
        monkeypatch.setitem(registry.PACKAGES, "thing", package)
        return package

    return list_package


def partial():
    return paths.packages_dir() / "thing.bin.partial"


def test_a_package_is_fetched_once(server, listed):
    listed()
    told = []
    path = registry.fetch("thing", lambda key, done, total: told.append((key, done, total)))
    assert path.read_bytes() == CONTENTS and not partial().exists()
    assert told[-1] == ("thing", len(CONTENTS), len(CONTENTS))
    assert registry.fetch("thing") == path
    assert server.ranges == [None]


def test_two_who_want_a_package_at_once_fetch_it_once(server, listed, monkeypatch):
    listed()
    receive = registry._receive

    def received(*arguments) -> None:
        time.sleep(0.2)
        receive(*arguments)

    monkeypatch.setattr(registry, "_receive", received)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: registry.fetch("thing"), range(4)))
    assert {path.read_bytes() for path in paths} == {CONTENTS}
    assert server.ranges == [None]


def test_a_download_that_broke_off_goes_on_where_it_stopped(server, listed):
    listed()
    partial().parent.mkdir(parents=True)
    partial().write_bytes(CONTENTS[:1000])
    assert registry.fetch("thing").read_bytes() == CONTENTS
    assert server.ranges == ["bytes=1000-"]


def test_a_server_that_hangs_up_is_asked_for_the_rest(server, listed):
    listed()
    server.cuts = [5000, 7000]
    assert registry.fetch("thing").read_bytes() == CONTENTS
    assert server.ranges == [None, "bytes=5000-", "bytes=12000-"]


def test_a_server_that_knows_no_ranges_sends_the_whole_again(server, listed):
    listed()
    server.knows_ranges = False
    partial().parent.mkdir(parents=True)
    partial().write_bytes(b"something else")
    assert registry.fetch("thing").read_bytes() == CONTENTS


def test_a_partial_file_longer_than_the_package_is_begun_again(server, listed):
    listed()
    partial().parent.mkdir(parents=True)
    partial().write_bytes(CONTENTS + b"and more")
    assert registry.fetch("thing").read_bytes() == CONTENTS


@pytest.mark.parametrize("came", [CONTENTS[:-1] + b"!", CONTENTS + b"!"], ids=["changed", "longer"])
def test_other_contents_are_refused_and_removed(listed, came):
    package = listed(came, expected=CONTENTS)
    with pytest.raises(DownloadFailed, match=f"not {package.sha256}.*Run the command again"):
        registry.fetch("thing")
    assert [path.name for path in paths.packages_dir().iterdir()] == ["thing.bin.lock"]


def test_a_file_put_there_by_hand_needs_no_network(server, listed):
    listed()
    paths.packages_dir().mkdir(parents=True)
    (paths.packages_dir() / "thing.bin").write_bytes(CONTENTS)
    registry.fetch("thing")
    assert server.ranges == []


def test_a_file_changed_after_it_was_checked_is_checked_again(listed):
    listed()
    registry.fetch("thing").write_bytes(b"changed by someone")
    with pytest.raises(DownloadFailed, match="damaged or another version"):
        registry.fetch("thing")


def test_no_network_is_one_line_that_names_the_address_and_the_place(listed):
    package = listed(url="http://127.0.0.1:9/thing.bin")
    with pytest.raises(DownloadFailed) as caught:
        registry.fetch("thing")
    assert package.url in str(caught.value) and str(paths.packages_dir() / "thing.bin") in str(caught.value)


def test_the_package_index_is_asked_for_the_address_of_a_wheel(server, listed, monkeypatch):
    listed(url="pypi:some-thing")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}/simple/")
    server.files["/simple/some-thing/"] = json.dumps(
        {"files": [{"filename": "other.bin", "url": "x"}, {"filename": "thing.bin", "url": "../../thing.bin"}]}
    ).encode()
    assert registry.fetch("thing").read_bytes() == CONTENTS


def test_an_index_without_the_wheel_is_told_apart(server, listed, monkeypatch):
    listed(url="pypi:some-thing")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}/simple")
    server.files["/simple/some-thing/"] = b'{"files": []}'
    with pytest.raises(DownloadFailed, match=r"lists no thing\.bin"):
        registry.fetch("thing")


FILES = {"./usr/share/a.txt": b"a", "./usr/share/b.txt": b"bb" * 5000}


def test_debian_and_npm_packages_and_wheels_are_read_without_installing(listed):
    listed(deb(FILES))
    assert dict(registry.deb_members("thing")) == {"usr/share/a.txt": b"a", "usr/share/b.txt": b"bb" * 5000}
    paths.packages_dir().joinpath("thing.bin").unlink()
    listed(tgz({"package/data.json": b"{}"}))
    assert list(registry.tgz_members("thing")) == [("package/data.json", b"{}")]
    paths.packages_dir().joinpath("thing.bin").unlink()
    listed(wheel({"part/data.bin": b"\x00"}))
    assert registry.open_wheel("thing").read("part/data.bin") == b"\x00"


@pytest.mark.parametrize(("data", "message"), [(b"PK\x03\x04 a zip", "no Debian package"), (b"!<arch>\n", "no data")])
def test_a_file_that_is_no_debian_package_is_refused(listed, data, message):
    listed(data)
    with pytest.raises(BadData, match=message):
        list(registry.deb_members("thing"))


def test_every_listed_package_is_complete():
    for key, package in registry.PACKAGES.items():
        assert len(bytes.fromhex(package.sha256)) == 32 and package.size_bytes > 500_000, key
        assert package.licence and package.url.startswith(("pypi:", "http")), key
    assert len({package.filename for package in registry.PACKAGES.values()}) == len(registry.PACKAGES)
