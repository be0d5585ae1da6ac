"""blip2 chat: a dialogue about a picture, at a terminal or through a pipe.

/image PATH   another picture    /reset   forget what was said    /save PATH   keep what was said    /quit   leave
"""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from blip2.cli import options
from blip2.cli.models import open_model
from blip2.cli.output import note, printable
from blip2.errors import UserError

HELP = "Ask about the picture. /image PATH shows another, /reset forgets, /save PATH keeps what was said, /quit leaves."


def chat(
    file: Annotated[str | None, typer.Argument(help="The picture to talk about; /image PATH shows another.")] = None,
    model: options.Model = "mini",
    sample: options.Sample = False,
    top_p: options.TopP = None,
    temperature: options.Temperature = None,
    max_new_tokens: options.MaxNewTokens = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    quiet: options.Quiet = False,
) -> None:
    """Talk about a picture; what was said before is remembered.

    Questions may be piped in, one a line; each answer is a line.
    """
    chosen = options.decoding_options(None, sample, top_p, temperature, max_new_tokens)
    is_terminal = sys.stdin.isatty()
    dialogue = Dialogue(
        open_model(model, "generation", device=device, dtype=dtype, quantize=quantize, quiet=quiet), chosen
    )
    if file is not None:
        dialogue.show(file)
    if is_terminal:
        note(HELP, quiet=quiet)
    num_failed = 0
    for line in _lines(is_terminal):
        try:
            if not dialogue.take(line.strip()):
                break
        except UserError as error:
            note(f"blip2: {error}")
            num_failed += 1
    raise typer.Exit(1 if num_failed and not is_terminal else 0)


class Dialogue:
    """One line in, what it asks for out."""

    def __init__(self, model: Any, chosen: dict[str, Any]) -> None:
        self._model = model
        self._chosen = chosen
        self._conversation: Any = None
        self._picture = ""

    def show(self, path: str) -> None:
        """Talk about the picture at `path` from now on; what was said of the last one is forgotten."""
        self._conversation = self._model.chat(path)
        self._picture = path

    def take(self, line: str) -> bool:
        """Obeys a line; false where it was the last."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/image":
            self.show(_unquoted(rest.strip()))
        elif command == "/reset":
            self._conversation_or_raise().reset()
        elif command == "/save":
            self._save(_unquoted(rest.strip()))
        elif command == "/help":
            note(HELP)
        elif command.startswith("/"):
            raise UserError(f"There is no command {command}. {HELP}")
        elif line:
            self._answer(line)
        return True

    def _answer(self, question: str) -> None:
        for piece in self._conversation_or_raise().stream(question, **self._chosen):
            print(printable(piece), end="", flush=True)
        print(flush=True)

        if left_out := self._conversation_or_raise().num_left_out:
            note(f"The oldest {left_out} turns were left out, for the model cannot read more.")

    def _save(self, path: str) -> None:
        """The dialogue as JSON where `path` ends so, else as Markdown; a file that is there is not touched."""
        if not path:
            raise UserError("Name a file: /save dialogue.md, or dialogue.json")
        turns = self._conversation_or_raise().history
        if path.endswith(".json"):
            rows = [{"question": question, "answer": answer} for question, answer in turns]
            text = json.dumps({"image": self._picture, "turns": rows}, ensure_ascii=False, indent=1)
        else:
            text = "\n\n".join([f"# {self._picture}", *(f"**{asked}**\n\n{said}" for asked, said in turns)])
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        note(f"Saved {len(turns)} turns to {path}.")

    def _conversation_or_raise(self) -> Any:
        if self._conversation is None:
            raise UserError("There is no picture yet. Show one: /image PATH")
        return self._conversation


def _lines(is_terminal: bool) -> Iterator[str]:
    """Lines of standard input; on a terminal after a prompt, which goes to standard error."""
    if not is_terminal:
        yield from sys.stdin
        return
    with suppress(ImportError):  # line editing and history, where the platform has it
        import readline  # noqa: F401
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            yield input()
        except EOFError:
            print(file=sys.stderr)
            return


def _unquoted(path: str) -> str:
    """A path without the quotes that a file manager puts around what is dragged into a terminal."""
    is_quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    return path[1:-1] if is_quoted and not Path(path).exists() else path
