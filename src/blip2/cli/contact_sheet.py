"""The contact sheet that `blip2 demo` writes: a grid of pictures with the caption, questions and answers under each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from blip2.cli.demo import Shown

COLUMNS = 4
PICTURE_SIDE = 300
MARGIN = 20
LINE_HEIGHT = 22
FONT_SIZE = 16
GROUND, INK, SOFT = "#f4f3f0", "#1d1d1b", "#63625e"


@dataclass(frozen=True)
class Line:
    """One line of text under a picture and its colour."""

    text: str
    colour: str


def contact_sheet(shown: Sequence["Shown"]) -> Image.Image:
    """All pictures with what the model said of them."""
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_lines(one, font) for one in shown]
    columns = min(COLUMNS, len(shown))
    rows = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    heights = [PICTURE_SIDE + LINE_HEIGHT * max(len(texts[i]) for i in row) + 2 * MARGIN for row in rows]
    width = columns * (PICTURE_SIDE + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN), GROUND)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            _draw_card(sheet, (MARGIN + column * (PICTURE_SIDE + MARGIN), top), shown[i].image, texts[i], font)
        top += height
    return sheet


def _lines(shown: "Shown", font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[Line]:
    lines = [Line(text, INK) for text in wrap(shown.caption, PICTURE_SIDE, font)]
    lines.append(Line("", INK))  # a gap below the caption
    for question, answer in zip(shown.picture.questions, shown.answers, strict=True):
        lines += [Line(text, SOFT) for text in wrap(question, PICTURE_SIDE, font)]
        lines += [Line(text, INK) for text in wrap(answer, PICTURE_SIDE - 2 * MARGIN, font, indent="    ")]
    return lines


def wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, indent: str = "") -> list[str]:
    """The text in lines of at most `width` pixels, broken between words; a longer word is cut."""
    lines = [""]
    for word in text.split() or ["(nothing)"]:
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width or n == 1)
            lines.append(word[:cut])
            word = word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [indent + line for line in lines if line]


def _draw_card(
    sheet: Image.Image,
    corner: tuple[int, int],
    image: Image.Image,
    lines: list[Line],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    left, top = corner
    small = ImageOps.contain(image, (PICTURE_SIDE, PICTURE_SIDE))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + PICTURE_SIDE - 1, top + PICTURE_SIDE - 1), fill="white")
    sheet.paste(small, (left + (PICTURE_SIDE - small.width) // 2, top + (PICTURE_SIDE - small.height) // 2))
    for number, line in enumerate(lines):
        draw.text((left, top + PICTURE_SIDE + 8 + number * LINE_HEIGHT), line.text, fill=line.colour, font=font)
