"""Files where they lie: a local path, or a URL such as s3://bucket/coco/ that fsspec reads.

A place is a string. Nothing is kept open between two calls, so that a place read before a fork is read after it, too.
What a data set names as its pictures is untrusted: `below` gives no place outside the folder they are to be in.
"""

import codecs
import glob
import hashlib
import io
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from blip2.errors import BadData, MissingFile, MissingPart

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters or more: C:\ is a path
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_EXPANDED = 100_000


def is_url(place: str) -> bool:
    """Whether fsspec is needed to read it."""
    return _URL.match(place) is not None and not place.startswith("file://")


def plain(place: str | os.PathLike[str]) -> str:
    """The place without `file://` and `~`."""
    text = os.fspath(place)
    return text if is_url(text) else os.path.expanduser(text.removeprefix("file://"))


def open_binary(place: str) -> BinaryIO:
    """The file, open for reading and seeking.

    Raises:
        MissingFile: it is not there.
        BadData: it is no regular file, or it cannot be read.
    """
    try:
        if is_url(place):
            files, path = _files(place)
            return files.open(path, "rb")
        if not stat.S_ISREG(os.stat(place).st_mode):  # opening a pipe would wait for ever
            raise BadData(f"{shown(place)} is no file.")
        return open(place, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"There is no file {shown(place)}.") from None
    except OSError as error:
        raise BadData(f"{shown(place)} cannot be read: {error.strerror or type(error).__name__}.") from None


def read_bytes(place: str, *, offset: int = 0, size: int | None = None, most: int | None = None) -> bytes:
    """`size` bytes from `offset`, or all, one more than `most` at the longest; errors as in `open_binary`."""
    with open_binary(place) as file:
        try:
            if offset:
                file.seek(offset)
            wanted = size if size is not None else -1 if most is None else most + 1
            return file.read(wanted)
        except OSError as error:
            raise BadData(f"{shown(place)} cannot be read: {error.strerror or type(error).__name__}.") from None


def open_text(place: str) -> io.TextIOWrapper:
    """The file as text; a mark of byte order is no text. Bytes that are not UTF-8 become single surrogates, which
    `texts.is_utf8` sees.

    Raises:
        MissingFile, BadData: as in `open_binary`; it is UTF-16.
    """
    file = open_binary(place)
    mark = file.read(2)
    if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        raise BadData(f"{shown(place)} is UTF-16. Write it as UTF-8: iconv -f UTF-16 -t UTF-8.")
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def is_file(place: str) -> bool:
    """Whether there is a file."""
    if is_url(place):
        files, path = _files(place)
        return bool(files.isfile(path))
    return os.path.isfile(place)


def is_folder(place: str) -> bool:
    """Whether there is a folder."""
    if is_url(place):
        files, path = _files(place)
        return bool(files.isdir(path))
    return os.path.isdir(place)


def stamp(place: str) -> tuple[int, str]:
    """Size in bytes and a mark that changes with the contents: the time of the last change, or the store's own tag.

    Raises:
        MissingFile: it is not there.
    """
    try:
        if is_url(place):
            files, path = _files(place)
            info = files.info(path)
            marks = (info.get(name) for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"))
            return int(info.get("size") or 0), str(next((mark for mark in marks if mark), ""))
        found = os.stat(place)
    except OSError:
        raise MissingFile(f"There is no file {shown(place)}.") from None
    return found.st_size, str(found.st_mtime_ns)


def stamps_sha256(folder: str, names: Iterator[str]) -> str:
    """One hash of files by name, size and time; a file that is not there counts with its name."""
    hashed = hashlib.sha256()
    for name in names:
        try:
            size, mark = stamp(join(folder, name))
        except MissingFile:
            size, mark = -1, ""
        hashed.update(repr((name, size, mark)).encode())
    return hashed.hexdigest()


def join(folder: str, *names: str) -> str:
    """The place of a name in a folder."""
    if is_url(folder):
        return "/".join([folder.rstrip("/"), *(name.strip("/") for name in names)])
    return os.path.join(folder, *names)


def folder_of(place: str) -> str:
    """The folder that a file or folder lies in."""
    if not is_url(place):
        return os.path.dirname(os.path.abspath(place))
    scheme, _, path = place.partition("://")
    return f"{scheme}://{posixpath.dirname(path.rstrip('/'))}"


def name_of(place: str) -> str:
    """The last part."""
    return posixpath.basename(place.rstrip("/")) if is_url(place) else os.path.basename(os.path.abspath(place))


def suffix_of(place: str) -> str:
    """The ending in lower case, with its dot."""
    return os.path.splitext(name_of(place))[1].lower()


def below(folder: str, name: str) -> str | None:
    """The place of a name in or below a folder; None where it leads out of it, by `..` or from the root."""
    if "\0" in name or not name:
        return None
    if is_url(folder):
        inside = name.removeprefix(folder.rstrip("/") + "/")
        steps = posixpath.normpath(inside)
        return None if _URL.match(inside) or steps.startswith(("..", "/")) else join(folder, steps)
    root = os.path.abspath(folder)
    place = os.path.normpath(os.path.join(root, name))
    return place if place.startswith(root.rstrip(os.sep) + os.sep) else None


def names_in(folder: str) -> list[str]:
    """Names of files and folders directly in a folder, sorted; hidden ones are left out."""
    if is_url(folder):
        files, path = _files(folder)
        names = [posixpath.basename(str(found).rstrip("/")) for found in files.ls(path, detail=False)]
    else:
        names = os.listdir(folder)
    return sorted(name for name in names if name and not name.startswith("."))


def files_below(folder: str) -> Iterator[str]:
    """Names of all files below a folder, relative to it, folder by folder in sorted order; hidden ones are left out."""
    if is_url(folder):
        files, path = _files(folder)
        root = path.rstrip("/") + "/"
        yield from sorted(str(found).removeprefix(root) for found in files.find(path))
        return
    seen = set()
    for current, folders, names in os.walk(folder, followlinks=True):
        true = os.path.realpath(current)
        if true in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(true)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        beneath = os.path.relpath(current, folder)
        for name in sorted(names):
            if not name.startswith("."):
                yield name if beneath == "." else os.path.join(beneath, name)


def expand(pattern: str) -> list[str]:
    """The places that braces `{00000..00331}`, `{a,b}` and the wildcards `*`, `?` stand for; wildcards are sorted.

    Raises:
        BadData: the braces cannot be read or stand for too many.
        MissingFile: no file fits the wildcards.
    """
    places: list[str] = []
    for place in _without_braces(pattern):
        if len(places) == MOST_EXPANDED:
            raise BadData(f"{shown(pattern)} stands for more than {MOST_EXPANDED:,} files.")
        if not glob.has_magic(place) or is_file(place):
            places.append(place)
            continue
        found = _globbed(place)
        if not found:
            raise MissingFile(f"No file fits {shown(place)}.")
        places += found
    return places


def _globbed(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    files, path = _files(pattern)
    return sorted(files.unstrip_protocol(found) for found in files.glob(path))


def _without_braces(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    inside = found[1]
    if bounds := _RANGE.fullmatch(inside):
        first, last = int(bounds[1]), int(bounds[2])
        if last < first:
            raise BadData(f"{{{inside}}} in {shown(pattern)} is no range from a smaller number to a larger one.")
        choices = (f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1))
    elif "," in inside:
        choices = iter(inside.split(","))
    else:
        raise BadData(f"{{{inside}}} in {shown(pattern)} is neither a range {{000..123}} nor a list {{a,b}}.")
    for choice in choices:
        yield from _without_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def shown(text: str) -> str:
    """A name as it may stand in a message: with its newlines and other unprintable characters spelled."""
    return text if text.isprintable() else repr(text)


def _files(place: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Asked for anew each time: fsspec keeps one a process."""
    try:
        import fsspec
    except ImportError:
        raise MissingPart(f"Reading {place} needs fsspec: pip install 'blip2[data]'.") from None
    try:
        return fsspec.core.url_to_fs(place)
    except ImportError as error:
        raise MissingPart(f"Reading {place} needs a further package. {error}") from None
    except ValueError:
        raise BadData(f"{place}: fsspec knows no protocol {place.partition(':')[0]!r}.") from None
