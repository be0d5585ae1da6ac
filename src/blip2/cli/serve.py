"""blip2 serve: the chat page and an API that OpenAI's clients speak."""

import ipaddress
import socket
import sys
from typing import Annotated

import typer

from blip2.cli import options
from blip2.cli.models import open_model
from blip2.cli.output import note
from blip2.errors import UserError

Keys = Annotated[
    list[str] | None,
    typer.Option("--api-key", envvar="BLIP2_API_KEYS", help="Who sends one of these may ask; give it several times."),
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--allow-host", envvar="BLIP2_ALLOW_HOSTS", help="A name the server is reached by; * for any."),
]
Origins = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", envvar="BLIP2_ALLOW_ORIGINS", help="A web page elsewhere that may ask: https://..."),
]
RemoteHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--fetch-from", envvar="BLIP2_FETCH_FROM", help="A host that pictures may be fetched from; without it none is."
    ),
]


def serve(
    model: Annotated[
        str, typer.Option("--model", "-m", envvar="BLIP2_MODEL", help="A model's name, its folder, or as for caption.")
    ] = "mini",
    host: Annotated[str, typer.Option(envvar="BLIP2_HOST", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="BLIP2_PORT", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(envvar="BLIP2_NAME", help="What the model is called in requests; its own name.")
    ] = None,
    api_key: Keys = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", envvar="BLIP2_NO_KEY", help="Let everybody ask who can reach the host.")
    ] = False,
    requests_per_minute: Annotated[
        int | None, typer.Option(envvar="BLIP2_REQUESTS_PER_MINUTE", min=1, help="Of one key, or of one address.")
    ] = None,
    allow_host: Hosts = None,
    allow_origin: Origins = None,
    fetch_from: RemoteHosts = None,
    system: Annotated[
        str, typer.Option(envvar="BLIP2_SYSTEM", help="Said to the LLM before a dialogue; default: a line of our own.")
    ] = "",
    filter: Annotated[
        str | None,
        typer.Option(envvar="BLIP2_FILTER", help="What must not be asked or said: words:FILE or module:name."),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(envvar="BLIP2_MAX_ROWS", min=1, max=1024, help="Texts written side by side.")
    ] = None,
    max_admitted: Annotated[
        int, typer.Option(envvar="BLIP2_MAX_ADMITTED", min=1, help="Requests answered or waiting; more get 429.")
    ] = 128,
    max_tokens: Annotated[int, typer.Option(envvar="BLIP2_MAX_TOKENS", min=1, max=4096, help="Of an answer.")] = 512,
    finish_seconds: Annotated[
        int, typer.Option(envvar="BLIP2_FINISH_SECONDS", min=0, help="For what was accepted, when told to stop.")
    ] = 60,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
) -> None:
    """Open the chat page, with an API beside it that OpenAI's clients speak.

    Every option can be set by an environment variable too; lists are parted by spaces there.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("The server needs more packages: pip install 'blip2[serve]'") from None
    _refuse_open_door(host, api_key or [], no_key)
    from blip2.inference.loading import find_model, read_settings
    from blip2.inference.safety import SYSTEM_LINE, load_filter
    from blip2.server.run import run
    from blip2.server.settings import Limits, ServerSettings

    own = read_settings(find_model(model))
    settings = ServerSettings(
        name=name or own.name,
        api_keys=tuple(_cleaned(api_key)),
        hosts=tuple(host.lower() for host in _cleaned(allow_host)),
        origins=tuple(origin.rstrip("/") for origin in _cleaned(allow_origin)),
        remote_hosts=tuple(host.lower() for host in _cleaned(fetch_from)),
        requests_per_minute=requests_per_minute,
        system=SYSTEM_LINE if system == "default" else system,
        filter=load_filter(filter) if filter is not None else None,
        max_rows=max_rows,
        limits=Limits(admitted=max_admitted, max_tokens=max_tokens),
    )
    _refuse_taken_port(host, port)
    loaded = open_model(model, *own.parts, device=device, dtype=dtype, quantize=quantize, quiet=quiet)
    if port and not quiet:
        shown = f"[{host}]" if ":" in host else host
        note(f"The page: http://{shown}:{port}/   the API: http://{shown}:{port}/v1   (Ctrl-C ends it)", quiet=quiet)
    sys.stderr.flush()
    run(loaded, settings, host=host, port=port, finish_seconds=finish_seconds, quiet=quiet)


def _cleaned(given: list[str] | None) -> list[str]:
    return [one.strip() for one in given or [] if one.strip()]


def _refuse_taken_port(host: str, port: int) -> None:
    """Before the model is loaded."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            if sys.platform != "win32":  # there it would let two servers share one port
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise UserError(f"The server cannot listen on {host}, port {port}: {error.strerror}.") from None


def _refuse_open_door(host: str, keys: list[str], no_key: bool) -> None:
    """Others can reach this host: then somebody must have said who may ask."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback and not keys and not no_key:
        raise UserError(
            f"On {host} others can reach the server. Give --api-key KEY, so that only who has it may ask, or --no-key "
            "to let everybody."
        )
    for key in keys:
        if len(key) < 16 or not key.isascii() or any(letter.isspace() for letter in key):
            raise UserError("A key is 16 ASCII characters at least, without spaces: openssl rand -hex 24 makes one.")
