"""Varied views of a picture for training: what changes between styles of drawing, but not what is shown.

The paper crops and flips photographs. Cut-outs and drawings on white also differ in colour, tilt, size and ground from
one style to the next, so these are varied too.
"""

import torch
from PIL import Image, ImageEnhance

VIEWS = "plain, then: crop 0.5-1, flip where allowed, tilt 15, size 0.6-1 on tinted ground, light and colour +-40 %, v1"


def vary(image: Image.Image, generator: torch.Generator, *, flip: bool) -> Image.Image:
    """A view of an RGB picture; chance comes from `generator` alone."""

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    def between(low: float, high: float) -> float:
        return low + (high - low) * chance()

    if flip and chance() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if chance() < 0.5:
        image = image.rotate(between(-15, 15), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    if chance() < 0.5:
        image = _smaller(image, between(0.6, 1.0), chance(), chance())
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if chance() < 0.5:
            image = enhance(image).enhance(between(0.6, 1.4))
    if chance() < 0.4:
        image = _on_ground(image, tuple(int(between(150, 255)) for _ in range(3)))
    return image


def _smaller(image: Image.Image, scale: float, across: float, down: float) -> Image.Image:
    """The picture shrunk to `scale` and put somewhere on white; `across` and `down` in [0, 1] say where."""
    width, height = image.size
    small = image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(small, (int((width - small.width) * across), int((height - small.height) * down)))
    return canvas


def _on_ground(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """White becomes `colour`, darker pixels darken less: multiplication, as with tinted glass."""
    red, green, blue = image.split()
    tinted = [
        band.point([value * level // 255 for value in range(256)])
        for band, level in zip((red, green, blue), colour, strict=True)
    ]
    return Image.merge("RGB", tinted)
