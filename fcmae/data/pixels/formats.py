"""The image formats that are read, their file names, and the largest size.

All images that Pillow reads are opened here: Pillow knows fifty formats, some of which start other programs.
"""

import contextlib
import io
import logging
import math
import re
import threading
import warnings
from collections.abc import Iterator
from typing import IO

from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401  # these two would be imported with all the others

from fcmae.config import LoaderConfig

FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""The formats by Pillow's names, and the endings of their files. A file's bytes decide which format it has."""
EXTENSIONS = (*(ending for endings in FORMATS.values() for ending in endings), ".npy")
"""Endings of image files, in lower or upper case."""
MAX_PIXELS = LoaderConfig.max_pixels

logging.getLogger("PIL").addHandler(logging.NullHandler())  # exceptions say the same
_pillow = threading.RLock()
"""Held while an image is open: Pillow's limit and Python's warnings are global."""


@contextlib.contextmanager
def open_picture(data: bytes | IO[bytes], max_pixels: float = math.inf) -> Iterator[Image.Image]:
    """An image opened by Pillow, not decoded yet, of the bytes of a file or the file. Its metadata gives no warnings.

    Raises UnidentifiedImageError for other formats, and ValueError for no pixels or more than ``max_pixels``.
    """
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels  # type: ignore[assignment]  # inf is none
        try:
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=list(FORMATS)) as image:
                check_size(image.height, image.width, max_pixels)
                yield image
        except Image.DecompressionBombError as error:
            pixels = re.findall(r"\d+", str(error))[0]
            raise ValueError(_too_large(pixels, pixels, max_pixels)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def check_size(height: int, width: int, max_pixels: float = MAX_PIXELS, what: str = "") -> None:
    """Raises ValueError for no pixels, or for more than ``max_pixels`` in an image or in ``what`` it has."""
    if not height or not width:
        raise ValueError("it has no pixels")
    if height * width > max_pixels:
        raise ValueError(_too_large(f"{what}{width}x{height}", height * width, max_pixels))


def _too_large(size: str, pixels: str | int, max_pixels: float) -> str:
    return f"it has {size} pixels; loader.max_pixels is {max_pixels}; set loader.max_pixels={pixels} to read it"
