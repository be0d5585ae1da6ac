"""Pictures as people have them become upright RGB; what is no picture is refused by name, before it is decoded."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from blip2.errors import BadImage, MissingFile
from blip2.preprocessing.images import ImageTransform, load_image, random_crop_box

RED, WHITE = (255, 0, 0), (255, 255, 255)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_of_declared_size(width, height):
    """A PNG whose header tells of that size and which holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_allowed_format_gives_rgb(format):
    image = load_image(encode(Image.new("RGB", (6, 4), RED), format))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 2  # JPEG rounds


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, WHITE),
        ("LA", (90, 0), WHITE),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_every_mode_of_png_becomes_rgb_over_white(mode, colour, expected):
    assert load_image(encode(Image.new(mode, (3, 3), colour))).getpixel((1, 1)) == expected


def test_cmyk_jpegs_become_rgb():
    image = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.array(image.getpixel((4, 4))) - RED).max() <= 3


def test_a_palette_with_a_transparent_colour_becomes_rgb_over_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    loaded = load_image(encode(image, "PNG", transparency=0))
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 1))) == (WHITE, RED)


def test_the_transparent_grey_of_sixteen_bits_becomes_white():
    image = Image.fromarray(np.array([[7, 257 * 50]], dtype=np.uint16))
    loaded = load_image(encode(image, "PNG", transparency=7))
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 0))) == (WHITE, (50, 50, 50))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_by_their_exif_orientation(orientation):
    upright = Image.new("RGB", (8, 4), WHITE)
    upright.paste(RED, (0, 0, 4, 2))  # the upper left quarter
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> PIL's transpose that a camera applied
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encode(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(loaded), np.asarray(upright))
    again = load_image(loaded)  # as whoever is given a loaded picture does
    assert np.array_equal(np.asarray(again), np.asarray(upright))


def jpeg_of_scans(count, *, width=16):
    """A progressive JPEG, its last scan repeated."""
    data = encode(Image.new("L", (width, width), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - data.count(b"\xff\xda") + 1) + data[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_for_each_walks_over_all_pixels():
    with pytest.raises(BadImage, match=r"the given bytes is a JPEG of more than 100 scans"):
        load_image(jpeg_of_scans(101))
    followed_by_a_film = jpeg_of_scans(100) + b"\xff\xda\0\2" * 1000
    assert load_image(followed_by_a_film).size == (16, 16)


def test_a_broken_exif_block_does_not_cost_the_picture():
    data = encode(Image.new("RGB", (4, 4), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert load_image(data).size == (4, 4)


def test_one_pixel_is_a_picture():
    pixel_values = ImageTransform(16, *HALF)(load_image(encode(Image.new("RGB", (1, 1), RED))))
    assert pixel_values.shape == (3, 16, 16)
    assert torch.equal(pixel_values.amax(dim=(1, 2)), torch.tensor([1.0, -1.0, -1.0]))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, "blue")]
    assert load_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == RED


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_arrays_are_pictures(shape):
    assert load_image(np.zeros(shape, dtype=np.uint8)).size == (7, 5)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)]
)
def test_other_arrays_are_refused(array):
    with pytest.raises(BadImage, match=r"Give uint8 of shape \(H, W\)"):
        load_image(array)


def test_the_four_kinds_of_source_agree(tmp_path):
    path = tmp_path / "a.png"
    image = Image.new("RGB", (5, 3), RED)
    path.write_bytes(encode(image))
    loaded = [load_image(source) for source in (str(path), path, path.read_bytes(), image, np.asarray(image))]
    assert all(np.array_equal(np.asarray(one), np.asarray(image)) for one in loaded)


def test_the_image_given_is_left_as_it_was():
    image = Image.new("RGB", (4, 4), RED)
    load_image(image).paste("blue", (0, 0, 4, 4))
    assert image.getpixel((0, 0)) == RED


def test_a_pipe_can_be_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    data = encode(Image.new("RGB", (4, 4), RED))
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert load_image(tmp_path / "pipe").size == (4, 4)
    writer.join()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"not a picture", "is not a picture that can be read"),
        (b"%PDF-1.7", "is not a picture that can be read"),
        (encode(Image.new("RGB", (4, 4)), "TIFF"), "is not a picture that can be read"),
        (encode(Image.effect_noise((64, 64), 90))[:900], "is broken or cut short"),
        (encode(Image.effect_noise((64, 64), 90), "JPEG")[:900], "is broken or cut short"),
        (png_of_declared_size(8000, 8000), "is 8000 x 8000, more than 40 million pixels"),
        (png_of_declared_size(12_000, 12_000), "more pixels than can be decoded safely"),
        (png_of_declared_size(100_000, 100_000), "more pixels than can be decoded safely"),
        (png_of_declared_size(0, 5), "is not a picture|has no pixels|broken"),
    ],
)
def test_bytes_that_are_no_sound_picture_are_refused_by_name(tmp_path, data, message):
    path = tmp_path / "holiday.png"
    path.write_bytes(data)
    with pytest.raises(BadImage, match=message) as caught:
        load_image(path)
    assert str(caught.value).startswith(str(path))
    assert "0x" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_every_cut_of_a_picture_is_refused_or_read_and_never_raises_another_error():
    data = encode(Image.effect_noise((24, 24), 90).convert("P"), "GIF")
    for length in range(0, len(data), 7):
        try:
            load_image(data[:length])
        except BadImage as error:
            assert "the given bytes" in str(error)


def test_the_size_limit_is_an_argument():
    with pytest.raises(BadImage, match="more than 1e-05 million"):
        load_image(Image.new("RGB", (4, 4)), max_pixels=10)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere.png", MissingFile, "There is no file 'nowhere.png'"),
        ("nul\0.png", MissingFile, "There is no file"),
        ("https://example.org/a.png", MissingFile, "is a web address"),
        (".", BadImage, "is a folder, not a picture"),
        (3, BadImage, "not int"),
        (Image.new("F", (2, 2)), BadImage, "floating-point pixels"),
    ],
)
def test_what_is_no_file_of_a_picture_is_refused(path, error, message):
    with pytest.raises(error, match=message):
        load_image(path)


def test_pixel_values_are_resized_whole_and_normalised():
    transform = ImageTransform(8, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    left_half_red = Image.new("RGB", (100, 10), (0, 0, 0))
    left_half_red.paste(RED, (0, 0, 50, 10))
    pixel_values = transform(left_half_red)
    assert pixel_values.dtype == torch.float32
    assert torch.allclose(pixel_values[:, :, 0], torch.tensor([1.0, -1.0, 0.0])[:, None], atol=1e-2)
    assert torch.allclose(pixel_values[:, :, -1], torch.tensor([-1.0, -1.0, 0.0])[:, None], atol=1e-2)


def test_a_batch_is_its_pictures():
    transform = ImageTransform(8, *HALF)
    images = [Image.effect_noise((9, 5), 90).convert("RGB"), Image.new("RGB", (30, 40), RED)]
    assert torch.equal(transform.batch(images), torch.stack([transform(image) for image in images]))


def test_augmentation_depends_on_the_generator_alone():
    transform, image = ImageTransform(8, *HALF), Image.effect_noise((40, 30), 90).convert("RGB")
    first, again, other = (transform.augment(image, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_crops_lie_inside_and_keep_their_share_of_the_area():
    generator = torch.Generator().manual_seed(0)
    for width, height in ((64, 48), (1, 1), (500, 3)):
        for _ in range(50):
            left, top, right, bottom = random_crop_box((width, height), generator)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            share = (right - left) * (bottom - top) / (width * height)
            assert 0.45 <= share <= 1 or (width, height) != (64, 48)  # 0.05 for rounding to pixels


def test_flipping_mirrors_about_half_of_the_pictures():
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste(RED, (0, 0, 4, 8))
    transform, generator = ImageTransform(8, *HALF), torch.Generator().manual_seed(0)
    whole = {"scale": (1.0, 1.0), "flip": True}
    flipped = [transform.augment(image, generator, **whole)[0, 0, 0] < 0 for _ in range(60)]
    assert 15 < sum(flipped) < 45
