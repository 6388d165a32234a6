"""JPEG 2000 with more than 8 bits or other channels than Pillow's, decoded by imagecodecs (``fcmae[science]``)."""

import struct
from typing import NamedTuple

import numpy as np

from fcmae.data.pixels.formats import check_size
from fcmae.imports import needed

JP2_MAGIC = b"\0\0\0\x0cjP  \r\n\x87\n"
CODESTREAM = b"\xff\x4f\xff\x51"
MAGICS = (JP2_MAGIC, CODESTREAM)
BOX = struct.Struct(">I4s")
SIZE = struct.Struct(">HHIIIIIIIIH")
"""Length, capabilities, image, its offset, tile, its offset, components (ISO/IEC 15444-1, A.5.1)."""
MAX_CHANNELS = 1024


class Header(NamedTuple):
    """What a codestream declares."""

    height: int
    width: int
    bits: list[int]
    """Of each component, negative for signed numbers."""

    @property
    def is_plain(self) -> bool:
        """Whether Pillow decodes it without loss."""
        return len(self.bits) in (1, 3, 4) and all(0 < bits <= 8 for bits in self.bits)


def header(data: bytes) -> Header:
    """Raises ValueError if it is damaged."""
    start = _codestream(data)
    try:
        found = SIZE.unpack_from(data, start + 4)
        count = found[-1]
        depths = struct.unpack_from(f">{3 * min(count, MAX_CHANNELS)}B", data, start + 4 + SIZE.size)
    except struct.error:
        raise ValueError("its JPEG 2000 header is cut off") from None
    if not 0 < count <= MAX_CHANNELS:
        raise ValueError(f"it has {count} channels; at most {MAX_CHANNELS} are read")
    if any(step != 1 for step in (*depths[1::3], *depths[2::3])):
        raise ValueError("its channels have different sizes; convert it to JPEG 2000 without subsampling")
    signs = (((depth & 127) + 1) * (-1 if depth & 128 else 1) for depth in depths[::3])
    _, _, right, bottom, left, top = found[:6]
    return Header(max(0, bottom - top), max(0, right - left), list(signs))


def _codestream(data: bytes) -> int:
    """Where the first codestream begins, which decoders read."""
    position = 0
    while not data.startswith(CODESTREAM, position):
        if position + 16 > len(data):
            raise ValueError("it has no JPEG 2000 codestream")
        length, kind = BOX.unpack_from(data, position)
        skipped = 16 if length == 1 else 8
        length = struct.unpack_from(">Q", data, position + 8)[0] if length == 1 else length
        if kind == b"jp2c":
            position += skipped
            if not data.startswith(CODESTREAM, position):
                raise ValueError("its JPEG 2000 codestream is damaged")
        else:
            position += max(length, skipped) if length else len(data)
    return position


def read(data: bytes, max_pixels: int) -> np.ndarray:
    """A file as ``[C, H, W]`` of uint8, uint16, int8 or int16. The size is checked before it is decoded.

    Raises ValueError, and UsageError without imagecodecs.
    """
    declared = header(data)
    check_size(declared.height, declared.width, max_pixels)
    if max(map(abs, declared.bits)) > 16:
        raise ValueError(f"it has {max(map(abs, declared.bits))} bits per channel; at most 16 are read")
    with needed("JPEG 2000 of more than 8 bits needs imagecodecs: pip install 'fcmae[science]'"):
        import imagecodecs
    pixels = imagecodecs.jpeg2k_decode(data)
    if pixels.shape[:2] != (declared.height, declared.width):
        raise ValueError(f"its pixels are {list(pixels.shape)}; its header says {list(declared[:2])}")
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
