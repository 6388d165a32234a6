"""An image as its file has it, whatever ``data.in_chans`` and ``data.dtype`` are."""

import contextlib
import hashlib
import importlib.util
import io
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError
from torch import Tensor

from fcmae.data.pixels import dicom, jpeg2000, scientific
from fcmae.data.pixels.decode import Encoded, LazyImage, PixelFormat, StoredImage, explained, open_image, stored
from fcmae.data.pixels.formats import MAX_PIXELS, open_picture
from fcmae.data.pixels.jpeg import REDUCTIONS
from fcmae.data.pixels.nodata import middle_of

CHANNELS = {"RGB": 3, "RGBA": 4, "P": 3, "CMYK": 3, "YCbCr": 3, "LAB": 3, "HSV": 3}
"""Channels that Pillow's modes have here; others have 1."""
ENOUGH = 512
"""Pixels of the short side that a JPEG at reduced size has at least."""
WINDOW = 1024
"""Rows and columns that are read of an array, from its middle."""


class Look(NamedTuple):
    """What an image is."""

    kind: str
    """Its format."""
    size: tuple[int, int]
    """Height and width of the whole image."""
    pixels: np.ndarray
    """``[C, H, W]`` in the type that is stored; of an array the middle, of a large JPEG at reduced size."""


def look(image: Encoded | Tensor | LazyImage, name: str, max_pixels: int = MAX_PIXELS) -> Look:
    """Reads an image. Raises ImageError naming it."""
    if isinstance(image, StoredImage):
        return Look("array", image.size, image.stored(*middle_of(image.size, (WINDOW, WINDOW))))
    if isinstance(image, LazyImage):
        return Look("image", image.size, image.pixels(1).numpy())
    if isinstance(image, Tensor):
        return Look("tensor", (image.shape[-2], image.shape[-1]), image.numpy())
    with explained(name):
        kind, channels = _header(image.data)
        if kind == "JPEG":
            opened = open_image(image, PixelFormat(channels, max_pixels=max_pixels))
            reduce = next((r for r in REDUCTIONS if opened.reducible and min(opened.size) >= r * ENOUGH), 1)
            return Look(kind, opened.size, opened.pixels(reduce).numpy())
        pixels = stored(image.data, channels, f"its header says {channels}", max_pixels, floats=True)
        return Look(kind, (pixels.shape[1], pixels.shape[2]), pixels)


def _header(data: bytes) -> tuple[str, int]:
    """The format of a file and its number of channels."""
    if data.startswith(scientific.NPY_MAGIC):
        shape = scientific.npy_header(io.BytesIO(data))[0]
        return ".npy", min(shape[0], shape[2]) if len(shape) == 3 else 1
    if data.startswith(scientific.TIFF_MAGICS):
        return "TIFF", _tiff_channels(data)
    if dicom.is_dicom(data):
        return "DICOM", dicom.channels(data)
    if data.startswith(jpeg2000.MAGICS):
        return "JPEG2000", len(jpeg2000.header(data).bits)
    with open_picture(data) as picture:
        return str(picture.format), CHANNELS.get(picture.mode, 1)


def _tiff_channels(data: bytes) -> int:
    """By Pillow where tifffile is not installed: Pillow reads many of these files, and :func:`stored` knows which."""
    if importlib.util.find_spec("tifffile") is None:
        with contextlib.suppress(UnidentifiedImageError), open_picture(data) as picture:
            return CHANNELS.get(picture.mode, 1)
    return scientific.tiff_channels(data)


def as_picture(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, 3]`` of stored ``[C, H, W]``: the first channel as grey, or the first three as colours.

    Other types than uint8 are stretched, each channel from its 0.5 to its 99.5 percentile.
    """
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    if shown.dtype != np.uint8:
        values = np.nan_to_num(shown.astype(np.float64), posinf=0.0, neginf=0.0)
        low, high = np.percentile(values, (0.5, 99.5), axis=(1, 2), keepdims=True)
        shown = (255 * ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(shown, (3, *shown.shape[1:])).transpose(1, 2, 0))


def small(pixels: np.ndarray, most: int) -> np.ndarray:
    """Every n-th row and column, so that no side has more than ``most``."""
    step = max(1, -(-max(pixels.shape[1:]) // most))
    return pixels[:, ::step, ::step]


def checksum(image: Encoded | Tensor | LazyImage, pixels: np.ndarray) -> bytes:
    """The same for files of the same bytes, or for the same pixels."""
    data = image.data if isinstance(image, Encoded) else np.ascontiguousarray(pixels).tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()
