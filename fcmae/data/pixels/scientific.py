"""Files of scientific images: .npy, and TIFF with any number of channels (``fcmae[tiff]``)."""

import functools
import importlib.util
import io
import logging
import math
import mmap
import struct
import zlib
from typing import IO, Any

import numpy as np

from fcmae.data.pixels.bands import SOF0, segments
from fcmae.data.pixels.formats import check_size
from fcmae.data.pixels.jpeg import check_scans
from fcmae.errors import counted
from fcmae.imports import needed

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TYPES = {"uint": ("uint8", "uint16"), "float32": ("uint8", "uint16", "int16", "int32", "float16", "float32")}
"""Types of stored pixels that each ``data.dtype`` reads."""
MAX_PAGES = 4096
"""Of a TIFF, whose pages may be its channels."""
JPEG, DEFLATE, ZSTD = (7,), (8, 32946), (50000,)
COMPRESSIONS = (1, 5, 32773, *JPEG, *DEFLATE, *ZSTD)
"""TIFF's numbers of no compression, LZW, PackBits and the above: their output can be limited or checked first."""
ORIENTATION = 274
CHUNK = 2**20
SMALL = CHUNK // 16
"""Bytes of deflate that become at most 64 MiB."""


def read_npy(data: bytes, in_chans: int, expected: str) -> np.ndarray:
    """A .npy file as ``[C, H, W]``: of ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]``. Raises ValueError."""
    digits = 2 if data[6:7] == b"\1" else 4
    length = 8 + digits + int.from_bytes(data[8 : 8 + digits], "little")
    shape, order, dtype = _parsed(data[:length])
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize > len(data) - length:
        raise ValueError("it is cut off")
    pixels = np.frombuffer(data, dtype, count, length).reshape(shape, order="F" if order else "C").copy()
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3:
        stack = "; a stack of images needs data.name=array data.path=FILE" if pixels.ndim > 3 else ""
        raise ValueError(f"its shape must be [H, W], [C, H, W] or [H, W, C]; got {list(pixels.shape)}{stack}")
    if pixels.shape[0] != in_chans and pixels.shape[2] == in_chans:
        pixels = pixels.transpose(2, 0, 1)
    _check_channels(len(pixels), in_chans, expected)
    if not pixels.size:
        raise ValueError(f"its shape is {list(pixels.shape)}: it has no pixels")
    return native(pixels)


@functools.lru_cache(maxsize=64)
def _parsed(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """As :func:`npy_header`, and whether columns come first. The files of a data set mostly have the same header."""
    return _npy_header(io.BytesIO(header))


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type; the pixels follow in the file. Raises ValueError for damage, and for structured arrays."""
    shape, _, dtype = _npy_header(file)
    return shape, dtype


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its .npy version is {version}; must be 1.0 or 2.0")
    return readers[version](file)


def tiff_channels(data: bytes) -> int:
    """The number of channels of a TIFF file: its samples, or else its pages."""
    with open_tiff_file(io.BytesIO(data), data) as file:
        series = file.series[0]
        shape = dict(zip(series.axes, series.shape, strict=True))
        return math.prod(series.shape) // max(1, shape.get("Y", 0) * shape.get("X", 0))


def open_tiff_file(file: IO[bytes] | mmap.mmap, data: bytes | mmap.mmap) -> Any:
    """A file, opened by tifffile, which opens no other. Raises UsageError if that is missing.

    Args:
        data: its bytes.
    """
    with needed("this kind of TIFF needs tifffile: pip install 'fcmae[tiff]'"):
        import tifffile
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # exceptions say the same
    _check_pages(data)
    closed: dict[str, Any] = {"_multifile": False, "is_mmstack": False, "is_ndtiff": False}
    stream: Any = file  # also a mapped file, which has what tifffile needs of one
    return tifffile.TiffFile(stream, **closed)


def read_tiff(data: bytes, in_chans: int, expected: str, max_pixels: int, floats: bool = False) -> np.ndarray:
    """A TIFF file as ``[C, H, W]``, upright: its samples, or else its pages, are the channels. Raises ValueError.

    Its pixels are uint8 or uint16, or with ``floats`` any numbers. Sizes, channels and types are checked before pixels
    are decoded. Other files that its metadata names are not opened.
    """
    with open_tiff_file(io.BytesIO(data), data) as file:
        series = file.series[0]
        shape = dict(zip(series.axes, series.shape, strict=True))
        height, width = shape.get("Y", 0), shape.get("X", 0)
        check_size(height, width, max_pixels)
        channels = [axis for axis in series.axes if axis not in "YX" and shape[axis] > 1]
        if len(channels) > 1:
            raise ValueError(f"it must have one axis beside Y and X; got {series.axes}")
        _check_channels(math.prod(series.shape) // (height * width), in_chans, expected)
        if not (floats and series.dtype.kind in "uif"):
            check_type(series.dtype)
        for page in series.pages:
            _check_segments(data, page or series.keyframe, max_pixels)
        order = sorted(range(len(series.axes)), key=lambda i: "YX".find(series.axes[i]))
        pixels = native(series.asarray().transpose(order).reshape(-1, height, width))
        return _upright(pixels, int(series.keyframe.tags.valueof(ORIENTATION, 1)))


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Stored pixels ``[C, H, W]`` rotated by an EXIF orientation."""
    if 5 <= turn <= 8:
        pixels = pixels.transpose(0, 2, 1)
    flips = {2: (-1,), 3: (-1, -2), 4: (-2,), 6: (-1,), 7: (-1, -2), 8: (-2,)}
    return np.ascontiguousarray(np.flip(pixels, flips[turn]) if turn in flips else pixels)


@functools.lru_cache(maxsize=64)
def check_type(stored: np.dtype, dtype: str = "uint") -> None:
    """Raises ValueError for stored pixels of a type that ``data.dtype`` does not read."""
    if stored.name in TYPES[dtype]:
        return
    expected = f"with data.dtype={dtype} they must be {', '.join(TYPES[dtype])}"
    hint = "set data.dtype=float32" if stored.name in TYPES["float32"] else "convert the files"
    raise ValueError(f"its pixels are {stored}; {expected}; {hint}")


def _check_channels(count: int, in_chans: int, expected: str) -> None:
    if count != in_chans:
        raise ValueError(f"it has {counted(count, 'channel')}; {expected}")


def native(pixels: np.ndarray) -> np.ndarray:
    """The same numbers in the byte order of this machine."""
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)  # torch has no other byte order


def _check_pages(data: bytes | mmap.mmap) -> None:
    """Follows the chain of pages. Raises ValueError if it is too long or never ends."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    (count, entry), number = ("Q", 20) if big else ("H", 12), "Q" if big else "I"
    position, seen = (8 if big else 4), set[int]()
    while position + struct.calcsize(number) <= len(data):
        (page,) = struct.unpack_from(order + number, data, position)
        if page in seen or len(seen) == MAX_PAGES:
            raise ValueError("its pages form a cycle" if page in seen else f"it has more than {MAX_PAGES} pages")
        if not page or page + struct.calcsize(count) > len(data):
            return
        seen.add(page)
        position = page + struct.calcsize(count) + entry * struct.unpack_from(order + count, data, page)[0]


def _check_segments(data: bytes, page: Any, max_pixels: int) -> None:
    """Raises ValueError if a strip or tile of a page would decode to more than the image or tile has."""
    key = page.keyframe  # further pages of a series have places alone
    check_compression(key, max_pixels)
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        check_segment(data[offset : offset + count], key)


def check_compression(key: Any, max_pixels: int) -> None:
    """Raises ValueError for a page whose compression or tiles are not read."""
    kind = int(key.compression)
    if kind not in COMPRESSIONS:
        raise ValueError(f"its compression is {key.compression.name}; convert it to deflate, LZW or none")
    if kind in ZSTD and not _has_imagecodecs():
        raise ValueError("its compression is ZSTD, which needs imagecodecs: pip install 'fcmae[science]'")
    check_size(_tile(key), 1, max_pixels, "tiles of ")


def check_segment(segment: bytes, key: Any) -> None:
    """Raises ValueError if a strip or tile would decode to more than the image or tile has."""
    kind = int(key.compression)
    most = max(_tile(key), key.imagewidth * key.imagelength)
    if kind in JPEG:
        _check_jpeg(segment, most)
    elif kind in DEFLATE and len(segment) > SMALL and not _has_imagecodecs():  # which decodes into as much memory
        _check_deflated(segment, most * key.samplesperpixel * key.dtype.itemsize)


def _tile(key: Any) -> int:
    return key.tilewidth * key.tilelength * key.tiledepth if key.is_tiled else 1


def _has_imagecodecs() -> bool:
    return importlib.util.find_spec("imagecodecs") is not None


def _check_jpeg(segment: bytes, most: int) -> None:
    where = segments(segment)
    frame = next((where[kind] for kind in (SOF0, SOF0 + 1, SOF0 + 2) if kind in where), len(segment))
    height, width = struct.unpack_from(">HH", segment, frame + 1)
    if height * width > most:
        raise ValueError(f"it holds a JPEG of {width}x{height} pixels, more than the image has")
    check_scans(segment, where)


def _check_deflated(segment: bytes, most: int) -> None:
    inflate = zlib.decompressobj()
    while segment and most >= 0:
        most -= len(inflate.decompress(segment, CHUNK))
        segment = inflate.unconsumed_tail
    if most < 0:
        raise ValueError("it is compressed from more bytes than its pixels have")
