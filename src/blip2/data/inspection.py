"""What a data set holds, in words and as a contact sheet."""

import io
import textwrap
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw

from blip2.data.shards import open_split, read_manifest

TILE, WORDS = 180, 96  # pixels: side of a picture, height of the text below it
COLUMNS, ROWS = 6, 4


def describe(folder: Path) -> str:
    """Counts by split, source, style and kind of question, and caption lengths, as lines of text."""
    lines = []
    for split in read_manifest(folder)["splits"]:
        samples = list(open_split(folder, split).described())
        sources = Counter(f"{sample.source}/{sample.style}" for sample in samples)
        kinds = Counter(question.kind for sample in samples for question in sample.questions)
        lengths = sorted(len(caption.split()) for sample in samples for caption in sample.captions)
        lines.append(f"{split}: {len(samples):,} pictures, {kinds.total():,} questions")
        lines.append("  sources: " + _listed(sources))
        if kinds:
            lines.append("  questions: " + _listed(kinds))
        if lengths:
            captions = {caption for sample in samples for caption in sample.captions}
            middle = lengths[len(lengths) // 2]
            lines.append(f"  captions: {len(captions):,} different, {lengths[0]}-{lengths[-1]} words, median {middle}")
    return "\n".join(lines)


def first_split(folder: Path) -> str:
    """The split listed first."""
    return next(iter(read_manifest(folder)["splits"]))


def contact_sheet(folder: Path, split: str, out: Path) -> None:
    """Writes a PNG of samples spread over a split, each with its captions and questions."""
    samples = open_split(folder, split)
    step = max(1, len(samples) // (COLUMNS * ROWS))
    sheet = Image.new("RGB", (COLUMNS * TILE, ROWS * (TILE + WORDS)), "white")
    draw = ImageDraw.Draw(sheet)
    for place in range(min(COLUMNS * ROWS, len(samples))):
        sample = samples[place * step]
        left, top = place % COLUMNS * TILE, place // COLUMNS * (TILE + WORDS)
        picture = Image.open(io.BytesIO(sample.image)).convert("RGB")
        picture.thumbnail((TILE - 6, TILE - 6))
        sheet.paste(picture, (left + 3, top + 3))
        lines = [*sample.captions, *(f"{q.question} {q.answer}" for q in sample.questions)]
        wrapped = [part for line in lines for part in textwrap.wrap(line, 30)][: WORDS // 12]
        draw.multiline_text((left + 4, top + TILE), "\n".join(wrapped), fill="black", font_size=10, spacing=2)
    sheet.save(out, "PNG")


def _listed(counts: Counter) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
