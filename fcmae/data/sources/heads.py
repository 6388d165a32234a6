"""What the start of a command says of images that cannot be read: by their first bytes, in a second at most."""

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from fcmae import ranks
from fcmae.data.pixels import dicom, scientific
from fcmae.data.pixels.formats import FORMATS
from fcmae.errors import ImageError, counted, reason_of, shown
from fcmae.opening import open_regular

LOOKED = 10_000
"""Images that are looked at, of a fixed random order."""
LEAST, SECONDS = 200, 1.0
"""So many are looked at however long it takes, others within this time."""
LENGTH = dicom.MAGIC_AT + len(dicom.MAGIC)
"""First bytes of a file that say its format."""
EMPTY, UNKNOWN, CLOSED = "without content", "of no format that is read", "that cannot be opened"


def unreadable(count: int, head: Callable[[int], bytes | None], describe: Callable[[int], str]) -> str:
    """A part of a line that counts images which cannot be read, by kind; nothing if none was found.

    Whatever it passes may still be damaged further on. It costs nothing on other ranks than 0, which print nothing.

    Args:
        head: the first :data:`LENGTH` bytes of an image, or all it has; None if they are not at hand. Raises OSError
            or ImageError for what cannot be opened.
    """
    if ranks.detect().rank:
        return ""
    found: dict[str, list[str]] = {EMPTY: [], UNKNOWN: [], CLOSED: []}
    looked, began = 0, time.monotonic()
    for index in random.Random(0).sample(range(count), min(count, LOOKED)):
        if looked >= LEAST and time.monotonic() - began > SECONDS:
            break
        looked += 1
        name = shown(describe(index))
        try:
            start = head(index)
        except FileNotFoundError:  # sources count these by themselves
            continue
        except (OSError, ImageError) as error:
            reason = error.reason if isinstance(error, ImageError) else reason_of(error)
            found[CLOSED].append(f"{name} ({reason})")
            continue
        if start is not None and not _is_known(start):
            found[UNKNOWN if start else EMPTY].append(name)
    parts = [f"{counted(len(names), 'image')} {what}, such as {min(names)}" for what, names in found.items() if names]
    some = f"of {looked:,} looked at, " if looked < count else ""
    return f"; {some}{'; '.join(parts)}" if parts else ""


def head_of(path: str) -> bytes:
    """The first bytes of a file. Raises OSError."""
    with open_regular(path) as file:
        return file.read(LENGTH)


def empty_classes(labels: Sequence[np.ndarray], names: Sequence[str] | None) -> str:
    """A part of a line that counts the classes without an image; nothing if there are none."""
    if names is None:
        return ""
    present = sum(np.bincount(part[part >= 0], minlength=len(names)) for part in labels)
    empty = [name for name, images in zip(names, np.atleast_1d(present), strict=True) if not images]
    return f"; {len(empty):,} of {len(names):,} classes have no image, such as {shown(empty[0])}" if empty else ""


def _is_known(start: bytes) -> bool:
    """Whether a file may be of a format that is read: what Pillow and others ask of its first bytes."""
    if start.startswith((scientific.NPY_MAGIC, *scientific.TIFF_MAGICS)) or dicom.is_dicom(start):
        return True
    if start[4:8] == b"ftyp":  # AVIF and HEIF, whose packages may be missing
        return True
    accepts = [Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN]
    return any(accept is None or accept(start[:16]) for accept in accepts)
