"""From what people have (a path, bytes, a PIL image, an array) to the pixels the image encoder eats.

    load_image       checked before it is decoded, upright, RGB, transparency over white
    ImageTransform   resized straight to S x S and normalised, the same function for training and for use

A picture is untrusted input: five formats only, its declared size is read before any pixel is, and the message of a
refusal names the file and never repeats the decoder's own words.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from blip2.errors import BadImage, MissingFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 40_000_000  # 120 MB as RGB; a 24 megapixel photograph passes
MAX_FILE_BYTES = 200_000_000
MAX_SCANS = 100  # of a JPEG; encoders write about ten, and each may walk over every pixel for sixty bytes of file
ImageSource = str | Path | bytes | Image.Image | np.ndarray

_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # of those with a length, and the beginning and the end
_SCAN, _END = b"\xda", b"\xd9"
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: ImageSource, *, name: str | None = None, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> Image.Image:
    """The picture in RGB, upright by its EXIF tag, transparency laid over white; the first frame of an animation.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8.
        name: what error messages call it; the path where there is one.
        max_pixels: larger pictures are refused before they are decoded.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, several times as fast, as long as no side gets
            shorter than this. The pixels are then means of blocks and differ from those of a resize by a little.

    Raises:
        MissingFile: the path leads nowhere.
        BadImage: not a picture in one of `FORMATS`, broken, cut short, or too large.
    """
    if isinstance(source, Image.Image):
        image = source
        name = name or "the image"
    elif isinstance(source, np.ndarray):
        image = _from_array(source)
        name = name or "the array"
    elif isinstance(source, bytes | bytearray | memoryview):
        name = name or "the given bytes"
        image = _open(bytes(source), name)
    elif isinstance(source, str | Path):
        name = name or str(source)
        image = _open(_read_file(source), name)
    else:
        raise BadImage(f"An image is a path, bytes, a PIL image or an array, not {type(source).__name__}.")
    _check_size(image.size, name, max_pixels)
    if at_least is not None and isinstance(image, JpegImageFile):
        image.draft(None, (at_least, at_least))
    return _decode(image, name)


def _read_file(path: str | Path) -> bytes:
    """The bytes of a file, a pipe as well, up to MAX_FILE_BYTES."""
    if str(path).startswith(("http://", "https://")):
        raise MissingFile(f"{path} is a web address, and pictures are not fetched. Download it and give the file.")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise MissingFile(f"There is no file {str(path)!r}.") from None
    except IsADirectoryError:
        raise BadImage(f"{path} is a folder, not a picture.") from None
    except OSError as error:
        raise BadImage(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"{path} is larger than {MAX_FILE_BYTES // 1_000_000} MB. Save it smaller.")
    return data


def _open(data: bytes, name: str) -> Image.Image:
    """The picture with its header read and nothing decoded."""
    if not data:
        raise BadImage(f"{name} is empty.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of corrupt EXIF
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise BadImage(f"{name} declares more pixels than can be decoded safely. Save it smaller.") from None
        except Exception:  # decoders raise anything on hostile bytes, and their words hold addresses
            raise BadImage(f"{name} is not a picture that can be read ({', '.join(FORMATS)} can).") from None
    if image.format in ("JPEG", "MPO") and _num_scans(data) > MAX_SCANS:
        raise BadImage(f"{name} is a JPEG of more than {MAX_SCANS} scans. Save it as an ordinary one.")
    return image


def _num_scans(data: bytes) -> int:
    """How many scans a JPEG has up to its end, or one more than MAX_SCANS. What comes after the end is not read."""
    place = count = 0
    while count <= MAX_SCANS and (marker := _MARKER.search(data, place)) and marker[1] != _END:
        count += marker[1] == _SCAN
        is_beginning = marker[1] == b"\xd8"  # has no length
        place = marker.end() + (0 if is_beginning else int.from_bytes(data[marker.end() : marker.end() + 2]))
    return count


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadImage(f"{name} has no pixels ({width} x {height}).")
    if width * height > max_pixels:
        raise BadImage(
            f"{name} is {width} x {height}, more than {max_pixels / 1_000_000:g} million pixels. Save it smaller."
        )


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decoded, RGB and upright."""
    if image.mode == "F":
        raise BadImage(f"{name} has floating-point pixels, whose range is unknown. Give 8-bit pixels.")
    try:
        orientation = _orientation(image)
        image.load()
        rgb = _over_white(image)
    except Exception:  # as above
        raise BadImage(f"{name} is broken or cut short and cannot be decoded.") from None
    upright = rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    upright.info = {}  # PIL's copies keep the EXIF block: who loads this picture once more would turn it once more
    return upright


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or where the EXIF block is broken: the picture may still be good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of corrupt EXIF
        try:
            return image.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:  # EXIF parsing raises anything on hostile bytes
            return 1


def _over_white(image: Image.Image) -> Image.Image:
    """RGB; transparent pixels show white."""
    if image.mode.startswith("I"):
        return _from_sixteen_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _from_sixteen_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits a pixel, its transparent value white. PIL's own conversion would clip all above 255 to white."""
    grey = np.asarray(image).astype(np.int64)  # (H, W)
    eight_bit = np.clip(grey // 257, 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        eight_bit[grey == transparent] = 255
    return Image.fromarray(eight_bit).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    """A PIL image of an array's pixels."""
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_image:
        raise BadImage(
            f"The array is {array.dtype} of shape {array.shape}. Give uint8 of shape (H, W), (H, W, 3) or (H, W, 4)."
        )
    if 0 in array.shape:
        raise BadImage(f"The array has no pixels, its shape is {array.shape}.")
    return Image.fromarray(np.ascontiguousarray(array))


@dataclass(frozen=True)
class ImageTransform:
    """RGB picture -> pixel values: resized straight to S x S (no crop, nothing at the border is lost), normalised.

    Attributes:
        image_size: S.
        mean: per channel, of values in [0, 1].
        std: per channel.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixel values (3, S, S), float32."""
        return self.normalise(self.resize(image))

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixel values (B, 3, S, S) of B pictures."""
        return torch.stack([self(image) for image in images])

    def resize(self, image: Image.Image) -> Tensor:
        """Pixels (S, S, 3), uint8: the part that PIL does."""
        side = (self.image_size, self.image_size)
        return torch.from_numpy(np.array(image.resize(side, Image.Resampling.BICUBIC)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixel values (..., 3, S, S), float32, of pixels (..., S, S, 3) on the same device: the same bits on any."""
        # one channel after the other and in place: half the time of three new tensors
        values = pixels.movedim(-1, -3).contiguous().float()
        mean = values.new_tensor(self.mean)[:, None, None]
        std = values.new_tensor(self.std)[:, None, None]
        return values.div_(values.new_tensor(255)).sub_(mean).div_(std)  # by a number a GPU would multiply

    def augment(
        self,
        image: Image.Image,
        generator: torch.Generator,
        *,
        scale: tuple[float, float] = (0.5, 1.0),
        flip: bool = False,
    ) -> Tensor:
        """Pixel values (3, S, S) of a random crop, for training (paper: scale 0.5-1, bicubic, horizontal flip).

        Args:
            image: RGB picture.
            generator: the only source of chance.
            scale: bounds of the crop's share of the area.
            flip: mirror half of the pictures; off where captions speak of left and right.
        """
        box = random_crop_box(image.size, generator, scale)
        size = (self.image_size, self.image_size)
        cropped = image.resize(size, Image.Resampling.BICUBIC, box=box)
        if flip and torch.rand((), generator=generator) < 0.5:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.normalise(torch.from_numpy(np.array(cropped)))


def random_crop_box(
    size: tuple[int, int],
    generator: torch.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of a random crop: its share of the area uniform in `scale`, its shape log-uniform.

    Where ten draws do not fit, the whole picture.
    """
    width, height = size
    for area_share, shape_share in torch.rand(10, 2, generator=generator).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_share)
        shape = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape_share)
        crop_width = max(1, round(math.sqrt(area * shape)))
        crop_height = max(1, round(math.sqrt(area / shape)))
        if crop_width <= width and crop_height <= height:
            left = int(torch.randint(width - crop_width + 1, (), generator=generator))
            top = int(torch.randint(height - crop_height + 1, (), generator=generator))
            return left, top, left + crop_width, top + crop_height
    return 0, 0, width, height
