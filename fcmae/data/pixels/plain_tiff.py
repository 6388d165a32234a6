"""TIFF files whose pixels lie in the file as they are, so that a crop needs no decoding of the rest."""

from typing import Any

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    FILLORDER,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    STRIPBYTECOUNTS,
    STRIPOFFSETS,
    TILEWIDTH,
    TiffImageFile,
)

from fcmae.data.pixels.formats import open_picture
from fcmae.data.pixels.scientific import TIFF_MAGICS

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
    None for all other files, and for damaged ones. Raises what :func:`open_picture` raises.
    """
    if not data.startswith(TIFF_MAGICS):
        return None
    try:
        with open_picture(data, max_pixels) as image:  # Pillow reads the tags in a tenth of tifffile's time
            if not isinstance(image, TiffImageFile) or image.is_animated:
                return None
            height, width, tags = image.height, image.width, image.tag_v2
    except UnidentifiedImageError:  # such as of five channels
        return None
    samples = int(tags.get(SAMPLESPERPIXEL, 1))
    order = np.dtype(f"u{bit_depth // 8}").newbyteorder("<" if data[:2] == b"II" else ">")
    at, size = _extent(tags), height * width * samples * order.itemsize
    fits = samples == channels or (samples == 1 and channels == 3 and not exact)
    if not fits or not _is_plain(tags, samples, bit_depth) or at is None or at[1] != size or at[0] + size > len(data):
        return None
    pixels = np.ndarray((height, width, samples), order, data, at[0]).transpose(2, 0, 1)
    return PlainTiff(np.broadcast_to(pixels, (channels, height, width)))


def _extent(tags: Any) -> tuple[int, int] | None:
    """The first byte and the number of bytes of strips that follow each other; None of others."""
    offsets, counts = tags.get(STRIPOFFSETS, ()), tags.get(STRIPBYTECOUNTS, ())
    follow = len(offsets) == len(counts) > 0 and all(
        offset + count == after for offset, count, after in zip(offsets, counts, offsets[1:], strict=False)
    )
    return (offsets[0], sum(counts)) if follow else None


def _is_plain(tags: Any, samples: int, bit_depth: int) -> bool:
    kinds = {1: GREY, 3: RGB}
    expected = {
        COMPRESSION: 1,
        PLANAR_CONFIGURATION: 1,
        FILLORDER: 1,
        PHOTOMETRIC_INTERPRETATION: kinds.get(samples),
        ExifTags.Base.Orientation: 1,
    }
    return (
        all(tags.get(tag, 1) == value for tag, value in expected.items())
        and set(tags.get(BITSPERSAMPLE, (1,))) == {bit_depth}
        and set(tags.get(SAMPLEFORMAT, (1,))) == {1}
        and TILEWIDTH not in tags
    )
