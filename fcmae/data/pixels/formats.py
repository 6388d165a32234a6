"""Which image files are read: by which decoders of Pillow, under which names, and up to which size.

Every image file that Pillow opens is opened here. Pillow knows fifty formats, some of which start other programs.
"""

import contextlib
import io
import logging
import math
import re
import threading
import warnings
from collections.abc import Iterator

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
"""Pillow's name of each format that is read, and how names of its files end. What a file is, its bytes decide."""
EXTENSIONS = (*(ending for endings in FORMATS.values() for ending in endings), ".npy")
"""File names that end so, in any case, are taken for images."""
MAX_PIXELS = LoaderConfig.max_pixels

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is wrong is in the exception, too
_pillow = threading.RLock()
"""Held while an image is open: Pillow's limit and Python's warnings belong to the whole process."""


@contextlib.contextmanager
def open_picture(data: bytes, max_pixels: float = math.inf) -> Iterator[Image.Image]:
    """An image by Pillow, before its pixels are decoded. Metadata gives no warnings.

    Raises UnidentifiedImageError for another format, and ValueError for more than ``max_pixels`` or none.
    """
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels  # type: ignore[assignment]  # inf is none
        try:
            with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
                check_size(image.height, image.width, max_pixels)
                yield image
        except Image.DecompressionBombError as error:
            pixels = re.findall(r"\d+", str(error))[0]
            raise ValueError(_too_large(pixels, pixels, max_pixels)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def check_size(height: int, width: int, max_pixels: float = MAX_PIXELS, what: str = "") -> None:
    """Raises ValueError for an image, or ``what`` it has, without pixels or with more than ``max_pixels``."""
    if not height or not width:
        raise ValueError("it has no pixels")
    if height * width > max_pixels:
        raise ValueError(_too_large(f"{what}{width}x{height}", height * width, max_pixels))


def _too_large(size: str, pixels: str | int, max_pixels: float) -> str:
    return f"it has {size} pixels; loader.max_pixels is {max_pixels}; set loader.max_pixels={pixels} to read it"
