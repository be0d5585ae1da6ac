"""Pictures that lie about themselves, and good ones to break: made byte by byte, so that they cost nothing to make."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112
TURNED = {  # EXIF orientation -> how the stored pixels of an upright picture lie
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def noise(width=23, height=17, mode="RGB"):
    """A picture that differs at every pixel."""
    drawn = np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn).convert(mode)


def saved(image, kind, **options):
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(name, data):
    """A chunk with its checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *before, pixels=b"", after=()):
    """A grey PNG that declares a size, with chunks before and after its pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    end = [png_chunk(b"IDAT", zlib.compress(pixels, 9)), *after, png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join([*before, *end])


def text_bomb(num_bytes, count=1):
    """A PNG of one pixel whose compressed texts inflate to `count` times `num_bytes`."""
    text = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(b"a" * num_bytes, 9))
    return png(1, 1, *[text] * count, pixels=b"\0\0")


def jpeg_claiming(width, height):
    """A small JPEG whose header declares another size."""
    data = bytearray(saved(noise(), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans(width, height, count):
    """A grey progressive JPEG, its last scan repeated: each makes the decoder walk through the whole picture."""
    data = saved(Image.new("L", (width, height), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def gif_of_frames(count):
    """A GIF of one pixel and many frames."""
    frame = b"\x21\xf9\x04\0\0\0\0\0" + b"\x2c\0\0\0\0\1\0\1\0\0" + b"\2\2\x44\1\0"
    return b"GIF89a\1\0\1\0\x80\0\0" + b"\0\0\0\xff\xff\xff" + frame * count + b"\x3b"


def apng_of_frames(count):
    """An animated PNG of one pixel and many frames."""

    def control(number):
        return png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 1, 1, 0, 0, 1, 10, 0, 0))

    pixels = zlib.compress(b"\0\0")
    frames = b"".join(
        control(2 * i + 1) + png_chunk(b"fdAT", struct.pack(">I", 2 * i + 2) + pixels) for i in range(count - 1)
    )
    return png(1, 1, png_chunk(b"acTL", struct.pack(">II", count, 0)), control(0), pixels=b"\0\0", after=[frames])


def webp_of_frames(count):
    """An animated WebP of one pixel and many frames."""
    still = saved(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]  # one VP8L chunk
    frame = struct.pack("<3s3s3s3s3sB", *[b"\0\0\0"] * 4, b"\1\0\0", 0) + still
    frames = (b"ANMF" + struct.pack("<I", len(frame)) + frame) * count
    body = b"WEBPVP8X" + struct.pack("<IB3x3s3s", 10, 2, b"\0\0\0", b"\0\0\0")
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0) + frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def animations(count):
    """Name -> a file of many frames."""
    made = {"gif": gif_of_frames, "apng": apng_of_frames, "webp": webp_of_frames}
    return {name: make(count) for name, make in made.items()}


def bombs():
    """Name -> a file that is small and claims to be large, or is of a kind that is not read."""
    vector = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
    return {
        "png 20000 x 20000": png(20_000, 20_000, pixels=bytes(50_000_000)),
        "png 2^31 x 2^31": png(2**31 - 1, 2**31 - 1, pixels=bytes(50)),
        "png 0 x 0": png(0, 0),
        "jpeg 65535 x 65535": jpeg_claiming(65_535, 65_535),
        "jpeg 0 x 0": jpeg_claiming(0, 0),
        "png text of 100 MB": text_bomb(100_000_000),
        "png texts of 120 MB": text_bomb(1_000_000, 120),
        "png colour profile": png(1, 1, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(9_000_000))), pixels=b"\0\0"),
        "gif 65535 x 65535": gif_of_frames(1).replace(b"a\1\0\1\0", b"a\xff\xff\xff\xff"),
        "gif frame 65535 x 65535": gif_of_frames(1).replace(b"\x2c\0\0\0\0\1\0\1\0", b"\x2c\0\0\0\0\xff\xff\xff\xff"),
        "bmp 60000 x 60000": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 90, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 9, 0, 0, 0, 0),
        "webp 16384 x 16384": b"RIFF\x1a\0\0\0WEBPVP8L" + struct.pack("<IBI", 5, 0x2F, 0x0FFFFFFF) + b"\0",
        "tiff": saved(noise(), "TIFF"),
        "psd": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 9, 9, 8, 3) + bytes(300),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\nshowpage\n",
        "svg": vector.encode(),
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj\n",
        "ico": saved(noise(), "ICO"),
        "ppm": saved(noise(), "PPM"),
        "zip": b"PK\3\4" + bytes(60),
        "nothing": b"",
        "zeros": bytes(4000),
        "an address": b"https://pictures.example/cat.jpg",
    }


def good_pictures():
    """Name -> a file that must be read, however odd."""
    grey16 = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    palette = noise(mode="P")
    return {
        "1 x 1": saved(Image.new("RGB", (1, 1)), "PNG"),
        "1 x 10000": saved(Image.new("RGB", (1, 10_000)), "PNG"),
        "10000 x 1": saved(Image.new("RGB", (10_000, 1)), "JPEG"),
        "cmyk": saved(noise(mode="CMYK"), "JPEG"),
        "16 bit": saved(grey16, "PNG"),
        "16 bit, a grey is transparent": saved(grey16, "PNG", transparency=257),
        "palette": saved(palette, "PNG", transparency=3),
        "palette of bytes": saved(palette, "PNG", transparency=bytes(range(200))),
        "grey and alpha": saved(noise(mode="LA"), "PNG"),
        "alpha": saved(noise(mode="RGBA"), "WEBP"),
        "one bit": saved(noise(mode="1"), "PNG"),
        "one bit bmp": saved(noise(mode="1"), "BMP"),
        "gif": saved(palette, "GIF", transparency=2),
        "progressive": saved(noise(), "JPEG", progressive=True),
    }


def seeds():
    """Files to cut and to change, one of each format and more of those with more to break."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    exif[0x010E] = "a picture"
    frames = [noise(), noise(mode="L").convert("RGB")]
    return {
        "jpeg": saved(noise(), "JPEG"),
        "jpeg progressive": saved(noise(), "JPEG", progressive=True),
        "jpeg exif": saved(noise(), "JPEG", exif=exif),
        "jpeg cmyk": saved(noise(mode="CMYK"), "JPEG"),
        "png": saved(noise(), "PNG"),
        "png palette": saved(noise(mode="P"), "PNG", transparency=3),
        "png exif": saved(noise(mode="LA"), "PNG", exif=exif),
        "apng": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "webp": saved(noise(), "WEBP"),
        "webp lossless": saved(noise(mode="RGBA"), "WEBP", lossless=True, exif=exif),
        "webp animated": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "gif": saved(noise(mode="P"), "GIF"),
        "gif animated": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": saved(noise(), "BMP"),
        "bmp palette": saved(noise(mode="P"), "BMP"),
    }


def mutated(data, random):
    """The file with a few bytes changed, a part dropped, doubled or filled, as `random` has it."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        place = random.randrange(len(changed))
        way = random.randrange(5)
        if way == 0:
            changed[place] = random.randrange(256)
        elif way == 1:
            changed[place] ^= 1 << random.randrange(8)
        elif way == 2:
            del changed[place : place + random.randrange(1, 9)]
        elif way == 3:
            changed[place:place] = changed[place : place + random.randrange(1, 40)]
        else:
            changed[place : place + 4] = random.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
        if not changed:
            return b"\0"
    return bytes(changed)


def turned(image, orientation):
    """A PNG that is stored turned and says so in its EXIF block."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    way = TURNED[orientation]
    return saved(image if way is None else image.transpose(way), "PNG", exif=exif)
