"""Where the bytes of pictures come from: files below a folder, or pieces of tar archives.

What is read has to begin as a picture does. So neither a text that took a picture's name nor a link that leads to some
other file of this computer ever becomes a sample; whether the rest is sound shows when it is decoded.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from blip2.data import places
from blip2.data.records import Where
from blip2.errors import BadData, BadSample, MissingFile

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")
MAX_BYTES = 200_000_000  # of one picture's file
_BEGINNINGS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM", re.DOTALL)


class Pictures(Protocol):
    """Gives the bytes of a source's pictures."""

    def read(self, where: Where, sample_id: str) -> bytes:
        """The picture's file. Raises BadSample: it is missing, empty or no picture."""
        ...

    def name(self, where: Where) -> str:
        """The file, for messages."""
        ...

    def sha256(self, wheres: Iterator[Where]) -> str:
        """A hash that changes when pictures do, made without reading them: of names, sizes and times."""
        ...


@dataclass(frozen=True)
class FilePictures:
    """Pictures that are files in or below a folder."""

    folder: str

    def read(self, where: Where, sample_id: str) -> bytes:
        """The file's bytes."""
        name = str(where)
        if not name:
            raise BadSample(sample_id, places.shown(self.folder), "holds its text, but no picture is named")
        place = places.below(self.folder, name)
        if place is None:
            reason = f"lies outside of the images folder {places.shown(self.folder)}, and only below it are files read"
            raise BadSample(sample_id, places.shown(name), reason)
        return checked(_read(place, sample_id), places.shown(place), sample_id)

    def name(self, where: Where) -> str:
        """Folder and name."""
        return places.shown(places.join(self.folder, str(where)))

    def sha256(self, wheres: Iterator[Where]) -> str:
        """Of all names, sizes and times."""
        return places.stamps_sha256(self.folder, (str(where) for where in wheres))


@dataclass(frozen=True)
class ArchivePictures:
    """Pictures in tar archives; where = (number of the archive, offset, size).

    Attributes:
        archives: their places.
        known_sha256: of all pictures, where somebody has written it down.
    """

    archives: Sequence[str]
    known_sha256: str = ""

    def read(self, where: Where, sample_id: str) -> bytes:
        """The member's bytes."""
        number, offset, size = (int(value) for value in where)
        name = self.name(where)
        if not size:
            reason = "has an empty file for this picture" if offset else "has a text of this name, but no picture"
            raise BadSample(sample_id, name, reason)
        if size > MAX_BYTES:
            raise BadSample(sample_id, name, f"has a picture of more than {MAX_BYTES // 1_000_000} MB")
        data = _read(self.archives[number], sample_id, offset=offset, size=size)
        if len(data) < size:
            raise BadSample(sample_id, name, "ends in the middle of this picture")
        return checked(data, name, sample_id, is_within=True)

    def name(self, where: Where) -> str:
        """The archive."""
        return places.shown(self.archives[int(where[0])])

    def sha256(self, wheres: Iterator[Where]) -> str:
        """What is written down, or of the archives' names, sizes and times."""
        if self.known_sha256:
            return self.known_sha256
        hashed = hashlib.sha256()
        for archive in self.archives:
            hashed.update(repr((places.name_of(archive), *places.stamp(archive))).encode())
        return hashed.hexdigest()


def checked(data: bytes, name: str, sample_id: str, *, is_within: bool = False) -> bytes:
    """The bytes, if they begin as a picture's file does.

    Args:
        name: of the file that they are, or that they lie in among others (`is_within`).

    Raises:
        BadSample: they do not.
    """
    if data and len(data) <= MAX_BYTES and _BEGINNINGS.match(data):
        return data
    if not data:
        reason = "is empty"
    elif len(data) > MAX_BYTES:
        reason = f"is larger than {MAX_BYTES // 1_000_000} MB"
    else:
        reason = "is not a picture (JPEG, PNG, WebP, GIF and BMP can be read)"
    raise BadSample(sample_id, name, f"has a file for this picture that {reason}" if is_within else reason)


def _read(place: str, sample_id: str, *, offset: int = 0, size: int | None = None) -> bytes:
    try:
        return places.read_bytes(place, offset=offset, size=size, most=MAX_BYTES)
    except MissingFile:
        raise BadSample(sample_id, places.shown(place), "does not exist") from None
    except BadData:
        raise BadSample(sample_id, places.shown(place), "cannot be read") from None


def is_picture_name(name: str) -> bool:
    """Whether a name ends as a picture's does."""
    return name.lower().endswith(PICTURE_SUFFIXES)
