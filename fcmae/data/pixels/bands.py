"""Cuts the rows that a crop needs out of a JPEG; their pixels stay the same, bit for bit.

libjpeg decodes all bits of a file up to the last row. But if each row of blocks ends with a restart marker, as in files
of ``fcmae prepare``, rows of blocks can be left out, and the rest is a JPEG of less height. That saves a sixth of the
time of decoding and cropping a prepared image. The markers are in ITU-T T.81, annex B.
"""

import re
from typing import NamedTuple

SOF0, SOS, DRI = 0xC0, 0xDA, 0xDD
"""Baseline frame, scan, restart interval; each after 0xff."""
END = b"\xff\xd9"
RESTARTS = tuple(bytes([0xFF, 0xD0 + i]) for i in range(8))
"""The restart markers, used in turn."""
BLOCK = 8
"""Pixels per side of a block."""
MARGIN = 1
"""Rows of pixels above and below a crop from which its chroma is interpolated."""
LEAST = 2
"""Fewest rows of blocks that are worth leaving out: finding the markers takes as long as decoding one of sixteen."""

_restart = re.compile(rb"(\xff[\xd0-\xd7])")


class Band(NamedTuple):
    """A JPEG of ``height`` rows of another one, from row ``top`` on."""

    data: bytes
    top: int
    height: int


def segments(data: bytes) -> dict[int, int]:
    """The position in a JPEG of the first segment of each kind, up to the first scan."""
    found: dict[int, int] = {}
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and SOS not in found:
        found.setdefault(data[position + 1], position + 4)
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    return found


def cut_band(data: bytes, where: dict[int, int], top: int, bottom: int) -> Band | None:
    """A band that has the rows of pixels from ``top`` to ``bottom - 1``.

    None if the file lacks restart markers after each row of blocks, is damaged, or nearly all rows are needed.

    Args:
        where: :func:`segments` of the file.
    """
    if not (SOF0 in where and DRI in where and SOS in where and data[-2:] == END):
        return None
    frame, scan = where[SOF0], where[SOS]
    height, width, components = _number(data, frame + 1), _number(data, frame + 3), data[frame + 5]
    across, down = _sampling(data, frame, components)
    if _number(data, where[DRI]) != -(-width // (BLOCK * across)) or data[scan] != components:
        return None
    rows = -(-height // (BLOCK * down))
    first = max(0, top - MARGIN) // (BLOCK * down)
    end = min(height - 1, bottom - 1 + MARGIN) // (BLOCK * down) + 1
    if rows - (end - first) < LEAST:
        return None
    first_row = scan + 2 * components + 4
    parts = _restart.split(data[first_row:-2])
    markers = parts[1::2]
    if markers != [RESTARTS[i % 8] for i in range(rows - 1)]:
        return None
    band_top, band_bottom = first * BLOCK * down, min(height, end * BLOCK * down)
    parts = parts[2 * first : 2 * end - 1]
    parts[1::2] = markers[: end - first - 1]
    size = (band_bottom - band_top).to_bytes(2, "big")
    return Band(
        b"".join([data[: frame + 1], size, data[frame + 3 : first_row], *parts, END]), band_top, band_bottom - band_top
    )


def _number(data: bytes, position: int) -> int:
    return data[position] << 8 | data[position + 1]


def _sampling(data: bytes, frame: int, components: int) -> tuple[int, int]:
    """Blocks per row and per column of a minimum coded unit."""
    if components == 1:
        return 1, 1  # whatever the file states
    factors = [data[frame + 7 + 3 * i] for i in range(components)]
    return max(factor >> 4 for factor in factors), max(factor & 15 for factor in factors)
