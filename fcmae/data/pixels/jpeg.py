"""JPEG files by simplejpeg (libjpeg-turbo), or by Pillow if simplejpeg is missing or refuses a file.

Both decode to the same pixels. Both can decode to a half, a quarter or an eighth of the size, which is much faster: by
an inverse DCT of the low frequencies alone.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import ExifTags

from fcmae.data.pixels.bands import SOF0, SOS
from fcmae.data.pixels.formats import open_picture

try:
    import simplejpeg
except ImportError:  # a platform without its wheel
    simplejpeg = None

MAGIC = b"\xff\xd8\xff"
APP1 = 0xE1
"""The segment of EXIF or XMP."""
MAX_SCANS = 64
"""Progressive files have about ten."""
REDUCTIONS = (8, 4, 2)
"""Divisors of the size for which libjpeg has fast code."""
COLORS = {1: "GRAY", 3: "RGB", 4: "RGBA"}
"""simplejpeg's names for numbers of channels. libjpeg reads a colour image as grey by its luma."""
COLOR_SPACES = ("Gray", "YCbCr", "RGB")
"""Of simplejpeg. CMYK is missing: Adobe stores it inverted, which only Pillow knows."""
IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names for numbers of channels."""


class Size(NamedTuple):
    """Pixels, as they are stored."""

    height: int
    width: int


def stored_size(data: bytes, max_pixels: float = math.inf) -> Size | None:
    """The size in the header; None if the image is not grey, YCbCr or RGB.

    Raises what Pillow raises, and ValueError for more than ``max_pixels``.
    """
    if simplejpeg is not None:
        try:
            height, width, color, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            color = None
        if color in COLOR_SPACES:
            return Size(height, width)
    with open_picture(data, max_pixels) as image:
        return Size(image.height, image.width) if image.mode in ("L", "RGB") else None


def check_scans(data: bytes, where: dict[int, int]) -> None:
    """Raises ValueError for a file of very many scans, each of which visits all pixels for a few bytes.

    ``where`` are the :func:`~fcmae.data.pixels.bands.segments` of the file.
    """
    components, scanned = where.get(SOF0, 0) + 5, where.get(SOS, 0)
    baseline = SOF0 in where and data[components : components + 1] == data[scanned : scanned + 1]
    if not baseline and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"it is a JPEG of {scans} scans; at most {MAX_SCANS} are read")


def orientation(data: bytes, where: dict[int, int]) -> int:
    """The EXIF orientation, 1 to 8; 1 = upright.

    ``where`` are the :func:`~fcmae.data.pixels.bands.segments` of the file.
    """
    if APP1 not in where:  # much faster than asking Pillow
        return 1
    with open_picture(data) as image:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    return turn if turn in range(1, 9) else 1


def decode(data: bytes, size: Size, in_chans: int, reduce: int = 1) -> np.ndarray:
    """Pixels as uint8 ``[H, W, C]``, each side divided by ``reduce`` and rounded up. Raises what Pillow raises."""
    if simplejpeg is not None:
        height, width = -(-size.height // reduce), -(-size.width // reduce)
        try:
            return simplejpeg.decode_jpeg(data, COLORS[in_chans], False, False, height, width, reduce)
        except ValueError:
            pass  # damaged or unusual; Pillow decides
    with open_picture(data) as image:
        image.draft("L" if in_chans == 1 else "RGB", (size.width // reduce, size.height // reduce))
        pixels = np.array(image.convert(IMAGE_MODES[in_chans]))
    return pixels.reshape(*pixels.shape[:2], in_chans)
