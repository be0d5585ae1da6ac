"""A picture from another host, for a server that was told which hosts: one parser, and the address is checked that is
really connected to, at every redirect.

Names are resolved once; the connection goes to the checked address and to no other, so a name that changes its mind in
between (DNS rebinding) gains nothing. Only https on port 443; no credentials, no proxies, no cookies.
"""

import http.client
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence

from blip2.server.faults import Fault

SECONDS = 10.0
MOST_REDIRECTS = 3
# what may stand in an address: no backslash, no user, no port, no control character; the host in lower-case ASCII
_ADDRESS = re.compile(r"https://(?P<host>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?P<path>/[!-\[\]-~]*)?")
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
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
        if address in ipaddress.ip_network("64:ff9b::/96"):  # IPv4 behind a translator
            return False
    return address.is_global and not address.is_multicast


class _Checked(http.client.HTTPSConnection):
    """A connection to the address that was checked, with the certificate of the name."""

    def connect(self) -> None:
        family, address = public_address(self.host)
        plain = socket.socket(family, socket.SOCK_STREAM)
        plain.settimeout(SECONDS)
        try:
            plain.connect((address, 443))
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def _get(host: str, path: str, max_bytes: int) -> bytes | str:
    """The answer's body, or where it sends us."""
    connection = _Checked(host, timeout=SECONDS)
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
        connection.close()
    if len(data) > max_bytes:
        raise OSError("too large")
    return data
