"""A picture from another host, for a server that was told which hosts: one parser, and the address is checked that is
really connected to, at every redirect.

Names are resolved once; the connection goes to the checked address and to no other, so a name that changes its mind in
between (DNS rebinding) gains nothing. Only https on port 443; no credentials, no proxies, no cookies.
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Sequence

from blip2.server.faults import Fault

SECONDS = 10.0
MOST_REDIRECTS = 3
# what may stand in an address: no backslash, no user, no port, no control character; the host in lower-case ASCII
_ADDRESS = re.compile(r"https://(?P<host>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?P<path>/[!-\[\]-~]*)?")
_GIVEN_OUT = ipaddress.ip_network("2000::/3")  # the IPv6 addresses of the internet
_NOT_PUBLIC = [
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocols; a cloud's metadata
        "192.88.99.0/24",  # relays of 6to4
        "168.63.129.16/32",  # a cloud's host, which answers its guests
        "2001::/23",  # protocols, Teredo
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]
_REFUSED = "Pictures are not fetched from this address. Send the picture itself as a data URI."


def fetch(url: str, hosts: Sequence[str], *, max_bytes: int) -> bytes:
    """The bytes at `url`.

    Args:
        url: https://host/path.
        hosts: names that may be asked, in lower case; a redirect must lead to one of them too.
        max_bytes: longer answers are dropped.

    Raises:
        Fault: 400, in the same words whether the host is not allowed, not there or not public.
    """
    for _ in range(MOST_REDIRECTS + 1):
        parts = _ADDRESS.fullmatch(url)
        if parts is None or parts["host"] not in hosts:
            raise Fault(400, _REFUSED, param="messages")
        try:
            found = _get(parts["host"], parts["path"] or "/", max_bytes)
        except (OSError, http.client.HTTPException):
            raise Fault(400, _REFUSED, param="messages") from None
        if isinstance(found, bytes):
            return found
        url = found
    raise Fault(400, _REFUSED, param="messages")


def public_address(host: str) -> tuple[socket.AddressFamily, str]:
    """An address of `host`, if all that its name leads to are public; OSError if not."""
    found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    addresses = [(family, str(place[0])) for family, _, _, _, place in found]
    if not addresses or not all(_is_public(address) for _, address in addresses):
        raise OSError("not a public address")
    return addresses[0]


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.split("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if isinstance(address, ipaddress.IPv6Address) and address not in _GIVEN_OUT:
        return False  # site-local, IPv4-compatible, translators of IPv4: Python calls some of them global
    if any(address in network for network in _NOT_PUBLIC if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast


class _Checked(http.client.HTTPSConnection):
    """A connection to the address that was checked, with the certificate of the name; cut off after SECONDS."""

    def __init__(self, host: str) -> None:
        super().__init__(host, timeout=SECONDS)
        self._end: tuple[threading.Timer, socket.socket] | None = None

    def connect(self) -> None:
        family, address = public_address(self.host)
        plain = socket.socket(family, socket.SOCK_STREAM)
        plain.settimeout(SECONDS)
        try:
            plain.connect((address, 443))
            # A time-out is of one read, and an answer may come byte by byte: the whole has its time as well.
            twin = plain.dup()
            timer = threading.Timer(SECONDS, _hang_up, [twin])
            timer.daemon = True
            self._end = timer, twin
            timer.start()
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise

    def finish(self) -> None:
        """Closes it; OSError where it was cut off before, for what was read then is not the whole."""
        self.close()
        if self._end is None:
            return
        timer, twin = self._end
        was_cut_off = timer.finished.is_set()
        timer.cancel()
        twin.close()
        if was_cut_off:
            raise OSError("too slow")


def _hang_up(twin: socket.socket) -> None:
    """Ends a connection whoever reads from it."""
    with contextlib.suppress(OSError):
        twin.shutdown(socket.SHUT_RDWR)


def _get(host: str, path: str, max_bytes: int) -> bytes | str:
    """The answer's body, or where it sends us."""
    connection = _Checked(host)
    try:
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            place = answer.getheader("Location", "")
            return f"https://{host}{place}" if place.startswith("/") and not place.startswith("//") else place
        if answer.status != 200:
            raise OSError("no picture there")
        data = answer.read(max_bytes + 1)
    finally:
        connection.finish()
    if len(data) > max_bytes:
        raise OSError("too large")
    return data
