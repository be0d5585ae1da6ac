"""A picture as the packages bring it: a cut-out with alpha, its words, and what it shows."""

import hashlib
import io
import re
from dataclasses import dataclass

from PIL import Image

from blip2.data.sample import Sample

STORED_SIDE = 256  # longest side of a stored picture, in pixels
HELD_OUT_SHARE = 10  # one concept in so many is kept out of training


@dataclass(frozen=True)
class Picture:
    """One picture of one concept.

    Attributes:
        cutout: RGBA, cropped to what is opaque.
        caption: a few words.
        concept: what it shows; see `concept_of`.
        source, style, licence: as in Sample.
        tags: further words that fit it.
    """

    cutout: Image.Image
    caption: str
    concept: str
    source: str
    style: str
    licence: str
    tags: tuple[str, ...] = ()


def concept_of(caption: str) -> str:
    """The caption without article, punctuation and capitals, so that "A cat." and "cat" are one concept."""
    words = re.sub(r"[^\w\s'-]", " ", caption.casefold()).split()
    if len(words) > 1 and words[0] in ("a", "an", "the", "some"):
        words = words[1:]
    return " ".join(words)


def is_held_out(concept: str) -> bool:
    """Whether a concept never appears in training: one in ten, by a hash of its words."""
    return int(hashlib.sha256(concept.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def noun_of(concept: str) -> str:
    """The last word, as a rule the noun: "cat" of "black cat"."""
    return concept.split()[-1] if concept else ""


def cropped(image: Image.Image, side: int = STORED_SIDE) -> Image.Image | None:
    """RGBA without its transparent border, longest side at most `side`; None where nothing is opaque."""
    rgba = image.convert("RGBA")
    box = rgba.getchannel("A").point([255 if value > 16 else 0 for value in range(256)]).getbbox()
    if box is None:
        return None
    rgba = rgba.crop(box)
    rgba.thumbnail((side, side), Image.Resampling.LANCZOS)
    return rgba if min(rgba.size) >= 8 else None


def encoded(image: Image.Image) -> bytes:
    """WebP bytes of an RGB picture."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=2)
    return buffer.getvalue()


def as_sample(picture: Picture, number: int) -> Sample:
    """The picture on a white square, as a sample."""
    canvas = Image.new("RGB", (STORED_SIDE, STORED_SIDE), "white")
    cutout = picture.cutout.copy()
    inside = STORED_SIDE - 16
    scale = inside / max(cutout.size)
    cutout = cutout.resize([max(1, round(side * scale)) for side in cutout.size], Image.Resampling.BICUBIC)
    corner = ((STORED_SIDE - cutout.width) // 2, (STORED_SIDE - cutout.height) // 2)
    canvas.paste(cutout, corner, cutout)
    return Sample(
        id=f"{picture.style}/{number:05d}",
        image=encoded(canvas),
        captions=(picture.caption,),
        tags=picture.tags,
        source=picture.source,
        style=picture.style,
        concept=picture.concept,
        licence=picture.licence,
    )
