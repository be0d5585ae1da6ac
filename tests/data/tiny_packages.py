"""Registry packages in their real formats, made tiny: what the open set is built from, without a network.

Each of NOUNS has a photo stamp and an emoji in seven styles; clip art shows some of them again.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from blip2 import registry

NOUNS = ("cat", "dog", "horse", "cow", "pig", "sheep", "goat", "camel", "apple", "pear", "key", "lock", "bus", "chair")
STAMPS = "./usr/share/tuxpaint/stamps/"
CLIPART = "./usr/share/openclipart/"


def install(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Puts the packages into BLIP2_HOME and lists them in the registry in place of the real ones."""
    monkeypatch.setenv("BLIP2_HOME", str(home))
    packages = {
        "stamps": deb(_stamps()),
        "openclipart-svg": deb(_clipart_svgs()),
        "openclipart-png": deb(_clipart_pngs()),
        "emojibase": tgz({"package/en/data.json": json.dumps([_emoji(n) for n in range(len(NOUNS))]).encode()}),
        "fluent-3d": tgz({f"package/assets/{_code(n)}.webp": drawn("red", "WEBP") for n in range(len(NOUNS))}),
        "fluent-flat": tgz(_icons()),
        "twemoji": tgz(_icons()),
        "openmoji": tgz(_icons()),
        "emojione": tgz(_icons(has_characters=False)),
        "fxemoji": tgz(_icons(has_characters=False)),
        "noto-v1": tgz(_icons(has_characters=False)),
        "easy-vqa": wheel(_easy_vqa()),
    }
    (home / "packages").mkdir(parents=True)
    for key, data in packages.items():
        filename = f"{key}.package"
        (home / "packages" / filename).write_bytes(data)
        package = registry.Package(filename, hashlib.sha256(data).hexdigest(), len(data), "MIT", "http://127.0.0.1:9/")
        monkeypatch.setitem(registry.PACKAGES, key, package)


def drawn(colour: str, kind: str = "PNG") -> bytes:
    """A disc of one colour on transparent ground."""
    image = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((8, 4, 56, 44), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    """A Debian package: an `ar` of a version, a control archive and a data archive."""
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": _tar({}, "xz"), "data.tar.xz": _tar(files, "xz")}
    data = b"!<arch>\n"
    for name, contents in parts.items():
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(contents):<10}`\n".encode()
        data += contents + b"\n" * (len(contents) % 2)
    return data


def tgz(files: dict[str, bytes]) -> bytes:
    """An npm package."""
    return _tar(files, "gz")


def wheel(files: dict[str, bytes]) -> bytes:
    """A wheel."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return buffer.getvalue()


def _tar(files: dict[str, bytes], compression: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return buffer.getvalue()


def _code(number: int) -> str:
    return f"{0x1F400 + number:x}"


def _emoji(number: int) -> dict:
    return {
        "emoji": chr(0x1F400 + number),
        "hexcode": _code(number).upper(),
        "label": NOUNS[number],
        "tags": [f"tag of {NOUNS[number]}"],
    }


def _stamps() -> dict[str, bytes]:
    files = {f"{STAMPS}things/{noun}.png": drawn("blue") for noun in NOUNS}
    files |= {f"{STAMPS}things/{noun}.txt": f"A {noun}.\nfr.utf8=Une chose.\n".encode() for noun in NOUNS}
    files[f"{STAMPS}symbols/letter.png"], files[f"{STAMPS}symbols/letter.txt"] = drawn("black"), b"The letter A.\n"
    files[f"{STAMPS}things/nameless.png"] = drawn("black")
    return files


def _clipart_svgs() -> dict[str, bytes]:
    titles = {"a": "Green Cat 2", "b": "green cat", "c": "Border pattern", "d": "broken thing", "e": "by nobody"}
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        "<metadata><dc:title>{}</dc:title></metadata></svg>"
    )
    return {f"{CLIPART}svg/animals/{name}.svg": svg.format(title).encode() for name, title in titles.items()}


def _clipart_pngs() -> dict[str, bytes]:
    files = {f"{CLIPART}png/animals/{name}.png": drawn("green") for name in "abce"}
    return files | {f"{CLIPART}png/animals/d.png": b"\x89PNG\r\n\x1a\n and no more"}


def _icons(*, has_characters: bool = True) -> dict[str, bytes]:
    """An iconify set; some do not say which characters their icons are and leave the list of aliases out."""
    body = '<circle cx="16" cy="16" r="12" fill="{}"/>'
    icons = {noun: {"body": body.format("purple")} for noun in NOUNS}
    described = {"width": 32, "height": 32, "icons": icons} | ({"aliases": {}} if has_characters else {})
    characters = {_code(n): noun for n, noun in enumerate(NOUNS)} if has_characters else {}
    return {
        "package/icons.json": json.dumps(described).encode(),
        "package/chars.json": json.dumps(characters).encode(),
    }


def _easy_vqa() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for part in ("train", "test"):
        questions = [["what shape is present", "circle", 0], ["what colour is it?", "red", 1], ["is it red?", "yes", 1]]
        files[f"easy_vqa/data/{part}/questions.json"] = json.dumps(questions).encode()
        for number in range(2):
            files[f"easy_vqa/data/{part}/images/{number}.png"] = drawn("red")
    return files
