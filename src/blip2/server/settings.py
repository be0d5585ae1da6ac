"""What the server may be told: whom it lets in, how much it takes, what it says before each question."""

from dataclasses import dataclass, field

from blip2.inference.safety import Filter


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request may ask for; what is beyond is refused with 400 or 413.

    Attributes:
        body_bytes: of a request.
        image_pixels: of a picture, by what its header declares.
        images: pictures in one request.
        messages: turns in one request.
        text_characters: of all texts in one request together.
        choices: answers to one question (`n`), and texts or pictures to embed or to match.
        candidates: captions that are made to choose one from (`best_of`).
        max_tokens: of an answer.
        admitted: requests that are being answered or wait; more get 429.
        bodies_bytes: of all requests that are being answered or wait together; more get 429.
        body_seconds: between two pieces of a request's body.
        whole_body_seconds: for all of it, or who sends a byte now and then keeps a place of `admitted`.
        send_seconds: that a client may leave a piece of its answer unread.
    """

    body_bytes: int = 20_000_000
    image_pixels: int = 40_000_000
    images: int = 8
    messages: int = 32
    text_characters: int = 100_000
    choices: int = 8
    candidates: int = 8
    max_tokens: int = 512
    admitted: int = 128
    bodies_bytes: int = 400_000_000
    body_seconds: float = 20.0
    whole_body_seconds: float = 120.0
    send_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """All of the server's settings.

    Attributes:
        name: what the model is called in answers and in the field `model`.
        api_keys: who has one of them may ask; empty: everybody.
        hosts: names under which the server may be addressed (the Host header), besides the loopback's and plain
            addresses; ("*",) for any.
        origins: web pages elsewhere that may ask, such as https://example.org.
        remote_hosts: names of hosts that pictures may be fetched from; empty: pictures come with the request.
        requests_per_minute: of one key, or without keys of one address; None: any number.
        system: said to the language model before every dialogue; "" for nothing.
        filter: sees what is asked and what is said; None: nobody does.
        max_rows: how many texts are written side by side; None: as `Engine` finds best.
        limits: see Limits.
    """

    name: str = "mini"
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    remote_hosts: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    system: str = ""
    filter: Filter | None = None
    max_rows: int | None = None
    limits: Limits = field(default_factory=Limits)
