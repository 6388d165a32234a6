"""PNG of 16 bits in several channels, which Pillow cuts to 8: decoded by imagecodecs (``fcmae[science]``)."""

import struct

import numpy as np

from fcmae.data.pixels.formats import check_size

MAGIC = b"\x89PNG\r\n\x1a\n"


def is_wide_colour(data: bytes) -> bool:
    """Whether a file is a PNG of 16 bits in several channels."""
    return data.startswith(MAGIC) and data[24:25] == b"\x10" and data[25:26] != b"\0"


def read(data: bytes, max_pixels: int, channels: int | None) -> np.ndarray:
    """uint16 ``[C, H, W]``, without an alpha that is one more than ``channels``. Raises ValueError.

    The size is checked before it is decoded.
    """
    if len(data) < 24:
        raise ValueError("it is cut off")
    width, height = struct.unpack_from(">II", data, 16)
    check_size(height, width, max_pixels)
    try:
        import imagecodecs
    except ImportError:
        what = "it is a PNG of 16 bits in several channels, which Pillow cuts to 8"
        raise ValueError(f"{what}; convert it to TIFF, or pip install 'fcmae[science]'") from None
    pixels = imagecodecs.png_decode(data)
    if pixels.ndim != 3 or pixels.shape[:2] != (height, width):
        raise ValueError(f"its pixels are {list(pixels.shape)}; its header says {height}x{width}")
    has_alpha = pixels.shape[2] in (2, 4)
    return (pixels[..., :-1] if has_alpha and channels == pixels.shape[2] - 1 else pixels).transpose(2, 0, 1)
