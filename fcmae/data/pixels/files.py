"""Image files as their bytes, read at once or, of a large TIFF, when they are needed."""

import os
from pathlib import Path
from typing import NamedTuple

from fcmae.errors import ImageError, reason_of
from fcmae.opening import open_regular

MAX_BYTES = 2**32
"""Of a file. A sparse file of any length takes no room on a disk."""
TIFF_NAMES = (".tif", ".tiff")
LARGE = 2**20
"""Bytes from which a TIFF is opened before it is read: a crop may need a part of it."""


class Encoded(NamedTuple):
    """The undecoded bytes of an image file, and its path for messages."""

    data: bytes
    name: str


class LargeTiff(Encoded):
    """A file whose bytes are read where they are asked for, each time. That raises ImageError."""

    @property
    def data(self) -> bytes:
        return _read(self.name)


def read_file(path: str | Path) -> Encoded:
    """The bytes of an image file. Raises ImageError naming it."""
    name = str(path)
    if name.lower().endswith(TIFF_NAMES):
        try:
            if LARGE <= os.stat(name).st_size <= MAX_BYTES:
                return LargeTiff(b"", name)
        except OSError as error:
            raise ImageError(name, reason_of(error)) from error
    return Encoded(_read(name), name)


def _read(path: str) -> bytes:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                hint = "; data=array reads windows of a large TIFF" if path.lower().endswith(TIFF_NAMES) else ""
                raise ImageError(path, f"it has {size} bytes; at most {MAX_BYTES} are read{hint}")
            return file.read()
    except OSError as error:
        raise ImageError(path, reason_of(error)) from error
