"""Emoji in eight styles with the labels and tags of emojibase: one concept, drawn up to eight times.

Seven styles train; Twemoji is never trained on, so that it tells whether a concept was learnt or its drawing.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import resvg_py
from PIL import Image, ImageDraw, ImageFont

from blip2 import registry
from blip2.data.open_pairs.picture import Picture, concept_of, cropped
from blip2.errors import UserError

TRAINING_STYLES = ("fluent-3d", "noto", "fluent-flat")
MORE_STYLES = ("openmoji", "emojione", "fxemoji", "noto-v1")  # of the training concepts alone; scenes do without them
HELD_OUT_STYLE = "twemoji"
NOTO_SIZE = 109  # the one size in which the font's pictures are stored


@dataclass(frozen=True)
class Emoji:
    """An emoji without skin tone: its characters, their code points in hex joined by "-", its label and tags."""

    text: str
    hexcode: str
    label: str
    tags: tuple[str, ...]


def read_list() -> list[Emoji]:
    """All emoji of emojibase in English but single letters (regional indicators)."""
    for name, data in registry.tgz_members("emojibase"):
        if name == "package/en/data.json":
            return [
                Emoji(e["emoji"], e["hexcode"].lower(), e["label"].lower(), tuple(e.get("tags", ())))
                for e in json.loads(data)
                if not e["label"].startswith("regional indicator")
            ]
    raise AssertionError("the package was checked by sha256 and holds this file")


def read_labels(language: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Code points -> label and tags of emojibase in a language.

    Raises:
        UserError: emojibase does not have it.
    """
    there = []
    for name, data in registry.tgz_members("emojibase"):
        if name == f"package/{language}/data.json":
            return {e["hexcode"].lower(): (e["label"], tuple(e.get("tags", ()))) for e in json.loads(data)}
        if name.endswith("/data.json"):
            there.append(name.split("/")[1])
    raise UserError(f"There are no labels in {language!r}. There are: {', '.join(sorted(there))}.")


def read_emoji(style: str, language: str = "en") -> Iterator[Picture]:
    """Pictures of all emoji that the style has, in the list's order, told in a language; concepts are English."""
    draw = STYLES[style]()
    labels = None if language == "en" else read_labels(language)
    for emoji in read_list():
        drawn = draw(emoji)
        image = cropped(drawn) if drawn is not None else None
        label, tags = (emoji.label, emoji.tags) if labels is None else labels.get(emoji.hexcode, ("", ()))
        if image is not None and label:
            yield Picture(image, label, concept_of(emoji.label), "emoji", style, LICENCES[style], tags)


Drawer = Callable[[Emoji], Image.Image | None]


def _fluent_3d() -> Drawer:
    files = {
        _plain(name.removeprefix("package/assets/").removesuffix(".webp")): data
        for name, data in registry.tgz_members("fluent-3d")
        if name.startswith("package/assets/") and name.endswith(".webp")
    }

    def draw(emoji: Emoji) -> Image.Image | None:
        data = files.get(_plain(emoji.hexcode))
        return Image.open(io.BytesIO(data)) if data else None

    return draw


def _noto() -> Drawer:
    fonts = [data for name, data in registry.deb_members("noto-emoji") if name.endswith("NotoColorEmoji.ttf")]
    font = ImageFont.truetype(io.BytesIO(fonts[0]), NOTO_SIZE)

    def draw(emoji: Emoji) -> Image.Image | None:
        if font.getlength(emoji.text) > 1.6 * NOTO_SIZE:  # a sequence the font draws as several glyphs
            return None
        canvas = Image.new("RGBA", (192, 192), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((16, 16), emoji.text, font=font, embedded_color=True)
        return canvas

    return draw


def _iconify(key: str) -> Callable[[], Drawer]:
    def drawer() -> Drawer:
        files = dict(registry.tgz_members(key))
        icons = {"aliases": {}} | json.loads(files["package/icons.json"])
        names = {_plain(code): name for code, name in json.loads(files["package/chars.json"]).items()}
        if not names:  # a set that does not say which characters its icons are; their names are the labels
            names = {_letters(name): name for name in [*icons["aliases"], *icons["icons"]]}

        def draw(emoji: Emoji) -> Image.Image | None:
            name = names.get(_plain(emoji.hexcode)) or names.get(_letters(emoji.label))
            name = icons["aliases"].get(name, {}).get("parent", name) if name else None
            if name not in icons["icons"]:
                return None
            icon = icons["icons"][name]
            box = f"0 0 {icon.get('width', icons['width'])} {icon.get('height', icons['height'])}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
            return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256))))

        return draw

    return drawer


def _plain(hexcode: str) -> str:
    """Without the variation selector, which some lists write and others do not."""
    return "-".join(part.lstrip("0") for part in hexcode.lower().split("-") if part != "fe0f")


def _letters(name: str) -> str:
    """Letters and digits alone: "1st place medal" and "1st-place-medal" are one name."""
    return "".join(c for c in name.lower() if c.isalnum())


STYLES: dict[str, Callable[[], Drawer]] = {
    "fluent-3d": _fluent_3d,
    "noto": _noto,
    "fluent-flat": _iconify("fluent-flat"),
    "twemoji": _iconify("twemoji"),
    **{style: _iconify(style) for style in MORE_STYLES},
}
LICENCES = {"fluent-3d": "MIT", "noto": "OFL-1.1", "fluent-flat": "MIT", "twemoji": "CC-BY-4.0"} | {
    style: registry.PACKAGES[style].licence for style in MORE_STYLES
}
