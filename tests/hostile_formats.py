"""DICOM, JPEG 2000, AVIF, HEIC and TIFF files made to do harm, each with what reads it (tests/hostile.py)."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fcmae.config import DataConfig
from fcmae.data.pixels.decode import decode, read_file
from fcmae.data.sources import train_source
from tests import more_files as made
from tests.bad_files import encoded, picture
from tests.hostile import MIB, Case, Read, deflated, page, tiff

GREY = np.zeros((1, 24, 32), np.uint16)


def file(name: str, content: Callable[[], bytes], channels: int = 1) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        (folder / name).write_bytes(content())
        return lambda: tuple(decode(read_file(folder / name), channels, dtype="float32").shape)

    return make


def wide_jpeg_2000(height: int, width: int, tile: int | None = None) -> bytes:
    """A codestream whose header declares another size, and tiles."""
    data = bytearray(made.jpeg2000(GREY[0], 16, boxed=False))
    struct.pack_into(">II", data, 8, width, height)
    if tile is not None:
        struct.pack_into(">II", data, 24, tile, tile)
    return bytes(data)


def lying_boxes() -> bytes:
    """JP2 whose header box says 24x32, and whose codestream is larger."""
    data = made.jpeg2000(np.zeros((24, 32), np.uint8))
    start = data.index(b"\xff\x4f\xff\x51")
    return data[:start] + data[start : start + 8] + struct.pack(">II", 30_000, 30_000) + data[start + 16 :]


def extents(data: bytes, side: int) -> bytes:
    """AVIF or HEIC whose image declares another size."""
    start = data.index(b"ispe") + 8
    return data[:start] + struct.pack(">II", side, side) + data[start + 8 :]


def deflated_dicom() -> bytes:
    """A deflated data set of 500 MB."""
    data = made.dicom(GREY)
    head = data[: data.index(b"\x08\x00") if b"\x08\x00" in data[132:400] else 300]
    head = head.replace(b"\x14\x001.2.840.10008.1.2.1\0", b"\x16\x001.2.840.10008.1.2.1.99")
    length = head.index(b"UL\x04\0") + 4  # of the group
    head = head[:length] + bytes([head[length] + 2]) + head[length + 1 :]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)  # after which the next one is the same
    return head + 500 * block + packer.flush()


def deep_dicom() -> bytes:
    """Sequences in sequences, of undefined lengths."""
    item = b"\x08\x00\x15\x11" + b"SQ\0\0" + b"\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0" + b"\xff\xff\xff\xff"
    data = made.dicom(GREY)
    start = data.index(b"\x10\x00\x10\x00PN")  # the patient's name
    return data[:start] + item * 20_000


def rle_bomb() -> bytes:
    """A segment of 4 MB that expands to 250 MB."""
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2 * MIB
    data = made.dicom(np.zeros((1, 24, 32), np.uint8), made.RLE)
    start = data.rindex(b"\xfe\xff\x00\xe0")
    return data[:start] + b"\xfe\xff\x00\xe0" + struct.pack("<I", len(frame)) + frame + b"\xfe\xff\xdd\xe0\0\0\0\0"


def tile_array(folder: Path) -> Read:
    """A tile of a large TIFF that is compressed from more than it has."""
    content = deflated(100 * MIB)
    tiles = {"tile_width": (64,), "tile_length": (64,), "tile_offsets": (-1,), "tile_counts": (len(content),)}
    (folder / "a.tif").write_bytes(tiff(page(64, 64, 1, compression=(8,), **tiles), after=content))
    cfg = DataConfig(name="array", path=str(folder / "a.tif"), in_chans=1, normalize="none")
    return lambda: tuple(train_source(cfg)[0].image.pixels(1).shape)


def large_tile_array(folder: Path) -> Read:
    tiles = {"tile_width": (2**20,), "tile_length": (2**20,), "tile_offsets": (8,), "tile_counts": (8,)}
    (folder / "a.tif").write_bytes(tiff(page(2**20, 2**20, 1, compression=(8,), **tiles)))
    cfg = DataConfig(name="array", path=str(folder / "a.tif"), in_chans=1, normalize="none")
    return lambda: tuple(train_source(cfg)[0].image.part(0, 0, 8, 8)[0].shape)


FORMATS = {
    "JPEG 2000, 30000 x 30000": Case(
        file("a.j2k", lambda: wide_jpeg_2000(30_000, 30_000)), "loader.max_pixels=900000000"
    ),
    "JPEG 2000, 8000 x 8000 without data": Case(file("a.j2k", lambda: wide_jpeg_2000(8_000, 8_000)), "ImageError", 300),
    "JPEG 2000, 64 million tiles": Case(file("a.j2k", lambda: wide_jpeg_2000(8_000, 8_000, 1)), "ImageError"),
    "JPEG 2000, boxes of another size": Case(file("a.jp2", lying_boxes), "ImageError"),
    "JPEG 2000 cut in its header": Case(file("a.j2k", lambda: wide_jpeg_2000(24, 32)[:30]), "header is cut off"),
    "AVIF, 30000 x 30000": Case(file("a.avif", lambda: extents(encoded(picture(), "AVIF"), 30_000), 3), "ImageError"),
    "HEIC, 30000 x 30000": Case(file("a.heic", lambda: extents(made.heic(picture()), 30_000), 3), "ImageError"),
    "HEIC, 9000 x 9000": Case(file("a.heic", lambda: extents(made.heic(picture()), 9_000), 3), "ImageError", 400),
    "DICOM, 60000 x 60000": Case(file("a.dcm", lambda: made.dicom(GREY, Rows=60_000, Columns=60_000)), "3600000000"),
    "DICOM, 10^9 frames": Case(file("a.dcm", lambda: made.dicom(GREY, NumberOfFrames=10**9)), "it has 1000000000 chan"),
    "DICOM, 9000 x 9000 without data": Case(
        file("a.dcm", lambda: made.dicom(GREY, Rows=9_000, Columns=9_000)), "ImageError"
    ),
    "DICOM, deflated": Case(file("a.dcm", deflated_dicom), "its transfer syntax 1.2.840.10008.1.2.1.99 is not read"),
    "DICOM, deep sequences": Case(file("a.dcm", deep_dicom), "ImageError"),
    "DICOM, RLE of 250 MB": Case(file("a.dcm", rle_bomb), "ImageError"),
    "array of TIFF, a tile of 100 MB": Case(tile_array, "more bytes than|INSUFFICIENT"),
    "array of TIFF, a tile of 2^40 pixels": Case(large_tile_array, "UsageError"),
}
