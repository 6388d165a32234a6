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

from PIL import (  # noqa: F401  # plugins that would be imported with all the others
    Image,
    Jpeg2KImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from fcmae.config import LoaderConfig
from fcmae.errors import UsageError
from fcmae.imports import needed

with contextlib.suppress(ImportError):  # Pillow before 11.3
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # loader workers are the parallelism

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}
"""The formats by Pillow's names, and the endings of their files. A file's bytes decide which format it has."""
EXTENSIONS = (*(ending for endings in FORMATS.values() for ending in endings), ".npy", ".dcm")
"""Endings of image files, in lower or upper case."""
MAX_PIXELS = LoaderConfig.max_pixels

Image.preinit()  # the other plugins, which Pillow would register when it opens its first image
logging.getLogger("PIL").addHandler(logging.NullHandler())  # exceptions say the same
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_pillow = threading.RLock()
"""Held while an image is open: Pillow's limit and Python's warnings are global."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In this block libraries give no warnings of what is odd in a file."""
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def open_picture(data: bytes | IO[bytes], max_pixels: float = math.inf) -> Iterator[Image.Image]:
    """An image opened by Pillow, not decoded yet, of the bytes of a file or the file. Its metadata gives no warnings.

    Raises UnidentifiedImageError for other formats, and ValueError for no pixels or more than ``max_pixels``.
    """
    with quiet():
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels  # type: ignore[assignment]  # inf is none
        try:
            known = _formats(data[:64] if isinstance(data, bytes) else _start(data))
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=known) as image:
                check_size(image.height, image.width, max_pixels)
                yield image
        except Image.DecompressionBombError as error:
            pixels = re.findall(r"\d+", str(error))[0]
            raise ValueError(_too_large(pixels, pixels, max_pixels)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _start(file: IO[bytes]) -> bytes:
    start = file.read(64)
    file.seek(0)
    return start


def _formats(start: bytes) -> list[str]:
    """The formats that Pillow may try for a file. Raises UsageError if the package for one is missing."""
    if start[4:8] == b"ftyp":
        if any(brand in start[8:] for brand in (b"avif", b"avis")):
            if "AVIF" not in Image.OPEN:
                raise UsageError("AVIF needs Pillow 11.3 or newer: pip install -U pillow")
        elif start[8:12] in HEIC_BRANDS:
            _register_heif()
    Image.preinit()  # the other common formats, if nothing has opened an image yet
    return [name for name in FORMATS if name in Image.OPEN]


def _register_heif() -> None:
    if "HEIF" in Image.OPEN:
        return
    with needed("HEIC needs pillow-heif: pip install 'fcmae[science]'"):
        import pillow_heif
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def check_size(height: int, width: int, max_pixels: float = MAX_PIXELS, what: str = "") -> None:
    """Raises ValueError for no pixels, or for more than ``max_pixels`` in an image or in ``what`` it has."""
    if not height or not width:
        raise ValueError("it has no pixels")
    if height * width > max_pixels:
        raise ValueError(_too_large(f"{what}{width}x{height}", height * width, max_pixels))


def check_tiles(image: Image.Image, max_pixels: float) -> None:
    """Raises ValueError if an image is a TIFF whose tiles have more than ``max_pixels``."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        sides = tags.get(TiffImagePlugin.TILELENGTH, 1), tags.get(TiffImagePlugin.TILEWIDTH, 1)
        check_size(*sides, max_pixels, "tiles of ")


def _too_large(size: str, pixels: str | int, max_pixels: float) -> str:
    return f"it has {size} pixels; loader.max_pixels is {max_pixels}; set loader.max_pixels={pixels} to read it"
