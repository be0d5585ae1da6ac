"""The command `blip2`: which function answers to which name, and how errors leave.

Importing this costs milliseconds: a command imports torch and the like inside its function.
"""

import contextlib
import io
import signal
import sys
from typing import Annotated, Any

import typer

from blip2 import __version__
from blip2.cli.ask import ask
from blip2.cli.bench import bench
from blip2.cli.caption import caption
from blip2.cli.chat import chat
from blip2.cli.convert import convert
from blip2.cli.data import app as data
from blip2.cli.demo import demo
from blip2.cli.embed import embed
from blip2.cli.evaluate import evaluate
from blip2.cli.export import export
from blip2.cli.info import info
from blip2.cli.init import init
from blip2.cli.match import match
from blip2.cli.plan import plan
from blip2.cli.quantize import quantize
from blip2.cli.serve import serve
from blip2.cli.train import train
from blip2.errors import Blip2Error

app = typer.Typer(
    name="blip2",
    help="Let a frozen language model see: caption pictures, answer questions about them, match them with texts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(caption, ask, chat, serve, match, embed, info, demo),
    *(train, plan, evaluate, export, convert, quantize, init, bench),
):
    app.command()(command)
app.add_typer(data, name="data")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"blip2 {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Let a frozen language model see: caption pictures, answer questions about them, match them with texts."""


def _leave(number: int, _frame: Any) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Runs the command line; exit code 0 all good, 1 some inputs failed, 2 nothing could be done."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding == "utf-8" else "backslashreplace")
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _leave)  # so that what was half written is taken away, as it is on Ctrl-C
    try:
        app()
    except Blip2Error as error:
        print(f"blip2: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"blip2: {error.filename or 'A file could not be read or written'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
