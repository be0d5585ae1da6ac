"""Results to standard output in three forms, everything else to standard error.

one picture named by itself    the bare answer
several                        path<TAB>answer
--json                         one object a line: {"path", ...}, or {"path", "error"}
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2.cli.inputs import Input
from blip2.errors import BadImage, MissingFile

Answer = Callable[[list[Any]], list[dict[str, Any]]]  # pictures -> a record each


class ResultWriter:
    """Writes one result after another and keeps count of what failed.

    Args:
        key: which field of a record is its text.
        as_json: write whole records.
        is_bare: write the text alone, without the path.
    """

    def __init__(self, key: str, *, as_json: bool, is_bare: bool) -> None:
        self._key = key
        self._as_json = as_json
        self._is_bare = is_bare
        self._num_good = 0
        self._num_bad = 0

    def result(self, path: str, record: dict[str, Any]) -> None:
        """One answered picture."""
        self._num_good += 1
        if self._as_json:
            self._print({"path": path} | record)
            return
        text = printable(record[self._key])
        print(text if self._is_bare else f"{one_line(path)}\t{text}", flush=True)

    def failure(self, path: str, error: Exception) -> None:
        """One picture that could not be read."""
        self._num_bad += 1
        if self._as_json:
            self._print({"path": path, "error": str(error)})
        else:
            print(f"blip2: {error}", file=sys.stderr, flush=True)

    def exit_code(self) -> int:
        """0 all good, 1 some inputs failed, 2 nothing could be done."""
        if not self._num_bad:
            return 0
        return 1 if self._num_good else 2

    def _print(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # names of files need not be UTF-8, JSON must be
            text = json.dumps(record)
        print(text, flush=True)


def answer_all(inputs: Sequence[Input], answer: Answer, writer: ResultWriter, *, batch_size: int, quiet: bool) -> int:
    """Reads the pictures, answers them in batches in their order, lists those that cannot be read.

    Args:
        inputs: the pictures.
        answer: PIL images -> one record each.
        writer: where results go.
        batch_size: pictures that are answered at once.
        quiet: no progress.

    Returns:
        The exit code.
    """
    waiting: list[tuple[Input, Any]] = []
    with progress_bar(len(inputs), quiet=quiet) as bar:
        for number, item in enumerate(inputs, start=1):
            waiting.append((item, _load(item)))
            num_good = sum(not isinstance(found, Exception) for _, found in waiting)
            if num_good == batch_size or number == len(inputs):
                _flush(waiting, answer, writer)
                bar.update(len(waiting))
                waiting = []
    return writer.exit_code()


def _load(item: Input) -> Any:
    """The picture, or why there is none."""
    try:
        return item.load()
    except (BadImage, MissingFile) as error:
        return error


def _flush(waiting: list[tuple[Input, Any]], answer: Answer, writer: ResultWriter) -> None:
    good = [found for _, found in waiting if not isinstance(found, Exception)]
    records = iter(answer(good) if good else [])
    for item, found in waiting:
        if isinstance(found, Exception):
            writer.failure(item.name, found)
        else:
            writer.result(item.name, next(records))


def is_bare(inputs: Sequence[Input]) -> bool:
    """Whether one picture was named by itself, so that its answer needs no path."""
    return len(inputs) == 1 and inputs[0].is_lone


def progress_bar(length: int, *, quiet: bool) -> Any:
    """A bar on standard error, shown where that is a terminal and results go elsewhere."""
    import typer

    is_shown = not quiet and length > 1 and sys.stderr.isatty() and not sys.stdout.isatty()
    return typer.progressbar(length=length, file=sys.stderr, hidden=not is_shown)


def note(text: str, *, quiet: bool = False) -> None:
    """A line for the person at the terminal."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def check_folder(out: Path) -> None:
    """Raises MissingFile where the folder that a file is to be written into does not exist."""
    if not out.absolute().parent.is_dir():
        raise MissingFile(f"The folder of {out} does not exist. Make it first.")


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A path beside `out`, of the same kind; renamed at the end, so that `out` is whole or is not there."""
    beside = out.with_name(f".{out.stem}.writing-{os.getpid()}{out.suffix}")
    try:
        yield beside
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def one_line(path: str) -> str:
    """The path without the line ends and tabs that a name of a file may hold; --json has it as it is."""
    return "".join(" " if character in "\n\r\t" else character for character in path)


def printable(text: str) -> str:
    """The text without line ends, tabs or other control characters, which break a line or move the cursor."""
    return "".join(character if character.isprintable() else " " for character in text)
