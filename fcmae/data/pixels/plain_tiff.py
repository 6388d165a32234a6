"""TIFF files whose pixels lie in the file as they are, so that a crop needs no decoding of the rest."""

import contextlib
import os
import weakref
from typing import IO, Any

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
from fcmae.data.pixels.scientific import TIFF_MAGICS, native
from fcmae.opening import open_regular

GREY, RGB = 1, 2
"""TIFF's numbers of black as zero, and of red, green and blue."""


class PlainTiff:
    """Called with rows and columns, gives a copy of that part. Raises OSError or ValueError.

    Args:
        data: the bytes of a file; or a file, from which only the rows are read.
        at: where the pixels begin, ``[H, W, samples]`` of ``dtype``.
        channels: of the result.
    """

    def __init__(
        self, data: bytes | IO[bytes], at: int, shape: tuple[int, int, int], dtype: np.dtype, channels: int
    ) -> None:
        self._data, self._at, self._shape, self._dtype, self._channels = data, at, shape, dtype, channels
        self.size = shape[:2]

    def __call__(self, rows: slice, cols: slice) -> np.ndarray:
        shape = rows.stop - rows.start, *self._shape[1:]
        begin = self._at + rows.start * shape[1] * shape[2] * self._dtype.itemsize
        if isinstance(self._data, bytes):
            band = np.ndarray(shape, self._dtype, self._data, begin)
        else:
            band = np.empty(shape, self._dtype)
            _fill(band, self._data.fileno(), begin)
            if self._channels == 1:
                return native(band[:, cols, 0][None])
        part = np.broadcast_to(band[:, cols].transpose(2, 0, 1), (self._channels, shape[0], cols.stop - cols.start))
        return np.array(part, self._dtype.newbyteorder("="), order="C")


def _fill(values: np.ndarray, descriptor: int, begin: int) -> None:
    """Reads the bytes of an array from a place in a file. Raises OSError, ValueError."""
    left = values.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(descriptor, [left], begin)
        if not count:
            raise ValueError("it is cut off")
        left, begin = left[count:], begin + count


def opened_file(path: str, channels: int, bit_depth: int, exact: bool, max_pixels: int) -> PlainTiff | None:
    """As :func:`opened`, without reading the pixels. Raises OSError, too."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        found = opened(file, channels, bit_depth, exact, max_pixels)
        if found is not None:
            stack.pop_all()
            weakref.finalize(found, file.close)
        return found


def opened(data: bytes | IO[bytes], channels: int, bit_depth: int, exact: bool, max_pixels: int) -> PlainTiff | None:
    """The pixels ``[channels, H, W]`` of an uncompressed, upright file of one page, without a copy.

    They are uint8 of 8 bits or uint16 of 16 bits, grey or RGB; grey is repeated for three channels unless ``exact``.
    None for all other files, and for damaged ones. Raises what :func:`open_picture` raises.
    """
    start = data[:4] if isinstance(data, bytes) else os.pread(data.fileno(), 4, 0)
    length = len(data) if isinstance(data, bytes) else os.fstat(data.fileno()).st_size
    if not start.startswith(TIFF_MAGICS):
        return None
    try:
        with open_picture(data, max_pixels) as image:  # Pillow reads the tags in a tenth of tifffile's time
            if not isinstance(image, TiffImageFile) or image.is_animated:
                return None
            height, width, tags = image.height, image.width, image.tag_v2
    except UnidentifiedImageError:  # such as of five channels
        return None
    samples = int(tags.get(SAMPLESPERPIXEL, 1))
    order = np.dtype(f"u{bit_depth // 8}").newbyteorder("<" if start[:2] == b"II" else ">")
    at, size = _extent(tags), height * width * samples * order.itemsize
    fits = samples == channels or (samples == 1 and channels == 3 and not exact)
    if not fits or not _is_plain(tags, samples, bit_depth) or at is None or at[1] != size or at[0] + size > length:
        return None
    return PlainTiff(data, at[0], (height, width, samples), order, channels)


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
