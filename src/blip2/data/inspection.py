"""What a source holds, in words and as a contact sheet."""

import hashlib
import io
import itertools
import textwrap
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from blip2.data.loader import OrderedLoader
from blip2.data.sample import Sample
from blip2.data.source import Source
from blip2.errors import BadImage, BadSample

TILE, WORDS = 180, 96  # pixels: side of a picture, height of the text below it
COLUMNS, ROWS = 6, 4
TRIED = 200  # pictures that are decoded where not all are
_BAR = 40  # letters of the longest bar of a histogram
_LENGTHS = (0, 1, 2, 4, 6, 8, 11, 16, 21, 31, 51)  # words: where the histogram's classes begin
_SHOWN_FAULTS = 5

Decode = Callable[..., Image.Image]


def describe(source: Source) -> str:
    """Counts, captions an image, lengths of captions, equal captions, kinds of questions, as lines of text."""
    sources, kinds, per_image = Counter(), Counter(), Counter()
    lengths, hashes = Counter(), array("Q")
    for sample in source.described():
        sources["/".join(filter(None, (sample.source, sample.style))) or "-"] += 1
        kinds.update(question.kind or "of no kind" for question in sample.questions)
        per_image[len(sample.captions)] += 1
        for caption in sample.captions:
            lengths[len(caption.split())] += 1
            hashes.append(_hash(caption.casefold().encode("utf-8", "replace")))
    lines = [f"{len(source):,} pictures, {lengths.total():,} captions, {kinds.total():,} questions"]
    lines.append("  sources: " + _listed(sources, 12))
    if kinds:
        lines.append("  questions: " + _listed(kinds, 20))
    lines.append("  captions an image: " + _listed(per_image, 12, by_name=True))
    if lengths:
        ordered = sorted(lengths.elements())
        middle = ordered[len(ordered) // 2]
        distinct = len(np.unique(np.frombuffer(hashes, dtype=np.uint64)))
        repeated = 1 - distinct / len(hashes)
        lines.append(f"  captions: {distinct:,} different, {repeated:.1%} repeat another one")
        lines.append(f"  words a caption: {ordered[0]}-{ordered[-1]}, median {middle}")
        lines += _histogram(lengths)
    if source.faults:
        lines.append(f"  left out by the reader: {len(source.faults):,}")
        lines += [f"    {' '.join(filter(None, (f.where, f.sample, f.reason)))}" for f in source.faults[:_SHOWN_FAULTS]]
    return "\n".join(lines)


@dataclass(frozen=True)
class PictureCheck:
    """What decoding pictures showed.

    Attributes:
        num_checked: samples that were read.
        bad: what is wrong with each bad one.
        num_repeated: sound pictures whose file equals that of an earlier one.
    """

    num_checked: int
    bad: tuple[str, ...]
    num_repeated: int

    def __str__(self) -> str:
        bad = f"{len(self.bad):,} of them bad"
        lines = [f"  pictures: {self.num_checked:,} read, {bad}, {self.num_repeated:,} repeat another"]
        lines += [f"    {told}" for told in self.bad[:_SHOWN_FAULTS]]
        if len(self.bad) > _SHOWN_FAULTS:
            lines.append(f"    and {len(self.bad) - _SHOWN_FAULTS:,} more")
        return "\n".join(lines)


def check_pictures(source: Source, decode: Decode, *, every: bool = False, workers: int = 0) -> PictureCheck:
    """Reads and decodes all pictures, or TRIED of them spread over the source.

    Args:
        decode: gives a picture of bytes; raises BadImage.
        every: all of them.
        workers: processes.
    """
    step = 1 if every else max(1, -(-len(source) // TRIED))
    places = range(0, len(source), step)

    def check(position: int) -> int | str:
        try:
            sample = source[places[position]]
            decode(sample.image, name=sample.id)
            return _hash(sample.image)
        except (BadSample, BadImage) as error:
            return str(error)

    bad, hashes = [], array("Q")
    with OrderedLoader(check, workers=workers, ahead=64) as loader:
        for found in loader.stream(0, len(places)):
            if isinstance(found, str):
                bad.append(found)
            else:
                hashes.append(found)
    distinct = len(np.unique(np.frombuffer(hashes, dtype=np.uint64))) if hashes else 0
    return PictureCheck(len(places), tuple(bad), len(hashes) - distinct)


def contact_sheet(samples: Sequence[Sample], out: Path, decode: Decode | None = None) -> None:
    """Writes a PNG of samples spread over a source, each with its captions and questions; bad ones are left blank."""
    step = max(1, len(samples) // (COLUMNS * ROWS))
    sheet = Image.new("RGB", (COLUMNS * TILE, ROWS * (TILE + WORDS)), "white")
    draw = ImageDraw.Draw(sheet)
    for place in range(min(COLUMNS * ROWS, len(samples))):
        left, top = place % COLUMNS * TILE, place // COLUMNS * (TILE + WORDS)
        try:
            sample = samples[place * step]
            picture = decode(sample.image, name=sample.id) if decode else Image.open(io.BytesIO(sample.image))
        except (BadSample, BadImage) as error:
            draw.multiline_text((left + 4, top), "\n".join(textwrap.wrap(str(error), 30)), fill="red", font_size=10)
            continue
        picture = picture.convert("RGB")
        picture.thumbnail((TILE - 6, TILE - 6))
        sheet.paste(picture, (left + 3, top + 3))
        lines = [*sample.captions, *(f"{q.question} {q.answer}" for q in sample.questions)]
        wrapped = [part for line in lines for part in textwrap.wrap(line, 30)][: WORDS // 12]
        draw.multiline_text((left + 4, top + TILE), "\n".join(wrapped), fill="black", font_size=10, spacing=2)
    sheet.save(out, "PNG")


def _histogram(lengths: Counter[int]) -> list[str]:
    """One line a class of lengths: words, a bar, captions."""
    counts = [
        sum(count for length, count in lengths.items() if first <= length < end)
        for first, end in zip(_LENGTHS, (*_LENGTHS[1:], 1 << 62), strict=True)
    ]
    names = [
        f"{first}" if end == first + 1 else f"{first}-{end - 1}" for first, end in itertools.pairwise(_LENGTHS)
    ] + [f"{_LENGTHS[-1]} or more"]
    most = max(counts)
    return [
        f"    {name:>10} {'#' * max(1, round(_BAR * count / most)):<{_BAR}} {count:,}"
        for name, count in zip(names, counts, strict=True)
        if count
    ]


def _listed(counts: Counter, most: int, *, by_name: bool = False) -> str:
    chosen = sorted(counts.items())[:most] if by_name else counts.most_common(most)
    more = ", ..." if len(counts) > most else ""
    return ", ".join(f"{name} {count:,}" if not by_name else f"{name}: {count:,}" for name, count in chosen) + more


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
