"""TIFF files whose pixels lie in the file as they are, so that a crop needs no decoding of the rest."""

import importlib.util
import io
from typing import Any

import numpy as np

from fcmae.data.pixels.formats import check_size
from fcmae.data.pixels.scientific import ORIENTATION, TIFF_MAGICS, open_tiff_file

GREY, RGB = 1, 2
"""TIFF's numbers of black as zero, and of red, green and blue."""


class PlainTiff:
    """Called with rows and columns, gives a copy of that part."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.size = (pixels.shape[1], pixels.shape[2])

    def __call__(self, rows: slice, cols: slice) -> np.ndarray:
        return np.array(self._pixels[:, rows, cols], self._pixels.dtype.newbyteorder("="), order="C")


def opened(data: bytes, channels: int, bit_depth: int, exact: bool, max_pixels: int) -> PlainTiff | None:
    """The pixels ``[channels, H, W]`` of an uncompressed, upright file of one page, without a copy.

    They are uint8 of 8 bits or uint16 of 16 bits, grey or RGB; grey is repeated for three channels unless ``exact``.
    None for all other files, and without tifffile. Raises what :func:`open_tiff_file` and :func:`check_size` raise.
    """
    if not data.startswith(TIFF_MAGICS) or importlib.util.find_spec("tifffile") is None:
        return None
    with open_tiff_file(io.BytesIO(data), data) as file:
        if len(file.pages) != 1 or len(file.series) != 1:
            return None
        page, at = file.pages[0], file.series[0].dataoffset
        if at is None or not _is_plain(page, bit_depth):
            return None
        height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
        fits = samples == channels or (samples == 1 and channels == 3 and not exact)
        order = np.dtype(f"u{bit_depth // 8}").newbyteorder(file.byteorder)
        if not fits or at + height * width * samples * order.itemsize > len(data):
            return None
        check_size(height, width, max_pixels)
        pixels = np.ndarray((height, width, samples), order, data, at).transpose(2, 0, 1)
        return PlainTiff(np.broadcast_to(pixels, (channels, height, width)))


def _is_plain(page: Any, bit_depth: int) -> bool:
    kinds = {1: (GREY,), 3: (RGB,)}.get(page.samplesperpixel, ())
    return (
        int(page.compression) == 1
        and int(page.planarconfig) == 1
        and int(page.fillorder) == 1
        and int(page.photometric) in kinds
        and page.dtype == np.dtype(f"u{bit_depth // 8}")
        and page.bitspersample == bit_depth
        and int(page.tags.valueof(ORIENTATION, 1)) == 1
        and not page.is_tiled
        and len(page.shape) == 2 + (page.samplesperpixel > 1)
    )
