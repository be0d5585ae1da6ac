"""Pictures from the network: data URIs, decoded under limits, and addresses only where the server was told so."""

import base64
import binascii
import re

from PIL import Image

from blip2.preprocessing.images import load_image
from blip2.server.faults import Fault
from blip2.server.remote import fetch
from blip2.server.settings import ServerSettings

_DATA = re.compile(r"data:(?P<type>[\w.+/-]*)(?:;[\w=.+-]+)*;base64,", re.ASCII | re.IGNORECASE)


def read_picture(url: str, settings: ServerSettings, *, number: int) -> Image.Image:
    """The picture that an `image_url` gives.

    Args:
        url: a data URI in base64, or where `settings.remote_hosts` allows it an https address.
        settings: for its limits.
        number: which of the request's pictures it is, for messages.

    Raises:
        Fault: 400 for another scheme, for base64 that is none, or for an address that is not allowed.
        BadImage: no picture, a broken one, or too large a one.
    """
    if url[:5].lower() == "data:":
        data = _decode(url, number)
    elif settings.remote_hosts:
        data = fetch(url, settings.remote_hosts, max_bytes=settings.limits.body_bytes)
    else:
        raise Fault(
            400,
            f"Picture {number} is an address, and this server fetches nothing. Send the picture itself as a data URI: "
            "data:image/jpeg;base64,...",
            param="messages",
        )
    return load_image(data, name=f"Picture {number}", max_pixels=settings.limits.image_pixels)


def _decode(url: str, number: int) -> bytes:
    head = _DATA.match(url[:200])
    if head is None:
        raise Fault(400, f"Picture {number} is no data URI in base64: data:image/jpeg;base64,...", param="messages")
    try:
        written = url[head.end() :].encode("ascii").translate(None, b"\r\n")  # base64 of a shell comes in lines
        return base64.b64decode(written, validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Fault(400, f"Picture {number} is not written in base64.", param="messages") from None
