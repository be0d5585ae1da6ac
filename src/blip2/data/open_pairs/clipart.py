"""The Open Clip Art Library: drawings of the public domain with titles of mixed quality, cleaned by rule."""

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from PIL import Image

from blip2 import registry
from blip2.data.open_pairs.picture import Picture, concept_of, cropped

DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
LIST_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
MAX_PIXELS = 20_000_000

# Titles that say nothing of the picture, and folders of icons, patterns and borders.
GENERIC = re.compile(
    r"part of|collection|icon|pattern|untitled|clip ?art|template|border|banner|button|logo|test|page|frame|sheet|theme"
    r"|background|texture|gradient|version|unsorted|stencil|unfinished|\b(la|il|di|con|het|een|met|uma|com|para|und|der"
    r"|das|une|des|avec|el|los|las|del)\b"
)
SKIPPED_FOLDERS = ("/icons/", "/pattern", "/special/", "/unsorted", "/ornament", "/letters", "/alphabet", "/fonts/")


def read_clipart() -> Iterator[Picture]:
    """Drawings with a title that names something, one per title."""
    titles = dict(_titles())
    seen: set[str] = set()
    for name, data in sorted(_pngs(titles), key=lambda pair: pair[0]):
        caption, tags = titles[name]
        if caption in seen:
            continue
        image = _decoded(data)
        if image is not None:
            seen.add(caption)
            yield Picture(image, caption, concept_of(caption), "clipart", "clipart", "public domain", tags)


def clean_title(title: str) -> str | None:
    """The title in plain lower-case words, or None where it does not name what is shown."""
    title = re.sub(r"\(.*?\)|\[.*?\]", " ", title.lower())
    title = re.split(r"\b(?:by|from|remix)\b| - |:", title)[0]
    title = re.sub(r"[_\-/.,;!\"“”+#*~]+", " ", title)
    title = re.sub(r"\b(?:\d+|no|nr|v|var|svg|png|architetto|francesco|rollandin|nicu|buculei)\b|\d+$", " ", title)
    words = title.split()
    if not 1 <= len(words) <= 6 or GENERIC.search(" ".join(words)):
        return None
    if not all(word.isascii() and re.fullmatch(r"[a-z'&]+", word) for word in words) or len("".join(words)) < 3:
        return None
    return " ".join(words)


def _titles() -> Iterator[tuple[str, tuple[str, tuple[str, ...]]]]:
    """Path without ending -> cleaned title and subjects."""
    for name, data in registry.deb_members("openclipart-svg"):
        path = name.removeprefix("usr/share/openclipart/svg/")
        if not name.endswith(".svg") or any(folder in f"/{path}" for folder in SKIPPED_FOLDERS):
            continue
        try:
            tree = ElementTree.fromstring(data)
        except (ElementTree.ParseError, ValueError, LookupError):
            continue
        titles = [element.text for element in tree.iter(f"{DUBLIN_CORE}title") if element.text]
        caption = clean_title(titles[0]) if titles else None
        if caption:
            subjects = [item.text.strip().lower() for item in tree.iter(LIST_ITEM) if item.text and item.text.strip()]
            tags = [word for word in dict.fromkeys(subjects) if re.fullmatch(r"[a-z ]{3,24}", word)]
            yield path.removesuffix(".svg"), (caption, tuple(tags[:5]))


def _pngs(wanted: dict[str, tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, bytes]]:
    for name, data in registry.deb_members("openclipart-png"):
        path = name.removeprefix("usr/share/openclipart/png/").removesuffix(".png")
        if name.endswith(".png") and path in wanted:
            yield path, data


def _decoded(data: bytes) -> Image.Image | None:
    """The cut-out, or None for a file that is broken or far too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG",))
            if image.width * image.height > MAX_PIXELS:
                return None
            return cropped(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError):
            return None
