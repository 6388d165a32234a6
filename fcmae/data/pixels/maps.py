"""Target maps of dense objectives, which have a class or numbers for each pixel of an image."""

from typing import IO

import numpy as np
import torch
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor

from fcmae.data.pixels import scientific
from fcmae.data.pixels.decode import Encoded, explained, stored
from fcmae.data.pixels.formats import MAX_PIXELS, check_tiles, open_picture
from fcmae.opening import open_regular

IGNORED = -1
"""The class of pixels that are left out of the loss and of metrics."""
MAX_CLASSES = 2**15 - 1
LOSSY = ("JPEG", "WEBP", "AVIF", "HEIF")
"""Formats whose compression changes values."""
ONE_CHANNEL = "a map of classes must have"


def class_map(given: Encoded | Tensor, name: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The classes of pixels ``[H, W]``, int64, as a file has them: of a palette the indices.

    Args:
        given: a file, or integers ``[H, W]`` or ``[1, H, W]``.
        name: for messages.

    Raises ImageError naming the file, for any damage, several channels, and numbers that are not integers.
    """
    with explained(name):
        pixels = given.numpy() if isinstance(given, Tensor) else _stored_classes(given.data, max_pixels)
        if pixels.ndim == 3 and len(pixels) == 1:
            pixels = pixels[0]
        if pixels.ndim != 2:
            raise ValueError(f"{ONE_CHANNEL} the shape [H, W]; got {list(pixels.shape)}")
        if pixels.dtype.kind not in "bui":
            raise ValueError(f"its values are {pixels.dtype}; classes must be integers")
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.int64))


def _stored_classes(data: bytes, max_pixels: int) -> np.ndarray:
    if data.startswith(scientific.NPY_MAGIC):
        return scientific.read_npy(data, 1, f"{ONE_CHANNEL} 1")
    try:
        with open_picture(data, max_pixels) as image:
            if image.format in LOSSY:
                raise ValueError(f"it is a {image.format}, whose compression changes classes; convert it to PNG")
            if len(image.getbands()) > 1:
                raise ValueError(f"it has {len(image.getbands())} channels; {ONE_CHANNEL} 1")
            check_tiles(image, max_pixels)
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {getattr(image, 'n_frames', 1)} pages; {ONE_CHANNEL} 1")
            return np.array(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        if not data.startswith(scientific.TIFF_MAGICS):
            raise
    return scientific.read_tiff(data, 1, f"{ONE_CHANNEL} 1", max_pixels)


def value_map(given: Encoded | Tensor, name: str, channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The numbers of pixels ``[channels, H, W]``, float32, as a file has them, not scaled. NaN = left out.

    Args:
        given: a file, also of floating-point numbers, or a tensor ``[channels, H, W]``.
        name: for messages.

    Raises ImageError naming the file, for any damage, infinite numbers and other channels.
    """
    with explained(name):
        told = f"objective.channels is {channels}"
        expected = f"[C, H, W] with objective.channels={channels}"
        pixels = given if isinstance(given, Tensor) else stored(given.data, channels, told, max_pixels, True)
        values = torch.as_tensor(np.asarray(pixels, dtype=np.float32))
        if values.ndim != 3 or len(values) != channels:
            raise ValueError(f"its shape must be {expected}; got {list(values.shape)}")
        if values.isinf().any():
            raise ValueError("it has infinite values; write NaN for pixels to leave out")
        return values


def has_values(target: Tensor) -> bool:
    """Whether a map has any pixel that is not left out: classes ``[H, W]`` or numbers ``[C, H, W]``."""
    return bool((target.isfinite() if target.is_floating_point() else target != IGNORED).any())


def stored_size(path: str) -> tuple[int, int] | None:
    """Height and width as the header of an image file says, turned as its EXIF says; None if it cannot be read here.

    Decodes nothing.
    """
    try:
        with open_regular(path) as file:
            head = file.read(len(scientific.NPY_MAGIC))
            file.seek(0)
            if head == scientific.NPY_MAGIC:
                return _npy_size(file)
            with open_picture(file) as image:
                turned = image.getexif().get(0x0112, 1) >= 5
                return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # libraries raise all kinds; reading the sample says what is wrong
        return None


def _npy_size(file: IO[bytes]) -> tuple[int, int] | None:
    shape, _ = scientific.npy_header(file)
    return (shape[0], shape[1]) if len(shape) == 2 else None  # of three, the channels may be first or last
